"""The original fast feedforward layer in a crammed BERT: 128 leaves of 32 neurons, one leaf a token in inference.

Paper: Belcak & Wattenhofer 2023, "Fast Feedforward Networks", arXiv 2308.14711; the master leaf and the balance loss
from Charalampopoulos et al. 2024, arXiv 2405.16836.
Command: python train.py --config=original_fff --budget=24h
Expected: soft training costs what a dense layer of 4096 neurons costs. At --scale=tiny, three minutes of demo text on two CPU
cores, one seed each, held-out nats in training's mixture and in inference's hard descent: this preset 4.691 and 4.702; with
--model.leaf-temperature=0.001 and the entropy's weight ramped over half the budget 5.066 and 5.066; with
--model.leaf-training=hard (straight-through) and no entropy loss 4.435 and 4.435. The wide gap of small toys (see
notebooks/01_the_fff_layer) did not show here.
Cost: 167,630,337 parameters; 7 decisions, 32 neurons of a leaf and 32 of the master leaf a token.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        feedforward=("leaf_tree",),
        tree_depth=7,
        leaf_width=32,
        leaf_hardening=0.1,
        tree_balance=0.01,
        master_leaf=32,
    )
)

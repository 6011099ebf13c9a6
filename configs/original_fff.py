"""The original fast feedforward layer in a crammed BERT: 128 leaves of 32 neurons, one leaf a token in inference.

Paper: Belcak & Wattenhofer 2023, "Fast Feedforward Networks", arXiv 2308.14711; the master leaf and the balance loss
from Charalampopoulos et al. 2024, arXiv 2405.16836.
Command: python train.py --config=original_fff --budget=24h
Expected: soft training costs what a dense layer of 4096 neurons costs. The stock recipe leaves inference, which is hard,
far behind training; here the temperature of the decisions falls to 0.001 over the budget and their entropy is in the loss.
Whether that closes the gap in a language model has not been measured; `--model.leaf-training hard` has none by construction.
Cost: 167,630,337 parameters; 7 decisions, 32 neurons of a leaf and 32 of the master leaf a token.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        feedforward=("leaf_tree",),
        tree_depth=7,
        leaf_width=32,
        leaf_hardening=0.1,
        leaf_hardening_ramp=0.5,
        leaf_temperature=0.001,
        tree_balance=0.01,
        master_leaf=32,
    )
)

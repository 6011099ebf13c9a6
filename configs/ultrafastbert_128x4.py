"""UltraFastBERT-128x4: crammed BERT whose feedforwards are 128 small trees, 640 of 3968 neurons used per token.

Paper: Belcak & Wattenhofer 2023, "Exponentially Faster Language Modeling", arXiv 2311.10770; the configuration its
code release ships as the default.
Command: python train.py --config=ultrafastbert_128x4 --budget=24h
Expected: nearer to the dense model than 1x11, with less to skip.
Cost: 160,547,841 parameters; a sixth of the feedforward's arithmetic in inference.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(model=ModelConfig(feedforward=("tree",), n_trees=128, tree_depth=4))

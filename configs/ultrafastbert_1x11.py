"""UltraFastBERT-1x11: crammed BERT whose feedforwards are one tree of 4095 neurons, 12 used per token.

Paper: Belcak & Wattenhofer 2023, "Exponentially Faster Language Modeling", arXiv 2311.10770.
Command: python train.py --config=ultrafastbert_1x11 --budget=24h
Expected: the paper reports 96 % of BERT-base's GLUE average (without CoLA) after one day on one A6000.
Cost: 163,671,025 parameters; training through the mask takes 1.4x the FLOPs of the dense crammed BERT.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(model=ModelConfig(feedforward=("tree",), n_trees=1, tree_depth=11))

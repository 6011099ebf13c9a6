"""The control of UltraFastBERT-128x4: a dense layer of exactly the K (D + 1) neurons that a token uses, and no trees.

Paper: none; see path_dense_1x11.
Command: python train.py --config=path_dense_128x4 --budget=24h
Expected: open. `ufbert compare ultrafastbert_128x4 path_dense_128x4` answers it at a scale and a budget.
Cost: 78,695,425 parameters. The width follows the trees at every scale: 640 neurons at base and 384 at mini.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

trees = load_preset("ultrafastbert_128x4")
config = replace(trees, model=replace(trees.model, feedforward=("dense",), hidden_from="tree_path"))

"""The control of UltraFastBERT-1x11: a dense layer of exactly the neurons that a token uses on its path, and no tree.

Paper: none; UltraFastBERT's (arXiv 2311.10770) compares its tree with dense layers of all neurons only. If the tree is not
better than this, the neurons that a token skips are worth nothing.
Command: python train.py --config=path_dense_1x11 --budget=24h
Expected: open. `ufbert compare ultrafastbert_1x11 path_dense_1x11` answers it at a scale and a budget.
Cost: 63,261,697 parameters. The width follows the tree at every scale: D + 1 neurons, 12 at base and 10 at mini.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

tree = load_preset("ultrafastbert_1x11")
config = replace(tree, model=replace(tree.model, feedforward=("dense",), hidden_from="tree_path"))

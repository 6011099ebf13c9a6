"""UltraFastBERT-1x11 whose decisions are random and never learn: what are learnt decisions worth?

Paper: none; a control that UltraFastBERT's (arXiv 2311.10770) leaves out. A token goes right where a random direction, frozen
at its start, says so. The neurons on its path learn as those of a tree do.
Command: python train.py --config=fixed_tree_1x11 --budget=24h
Expected: open. It has no kernels of its own, so compare it after equal tokens, not after equal time.
Cost: 188,824,561 parameters, of which the random directions (2,047 of 768 a layer) are no weights that learn.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

tree = load_preset("ultrafastbert_1x11")
config = replace(tree, model=replace(tree.model, feedforward=("fixed_tree",)))

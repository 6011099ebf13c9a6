"""A two-layer UltraFastBERT, 128 wide, for tests, laptops and first steps.

Paper: none; the architecture of `ultrafastbert_1x11` at the `tiny` scale.
Command: python train.py --config=tiny --scale=base --budget=5m
Expected: a model that visibly learns within minutes on two CPU cores.
Cost: 919,551 parameters.
"""

from ufbert.config.presets import load_preset, scaled

config = scaled(load_preset("ultrafastbert_1x11"), "tiny")

"""Crammed BERT without any feedforward: attention alone, and the norms before it.

Paper: none; the control for every feedforward that is compared.
Command: python train.py --config=no_feedforward --budget=24h
Expected: the loss that a feedforward must beat to be worth anything. It reads more text in the same time than any other.
Cost: 62,942,209 parameters; 0 neurons a token.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

crammed = load_preset("crammed_bert")
config = replace(crammed, model=replace(crammed.model, feedforward=("none",)))

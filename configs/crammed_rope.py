"""Crammed BERT with rotary positions that do rotate, and normalised queries and keys.

Paper: Geiping & Goldstein 2022, arXiv 2212.14034; RoPE from Su et al. 2021, arXiv 2104.09864. The rotary class of the
crammed code returned its input unrotated, so its verdict on RoPE is open; this preset asks again.
Command: python train.py --config=crammed_rope --budget=24h
Expected: open.
Cost: 119,591,936 parameters, as crammed_bert but for the position scalar and two scales of 64 a layer.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

crammed = load_preset("crammed_bert")
config = replace(crammed, model=replace(crammed.model, positions="rotary", qk_norm=True))

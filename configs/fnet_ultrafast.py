"""Fourier mixing and trees of neurons: no dense matrix product left in a block.

Paper: none; FNet's mixer (arXiv 2105.03824) in an UltraFastBERT-1x11 (arXiv 2311.10770), pre-norm, so the transform is
normalised (`ortho`).
Command: python train.py --config=fnet_ultrafast --budget=24h
Expected: open; it exists to ask how little arithmetic a language model needs.
Cost: 125,922,289 parameters, of which a token touches 12 neurons a layer; 1.6 MFLOP per token in inference.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

ultrafast = load_preset("ultrafastbert_1x11")
config = replace(ultrafast, model=replace(ultrafast.model, mixer=("fourier",)))

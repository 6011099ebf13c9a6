"""Switch: every other layer has eight experts of the size of a dense feedforward, and a router that picks one a token.

Paper: Fedus et al. 2021, "Switch Transformers", arXiv 2101.03961; z-loss from ST-MoE, arXiv 2202.08906.
Command: python train.py --config=switch_8e --budget=24h
Expected: lower loss per token than the dense model of the same arithmetic, slower steps; on small GLUE tasks experts
overfit.
Cost: 402,754,561 parameters in all, of which a token uses 138 M; one device, static shapes.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(model=ModelConfig(feedforward=("dense", "switch"), d_hidden=3072, n_experts=8))

"""Crammed BERT: 16 pre-norm layers, GeGLU, no biases, trained in one day on one accelerator.

Paper: Geiping & Goldstein 2022, "Cramming: Training a Language Model on a Single GPU in One Day", arXiv 2212.14034.
Command: python train.py --config=crammed_bert --budget=24h
Expected: the authors report a GLUE average of 80.7 (nine numbers, `crammed` protocol) after one A6000 day.
Cost: 119,589,889 parameters; 0.62 GFLOP per token in training.
The GELU variant of the same paper is `--model.feedforward dense --model.d-hidden 3072`: 138,464,257 parameters.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(model=ModelConfig(feedforward=("glu",), d_hidden=1536))

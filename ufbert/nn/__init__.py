"""Flax Linen modules, and the functions through which the other packages use them.

Outside this package a model is a `ModelConfig` and `params`, a nested dict of float32 arrays with one entry a part:
`encoder`, and its heads (`masked_lm`, `pooler`, `classifier`).
"""

from ufbert.nn.feedforward import tree_backend
from ufbert.nn.heads import pool
from ufbert.nn.layers import Aux, compute_dtype, gpu_kernels
from ufbert.nn.model import (
    Params,
    apply_pooler,
    aux_loss,
    classify,
    count_params,
    encode,
    feedforward_inputs,
    init,
    init_classifier,
    linear_inputs,
    masked_lm_logits,
    masked_lm_rows,
    masked_lm_sums,
    shapes,
)

__all__ = [
    "Aux",
    "Params",
    "apply_pooler",
    "aux_loss",
    "classify",
    "compute_dtype",
    "count_params",
    "encode",
    "feedforward_inputs",
    "gpu_kernels",
    "init",
    "init_classifier",
    "linear_inputs",
    "masked_lm_logits",
    "masked_lm_rows",
    "masked_lm_sums",
    "pool",
    "shapes",
    "tree_backend",
]

"""Arithmetic and memory traffic of a configuration, counted for one token."""

import math

from ufbert.config import FeedForwardKind, ModelConfig, RunConfig, TreeBackend


def forward_flops_per_token(config: ModelConfig, seq_len: int, *, masked_trees: bool, training: bool = True) -> float:
    """Floating-point operations of the encoder for one token of a row; a multiply-add counts two.

    `masked_trees` counts every node of a tree, as the `masked` backend computes; else the nodes on the path. `training`
    counts what layers compute then: all leaves of a leaf tree, and the places of a switch layer's experts, filled or not.
    """
    d, total = config.d_model, 0.0
    for mixer, feedforward in config.layers:
        # A complex FFT of n points takes about 5 n log2 n operations (Cooley & Tukey 1965); FNet's runs over both axes.
        fft = 5 * d * (math.log2(d) + math.log2(max(1, seq_len)))
        total += fft if mixer == "fourier" else 2 * 4 * d * d + 2 * 2 * seq_len * d
        total += 2 * d * _feedforward_products(config, feedforward, masked_trees, training)
    return total


def _feedforward_products(
    config: ModelConfig, kind: FeedForwardKind, masked_trees: bool, training: bool
) -> float | int:
    """Multiply-adds of a feedforward for one token, over d."""
    depth, leaves, f = config.tree_depth, 2**config.tree_depth, config.d_hidden
    nodes = config.nodes_per_tree if masked_trees else depth + 1
    decisions, used = (leaves - 1, leaves) if training else (depth, 1)
    products: dict[FeedForwardKind, float | int] = {
        "dense": 2 * f,
        "glu": 3 * f,
        "tree": 2 * config.n_trees * nodes,
        "leaf_tree": decisions + 2 * (used * config.leaf_width + config.master_leaf),
        "switch": config.n_experts + 2 * f * (config.capacity_factor if training else 1.0),
    }
    return products[kind]


def neurons(config: ModelConfig) -> tuple[int, int]:
    """(neurons that one token uses in inference, neurons there) of the feedforward that has most of them."""
    depth = config.tree_depth
    counts: dict[FeedForwardKind, tuple[int, int]] = {
        "dense": (config.d_hidden, config.d_hidden),
        "glu": (config.d_hidden, config.d_hidden),
        "tree": (config.n_trees * (depth + 1), config.n_trees * config.nodes_per_tree),
        "leaf_tree": (
            depth + config.leaf_width + config.master_leaf,
            2**depth - 1 + 2**depth * config.leaf_width + config.master_leaf,
        ),
        "switch": (config.d_hidden, config.n_experts * config.d_hidden),
    }
    return max((counts[kind] for _, kind in config.layers), key=lambda pair: pair[1])


def train_flops_per_token(run: RunConfig, *, masked_trees: bool) -> float:
    """Forward and backward operations per token of a packed row, the masked-only head included."""
    head = max(run.train.mask_rate) * 2 * run.model.d_model * run.model.vocab_size
    return 3 * (forward_flops_per_token(run.model, run.data.seq_len, masked_trees=masked_trees) + head)


def routing_flops_per_token(run: RunConfig, *, masked_trees: bool) -> float:
    """The part of `train_flops_per_token` that routes, and so is float32 arithmetic whatever the model's type."""
    model, total = run.model, 0.0
    products = {
        "tree": model.n_trees * (model.nodes_per_tree if masked_trees else model.tree_depth + 1),
        "leaf_tree": 2**model.tree_depth - 1,
        "switch": model.n_experts,
    }
    for _, kind in model.layers:
        total += 3 * 2 * model.d_model * products.get(kind, 0)
    return total


def train_bytes_per_token(run: RunConfig, *, trees: TreeBackend, bfloat16: bool) -> float:
    """Bytes that forward and backward move per token of a packed row, about; weights and the optimizer's not counted.

    The factors were fitted to XLA's count of the compiled step on a CPU, of the presets at the scales below `base`, and
    hold to about a fifth. They let a scale be chosen without compiling; `ufbert plan` counts the compiled step instead.
    """
    model, t, d = run.model, run.data.seq_len, run.model.d_model
    short, routed = 0.0, 0.0
    for mixer, kind in model.layers:
        short += 91 * d + (50 * model.n_heads * t + 10 * d if mixer == "attention" else 0)
        short += {
            "dense": 20 * model.d_hidden,
            "glu": 48 * model.d_hidden,
            "tree": 0,
            "leaf_tree": 40 * 2**model.tree_depth * model.leaf_width,
            "switch": 50 * model.d_hidden,
        }[kind]
        if kind == "tree":
            routed += {
                "masked": 45 * model.n_trees * model.nodes_per_tree,
                "gather": d * (60 + 7.4 * model.n_trees * (model.tree_depth + 1)),
                "native": 0,
            }[trees]
    head = 24 * max(run.train.mask_rate) * model.vocab_size
    return 4 * ((short + head) * (0.65 if bfloat16 else 1.0) + routed)

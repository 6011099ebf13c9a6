"""FLOPs of a configuration, the measured speed of this device, and what a budget can buy with them."""

import math
import time
from typing import NamedTuple

from ufbert.config import FeedForwardKind, ModelConfig, RunConfig, Scale
from ufbert.presets import scaled

TOKENS_PER_WEIGHT = 40.0
"""A scale is worth choosing if the budget pays for this many tokens per weight that a token touches."""

UTILISATION = {"cpu": 0.3, "accelerator": 0.35}
"""Share of the measured matrix-product speed that training reaches, tree layers through `gather` on a CPU."""


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


def measured_flops(seconds: float = 0.4) -> float:
    """Matrix-product speed of the default device in FLOP/s: float32 on a CPU, bfloat16 elsewhere."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    n, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    multiply = jax.jit(lambda a: a @ a * (1 / n))
    multiply(a).block_until_ready()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


SCALES: tuple[Scale, ...] = ("tiny", "mini", "small", "base")


class Plan(NamedTuple):
    """A scale for a budget, and what it is expected to do."""

    scale: Scale
    run: RunConfig
    tokens_per_second: float
    tokens: float
    reason: str


def plan(run: RunConfig, scale: Scale, seconds: float, flops: float, *, on_cpu: bool) -> Plan:
    """Resolve `scale` for a budget of `seconds` on a device of `flops` FLOP/s.

    `auto` takes the largest scale that still sees TOKENS_PER_WEIGHT tokens for each weight a token touches, and
    `tiny` if none does.
    """
    rate = flops * UTILISATION["cpu" if on_cpu else "accelerator"]

    def at(name: Scale) -> Plan:
        config = scaled(run, name)
        speed = rate / train_flops_per_token(config, masked_trees=not on_cpu)
        weights = forward_flops_per_token(config.model, 0, masked_trees=not on_cpu) / 2
        ratio = speed * seconds / weights
        reason = (
            f"{flops / 1e9:,.0f} GFLOP/s measured, about {speed:,.0f} tokens/s expected: "
            f"{ratio:,.0f} tokens per weight in use ({TOKENS_PER_WEIGHT:.0f} wanted)"
        )
        return Plan(name, config, speed, speed * seconds, reason)

    if scale != "auto":
        return at(scale)
    plans = [at(name) for name in SCALES]
    fitting = [p for p in plans if p.tokens >= TOKENS_PER_WEIGHT * _weights(p.run, on_cpu)]
    return fitting[-1] if fitting else plans[0]


def _weights(run: RunConfig, on_cpu: bool) -> float:
    return forward_flops_per_token(run.model, 0, masked_trees=not on_cpu) / 2

"""FLOPs and bytes of a configuration, the speed of a device, and what a budget can buy with them."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ufbert.config import FeedForwardKind, ModelConfig, RunConfig, Scale, TreeBackend
from ufbert.devices import DevicePeaks, device_of_kind
from ufbert.presets import scaled

TOKENS_PER_WEIGHT = 40.0
"""A scale is worth choosing if the budget pays for this many tokens per weight that a token touches."""

UTILISATION = 0.4
"""Assumed share of an accelerator's peak that matrix products reach in training. Crammed BERT ran 105 thousand tokens a
second on an RTX A6000 (its issue #45), 42 % of that card's peak at 623 MFLOP a token."""

FLOAT32_UTILISATION = 0.6
"""The same share for true float32 products, which routing uses (an assumption; float32 units wait for memory less)."""

CPU_UTILISATION = 1.1
"""Speed of the whole step over that of a model's parts, measured alone: in the step XLA fuses one part with the next. Four
presets at two scales lay between 1.06 and 1.15."""

TRAFFIC = 0.75
"""Share of the bytes that the CPU's program moves which an accelerator's program moves: its compiler fuses more. Set so
that crammed BERT's published run on an RTX A6000 is not faster than that card's memory allows."""


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


class Speeds(NamedTuple):
    """What a device does in a second of training; utilisation is already in the numbers."""

    products: float
    """FLOP/s of matrix products in the model's type."""
    float32: float
    """FLOP/s of routing's float32 products."""
    bandwidth: float
    """Bytes/s, of the bytes that XLA counts for a CPU program."""
    overlap: bool
    """Whether arithmetic and memory traffic overlap (accelerators), so that the slower decides; else they add up."""
    source: str
    """Where the numbers come from."""

    def seconds(self, flops: float, routing_flops: float, n_bytes: float) -> float:
        """Time of work with this many operations, of which `routing_flops` are float32 ones, and bytes: a roofline
        (Williams et al. 2009)."""
        arithmetic = max(0.0, flops - routing_flops) / self.products + routing_flops / self.float32
        traffic = n_bytes / self.bandwidth
        return max(arithmetic, traffic) if self.overlap else arithmetic + traffic


def peak_speeds(device: DevicePeaks, dtype: str) -> Speeds:
    """The speeds to expect of a device of the table, at the stated utilisation."""
    share = FLOAT32_UTILISATION if device.products(dtype) == device.float32 else UTILISATION
    source = (
        f"{share:.0%} of {device.products(dtype) / 1e12:,.1f} TFLOP/s {dtype}, {FLOAT32_UTILISATION:.0%} of "
        f"{device.float32 / 1e12:,.1f} TFLOP/s float32 for routing, {device.bandwidth / 1e9:,.0f} GB/s ({device.source})"
    )
    speeds = (share * device.products(dtype), FLOAT32_UTILISATION * device.float32, device.bandwidth / TRAFFIC)
    return Speeds(*speeds, overlap=True, source=source)


def device_peak() -> tuple[float, str]:
    """(FLOP/s, source) of the default device, to divide a model's FLOP/s by for its utilisation (MFU).

    For a device of the table (`ufbert.devices`) that is the vendor's dense peak of the type models compute in there; for
    any other, CPUs included, the speed of a large matrix product measured now, in a quarter of a second.
    """
    import jax

    found = device_of_kind(jax.devices()[0].device_kind)
    if found is not None:
        return found.products(found.dtype), found.source
    what = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return measured_flops(), f"a {what} matrix product, measured here"


def measured_flops(seconds: float = 0.2, dtype: str = "auto") -> float:
    """Matrix-product speed of the default device in FLOP/s; the type `auto` is float32 on a CPU, bfloat16 elsewhere."""
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    n, kind = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (n, n), kind if dtype == "auto" else jnp.dtype(dtype))
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=precision) * (1 / n))
    return 2 * n**3 / least_seconds(multiply, a, seconds)


def least_seconds(function: Callable[[Any], Any], argument: Any, seconds: float) -> float:
    """The shortest time of a call of a jitted function, of those that fit into `seconds` after one that compiles."""
    function(argument).block_until_ready()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        function(argument).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


SCALES: tuple[Scale, ...] = ("tiny", "mini", "small", "base")


class Plan(NamedTuple):
    """A scale for a budget, and what it is expected to do."""

    scale: Scale
    run: RunConfig
    tokens_per_second: float
    tokens: float
    reason: str


def plan(run: RunConfig, scale: Scale, seconds: float, speeds: Speeds, *, trees: TreeBackend, bfloat16: bool) -> Plan:
    """Resolve `scale` for a budget of `seconds` on a device of these speeds, from analytic counts.

    `auto` takes the largest scale that still sees TOKENS_PER_WEIGHT tokens for each weight a token touches, and
    `tiny` if none does.
    """

    def at(name: Scale) -> Plan:
        config = scaled(run, name)
        flops = train_flops_per_token(config, masked_trees=trees == "masked")
        routing = routing_flops_per_token(config, masked_trees=trees == "masked")
        moved = train_bytes_per_token(config, trees=trees, bfloat16=bfloat16)
        speed = 1 / speeds.seconds(flops, routing, moved)
        ratio = speed * seconds / _weights(config, trees)
        reason = (
            f"about {speed:,.0f} tokens/s expected ({speeds.source}): "
            f"{ratio:,.0f} tokens per weight in use ({TOKENS_PER_WEIGHT:.0f} wanted)"
        )
        return Plan(name, config, speed, speed * seconds, reason)

    if scale != "auto":
        return at(scale)
    plans = [at(name) for name in SCALES]
    fitting = [p for p in plans if p.tokens >= TOKENS_PER_WEIGHT * _weights(p.run, trees)]
    return fitting[-1] if fitting else plans[0]


def _weights(run: RunConfig, trees: TreeBackend) -> float:
    return forward_flops_per_token(run.model, 0, masked_trees=trees == "masked") / 2

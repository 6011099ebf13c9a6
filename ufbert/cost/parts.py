"""The speed of this machine on the parts of a model: its matrix products, and everything else.

A CPU runs a compiled step one instruction after another, so its time is operations over the speed of products plus bytes
over the speed of the rest. Both speeds depend on the shapes (a product of width 128 runs at two thirds of the speed of one
of width 512), so they are measured on the model's own parts, alone and on random numbers, never on a training step.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ufbert.config import ModelConfig, RunConfig
from ufbert.cost.devices import device_of_kind
from ufbert.cost.flops import predicted_share
from ufbert.cost.reached import reached
from ufbert.cost.speeds import (
    CPU_UTILISATION,
    Speeds,
    measured_flops,
    peak_speeds,
)
from ufbert.nn.registry import FEEDFORWARDS, MIXERS, Layer
from ufbert.ops.losses import cross_entropy
from ufbert.runtime.console import phase

MAX_TOKENS = 4096
"""Parts are measured on at most this many tokens; more would take long and not run at another speed."""


class _Part(NamedTuple):
    """A compiled part of the model, forward and backward, with XLA's counts of it."""

    call: Callable[[], Any]
    flops: float
    bytes: float
    times: float
    """Times that a training step has it."""
    seconds: list[float]
    """Seconds that calls took."""


class PartSpeeds:
    """The parts of one model, to be measured as often as one likes: `measure` adds a round, `speeds` sums up."""

    def __init__(self, run: RunConfig) -> None:
        model, seq_len = run.model, run.data.seq_len
        rows = max(1, min(run.train.micro_rows, MAX_TOKENS // seq_len))
        layers = [
            (layer, model.of_layer(i))
            for i, (mixer, feedforward) in enumerate(model.layers)
            for layer in (MIXERS[mixer], FEEDFORWARDS[feedforward])
        ]
        self._products = [_product(rows * seq_len, model.d_model, *part) for part in product_widths(run).items()]
        norms = _part(_derivative(_norm), (_random(rows * seq_len, model.d_model),), 2.0 * model.n_layers)
        self._rest = [norms, _loss_part(run, rows)]
        for (layer, own), n in Counter(layers).items():
            self._rest.append(_layer_part(layer, own, rows, seq_len, float(n)))

    def measure(self, calls: int = 3) -> None:
        """Time every part a few times."""
        for part in (*self._products, *self._rest):
            for _ in range(calls):
                began = time.perf_counter()
                jax.block_until_ready(part.call())
                part.seconds.append(time.perf_counter() - began)

    def speeds(self) -> Speeds:
        """Medians of all rounds. The speed of the rest is its bytes over its time without that of its own products."""
        work = sum(p.times * p.flops for p in self._products)
        products = work / sum(p.times * statistics.median(p.seconds) for p in self._products)
        taken = sum(
            p.times * max(0.05 * (s := statistics.median(p.seconds)), s - p.flops / products) for p in self._rest
        )
        moved = sum(p.times * p.bytes for p in self._rest)
        source = (
            f"{CPU_UTILISATION:.0%} of what this model's parts reach alone, measured: {products / 1e9:,.0f} GFLOP/s in its "
            f"matrix products and {moved / taken / 1e9:,.1f} GB/s in the rest"
        )
        share = CPU_UTILISATION
        return Speeds(share * products, share * products, share * moved / taken, source=source)


def product_widths(run: RunConfig) -> dict[int, float]:
    """Return the widths of a step's large products, and how many of each there are for a token, the head's as so many square
    ones: a narrow feedforward's run at a fraction of the speed of attention's, but are few."""
    model = run.model
    widths = Counter({model.d_model: predicted_share(run.train) * model.vocab_size / model.d_model})
    for i, (mixer, feedforward) in enumerate(model.layers):
        widths[model.d_model] += 4 * (mixer == "attention")
        if "d_hidden" in FEEDFORWARDS[feedforward].fields and (width := model.of_layer(i).d_hidden):
            widths[width] += 3 if feedforward == "glu" else 2
    return {width: float(times) for width, times in widths.items()}


def _product(tokens: int, d_model: int, width: int, times: float) -> _Part:
    """Compile a product with a matrix (d_model, width), forward and backward."""
    x, weights, g = _random(tokens, d_model), _random(d_model, width), _random(tokens, width)
    return _part(lambda x, w, g: (x @ w, x.T @ g, g @ w.T), (x, weights, g), times)


@phase("measuring this device")
def local_speeds(run: RunConfig, seconds: float = 0.5) -> Speeds:
    """The speeds of the default device: of a CPU those of the parts of `run`, measured in about `seconds` beside compiling;
    of an accelerator those of the table, or of a large product and a large sum if it is not there."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        parts, began = PartSpeeds(run), time.perf_counter()
        parts.measure(2)
        while time.perf_counter() - began < seconds:
            parts.measure(1)
        return parts.speeds()
    found = device_of_kind(device.device_kind)
    return peak_speeds(found, found.dtype) if found else _measured_accelerator(device.device_kind)


def _measured_accelerator(kind: str) -> Speeds:
    products, float32 = measured_flops(), measured_flops(dtype="float32")
    x = jnp.ones((1 << 26,), jnp.float32)
    add = _part(lambda x: x + 1.0, (x,), 1.0)
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(add.call())
        add.seconds.append(time.perf_counter() - began)
    bandwidth = 2 * x.nbytes / min(add.seconds)
    shares = reached("")
    source = (
        f"{kind} is not in the table of peaks; measured here: {shares.products:.0%} of {products / 1e12:,.1f} TFLOP/s, "
        f"{shares.float32:.0%} of {float32 / 1e12:,.1f} TFLOP/s float32, {bandwidth / 1e9:,.0f} GB/s"
    )
    return Speeds(shares.products * products, shares.float32 * float32, bandwidth / shares.traffic, source)


def _random(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape)


def _part(function: Callable[..., Any], arguments: tuple[Any, ...], times: float) -> _Part:
    compiled = jax.jit(function).lower(*arguments).compile()
    cost = compiled.cost_analysis() or {}
    jax.block_until_ready(compiled(*arguments))
    return _Part(
        lambda: compiled(*arguments), float(cost.get("flops", 0.0)), float(cost["bytes accessed"]), times, seconds=[]
    )


def _derivative(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(value, gradients) of the function's output times itself: a stand-in for what comes back from above."""

    def scalar(*arguments: jax.Array) -> jax.Array:
        y = function(*arguments)
        return jnp.sum(y * jax.lax.stop_gradient(y))

    def both(*arguments: jax.Array) -> Any:
        return jax.value_and_grad(scalar, argnums=tuple(range(len(arguments))))(*arguments)

    return both


def _norm(x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)


def _loss_part(run: RunConfig, rows: int) -> _Part:
    n_hidden = max(1, round(predicted_share(run.train) * run.data.seq_len))
    logits = _random(rows, n_hidden, run.model.vocab_size)
    labels, weights = jnp.zeros((rows, n_hidden), jnp.int32), jnp.ones((rows, n_hidden))
    return _part(jax.value_and_grad(lambda logits: cross_entropy(logits, labels, weights).loss), (logits,), 1.0)


def _layer_part(layer: Layer, model: ModelConfig, rows: int, seq_len: int, times: float) -> _Part:
    """Compile what a layer does besides its large products, such as the walk down a tree or the nonlinearity."""
    function, shapes = layer.timed_part(model, rows, seq_len)
    return _part(_derivative(function), tuple(_random(*shape) for shape in shapes), times)

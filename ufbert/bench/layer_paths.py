"""The contestants of `ufbert bench layer` that are written in jax: the tree layers' paths and dense layers.

Every one is a function of rows and of a layer's weights, which arrive as arguments so that XLA does not fold them in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufbert.bench.layer_job import Stored
from ufbert.ops import fff, native
from ufbert.ops.dense import gelu

Layer = Callable[[Float[Array, "b d"], Any], Float[Array, "b d"]]
"""(rows, weights of a layer) -> rows + the layer of rows."""

Tree = tuple[Any, Float[Array, "m n"], Any]
"""w_in, bias, w_out."""


def weight_types(path: str) -> tuple[str, str]:
    """Types of w_in and w_out on a path of ours: float32, bfloat16 or int8."""
    narrow = "bfloat16" if "bf16" in path else "int8" if "int8" in path else "float32"
    return ("float32" if path.endswith("-exact") else narrow), narrow


def narrowed(weights: Any, dtype: str) -> Any:
    """Float32 weights as a kernel takes them."""
    if dtype == "int8":
        return native.quantize(jnp.asarray(weights))
    return jnp.asarray(weights, dtype)


def as_stored(weights: Any) -> Stored:
    """A kernel's weights for the float64 evaluation."""
    if isinstance(weights, native.Quantized):
        return Stored(np.asarray(weights.rows), np.asarray(weights.scale))
    return Stored(np.asarray(weights))


def tree_layers(arrays: dict[str, np.ndarray], path: str) -> list[Tree]:
    """The weights of every layer as a path of ours keeps them."""
    in_type, out_type = weight_types(path)
    parts = (arrays[name] for name in ("tree_in", "tree_bias", "tree_out"))
    return [
        (narrowed(w_in, in_type), jnp.asarray(bias), narrowed(w_out, out_type))
        for w_in, bias, w_out in zip(*parts, strict=True)
    ]


def gather_layer(x: Float[Array, "b d"], weights: Tree) -> Float[Array, "b d"]:
    """Rows + the layer of rows, by the gather path."""
    w_in, bias, w_out = weights
    return x + fff.fast_feedforward(x, w_in, bias, w_out, backend="gather")


def stacked(layers: list[Tree]) -> tuple[Any, Float[Array, "lm n"], Any]:
    """The weights of all layers, one after the other in one array of each kind."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)


def native_layer(threads: int, layers: int) -> Callable[..., Array]:
    """(rows, stacked weights, i) -> rows + layer i of rows, by the kernels."""

    def layer(x: Array, weights: Tree, i: int) -> Array:
        w_in, bias, w_out = weights
        return native.tree_forward(x, w_in, bias, w_out, residual=x, layer=i, layers=layers, threads=threads)

    return layer


def tree_nodes(path: str, threads: int) -> Callable[[Float[Array, "b d"], Tree], Array]:
    """(rows, weights of a layer) -> the nodes that a path of ours visits, (b, m, s)."""

    def gather(x: Array, weights: Tree) -> Array:
        return fff.path_nodes(x, weights[0], weights[1])[0]

    def through_kernel(x: Array, weights: Tree) -> Array:
        w_in, bias, w_out = weights
        return native.tree_forward_saving(x, w_in, bias, w_out, threads=threads)[1]

    return gather if path == "gather" else through_kernel


def dense_layers(arrays: dict[str, np.ndarray], dtype: str) -> list[tuple[Array, Array, Array]]:
    """Weights w_in (d, f), bias and w_out (f, d) of every dense layer."""
    parts = (arrays[name] for name in ("dense_in", "dense_bias", "dense_out"))
    return [
        (jnp.asarray(np.ascontiguousarray(w_in.T), dtype), jnp.asarray(bias), jnp.asarray(w_out, dtype))
        for w_in, bias, w_out in zip(*parts, strict=True)
    ]


def dense_layer(dtype: str) -> Layer:
    """The dense rival with products of a type. Float32 sums between them measured fastest with bfloat16, too."""

    def layer(x: Array, weights: tuple[Array, Array, Array]) -> Array:
        w_in, bias, w_out = weights
        hidden = jnp.dot(x.astype(dtype), w_in, preferred_element_type=jnp.float32) + bias[None]
        return x + jnp.dot(gelu(hidden).astype(dtype), w_out, preferred_element_type=jnp.float32)

    return layer


def chain(layer: Layer) -> Callable[[Float[Array, "b d"], list[Any]], Float[Array, "b d"]]:
    """All layers in one call, compiled."""

    def run(x: Array, layers: list[Any]) -> Array:
        for weights in layers:
            x = layer(x, weights)
        return x

    return jax.jit(run)

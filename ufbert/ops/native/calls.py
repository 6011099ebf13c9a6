"""C++ kernels for CPUs: tree layers and the rest of an encoder, called inside jitted functions through `jax.ffi`.

`kernels.h` says what they compute, `trees.cpp` and `encoder.cpp` how; a wheel brings them compiled, or they are compiled on
first use (`build`). One source serves AVX-512 (with and without its instructions for bfloat16 and int8), AVX2 and any other
processor. The best that the processor supports is used, or the one that the environment variable UFBERT_ISA names (avx512bf16,
avx512, avx2, plain).
Rows of a large batch are grouped by subtree and shared among this process's helper threads. A row's answer depends neither
on the batch nor on the number of threads.

Weights may be bfloat16, or int8 with one scale a node (`quantize`); routing is float32 arithmetic on the weights as stored.
On every thread and with every instruction set, numbers nearer to zero than 2^-126 count as zero, as they do in XLA.
"""

import ctypes
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from ufbert.ops.native.build import CannotBuild, load
from ufbert.runtime.memory import aligned

TYPES = ("float32", "bfloat16", "int8")
"""Types of weights, in the order of the kernels' enum."""
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "symmetric_gelu")
"""In the order of the kernels' enum."""

_library = functools.cache(load)


@functools.cache
def unavailable() -> str:
    """Return why this process cannot use the kernels, or an empty string. Compiles them if nobody has."""
    if jax.default_backend() != "cpu":
        return f"they are for CPUs, and this process computes on a {jax.default_backend()}"
    try:
        _register(load())
    except CannotBuild as error:
        return str(error)
    return ""


def instruction_set() -> str:
    """Return the kernels in use: avx512bf16, avx512, avx2 or plain. Raises CannotBuild if there are none."""
    return _library().ufbert_isa().decode()


def _register(library: ctypes.CDLL) -> None:
    for name in (
        "forward",
        "forward_saving",
        "backward",
        "leaf_forward",
        "routed_forward",
        "attention",
        "norm",
        "add",
        "linear",
        "feed_forward",
    ):
        symbol = getattr(library, f"ufbert_xla_{name}")
        jax.ffi.register_ffi_target(f"ufbert_{name}", jax.ffi.pycapsule(symbol), platform="cpu")


class Quantized(NamedTuple):
    """int8 rows, each with the float32 factor to multiply it by."""

    rows: Num[Array, "*rows d"]
    scale: Float[Array, "*rows"]


def quantize(weights: Float[Array, "*rows d"]) -> Quantized:
    """Round each row to 255 even steps between minus and plus its largest absolute value."""
    # The floor keeps a row of zeros from a division by zero.
    scale = jnp.maximum(jnp.abs(weights).max(axis=-1), jnp.finfo(jnp.float32).tiny * 127) / 127
    return Quantized(jnp.round(weights / scale[..., None]).astype(jnp.int8), scale)


def restore(weights: "Weights") -> Float[Array, "*rows d"]:
    """Return weights of any type as float32."""
    if isinstance(weights, Quantized):
        return weights.rows.astype(jnp.float32) * weights.scale[..., None]
    return weights.astype(jnp.float32)


Weights = Any
"""Float32 or bfloat16 arrays, or `Quantized`."""


def _parts(weights: Weights) -> tuple[Array, Array]:
    return weights if isinstance(weights, Quantized) else (weights, jnp.zeros((0,), jnp.float32))


_TREES = "x w_in w_in_scale bias w_out w_out_scale residual"
_ARGUMENTS = {
    "forward": _TREES,
    "forward_saving": _TREES,
    "backward": "x w_in w_out nodes z g",
    "leaf_forward": "x node_w node_b w_in w_in_scale b_in w_out w_out_scale b_out",
    "routed_forward": "x node_w node_b w_in w_in_scale b_in w_out w_out_scale b_out",
    "linear": "x packed scale bias input",
    "feed_forward": "x packed scale bias input packed scale bias input",
    "norm": "x scale bias",
    "add": "x y",
    "attention": "qkv segment_ids",
}
"""Each kernel's arrays, in order."""

_LONGEST = np.iinfo(np.int32).max
"""The kernels count rows, nodes and columns in 32 bits."""


def _check(name: str, args: tuple[Array, ...]) -> None:
    """Raise ValueError for an array with too long a side, and TypeError for one of a type that the kernel does not take.

    XLA's own message names neither the kernel nor the argument.
    """
    for argument, array in zip(_ARGUMENTS[name].split(), args, strict=True):
        dtype = jax.dtypes.canonicalize_dtype(array.dtype).name
        wanted: tuple[str, ...] = ("int32",) if argument in ("nodes", "segment_ids") else ("float32",)
        if argument in ("w_in", "w_out", "packed") and name != "backward":
            wanted = TYPES
        if max(array.shape, default=0) > _LONGEST:
            raise ValueError(f"{argument} of native {name} is {array.shape}: no side may be over 2^31 - 1")
        if dtype not in wanted:
            raise TypeError(
                f"native {name} takes {' or '.join(wanted)} as {argument}, not {dtype}: cast it with .astype first"
            )


def _call(name: str, out: Any, *args: Array, threads: int, activation: str = "", **numbers: int | np.generic) -> Any:
    """Call a kernel and return its result. Raises CannotBuild if there are no kernels, and what `_check` raises."""
    if unavailable():
        raise CannotBuild(unavailable())
    _check(name, args)
    numbers["threads"] = threads
    if activation:
        numbers["activation"] = np.int32(ACTIVATIONS.index(activation))
    call = jax.ffi.ffi_call(f"ufbert_{name}", out, vmap_method="sequential")
    return call(*args, **{k: np.int64(v) if type(v) is int else v for k, v in numbers.items()})


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _inputs(x: Array, w_in: Weights, bias: Array, w_out: Weights, residual: Array | None) -> tuple[Array, ...]:
    residual = jnp.zeros((0, x.shape[1]), jnp.float32) if residual is None else residual
    return x, *_parts(w_in), bias, *_parts(w_out), residual


def tree_forward(
    x: Float[Array, "b d"],
    w_in: Weights,
    bias: Float[Array, "m n"],
    w_out: Weights,
    *,
    activation: str = "gelu",
    residual: Float[Array, "b d"] | None = None,
    layer: int = 0,
    layers: int = 1,
    threads: int = 0,
) -> Float[Array, "b d"]:
    """Compute `ufbert.ops.fff.fast_feedforward` plus an optional `residual`, on at most `threads` threads (0: all).

    `w_in` and `w_out`, (m, n, d), are of one type, or `w_in` is float32 and `w_out` narrower (exact routing). The arrays may
    hold the trees of all of a model's `layers`, one layer after the other; `layer` is the number of this one. That spares
    arguments: jax takes half a microsecond for each, and a row through one layer takes ten in all.
    """
    args = _inputs(x, w_in, bias, w_out, residual)
    return _call("forward", _shape(*x.shape), *args, activation=activation, threads=threads, layer=layer, layers=layers)


def tree_forward_saving(
    x: Float[Array, "b d"],
    w_in: Weights,
    bias: Float[Array, "m n"],
    w_out: Weights,
    *,
    activation: str = "gelu",
    threads: int = 0,
) -> tuple[Float[Array, "b d"], Int[Array, "b m s"], Float[Array, "b m s"]]:
    """Compute the output, the nodes of every path, root first, and their logits."""
    path = (x.shape[0], bias.shape[0], (bias.shape[1] + 1).bit_length() - 1)
    out = (_shape(*x.shape), _shape(*path, dtype=jnp.int32), _shape(*path))
    args = _inputs(x, w_in, bias, w_out, None)
    return tuple(_call("forward_saving", out, *args, activation=activation, threads=threads))


def tree_backward(
    x: Float[Array, "b d"],
    w_in: Float[Array, "m n d"],
    w_out: Float[Array, "m n d"],
    nodes: Int[Array, "b m s"],
    z: Float[Array, "b m s"],
    g: Float[Array, "b d"],
    *,
    activation: str = "gelu",
    threads: int = 0,
) -> tuple[Float[Array, "b d"], Float[Array, "m n d"], Float[Array, "m n"], Float[Array, "m n d"]]:
    """Compute the gradients of x, w_in, bias and w_out from that of the output, along the paths of `tree_forward_saving`.

    Gradients of nodes that no row visited are exactly zero.
    """
    out = (_shape(*x.shape), _shape(*w_in.shape), _shape(*w_in.shape[:2]), _shape(*w_out.shape))
    return tuple(_call("backward", out, x, w_in, w_out, nodes, z, g, activation=activation, threads=threads))


def leaf_forward(
    x: Float[Array, "b d"],
    node_w: Float[Array, "n d"],
    node_b: Float[Array, " n"],
    w_in: Weights,
    b_in: Float[Array, "g w"],
    w_out: Weights,
    b_out: Float[Array, "g o"],
    *,
    activation: str = "gelu",
    threads: int = 0,
) -> tuple[Float[Array, "b o"], Int[Array, " b"]]:
    """Compute `ufbert.ops.leaf_fff.descend`: the output of each row's leaf, and the leaf's number.

    `w_in` (g, d, w) and `w_out` (g, w, o) are of one type; with int8 the scales, (g, w) each, belong to the hidden units.
    """
    out = (_shape(x.shape[0], b_out.shape[1]), _shape(x.shape[0], dtype=jnp.int32))
    args = (x, node_w, node_b, *_parts(w_in), b_in, *_parts(w_out), b_out)
    return tuple(_call("leaf_forward", out, *args, activation=activation, threads=threads))


def routed_forward(
    x: Float[Array, "b d"],
    node_w: Float[Array, "m n d"],
    node_b: Float[Array, "m n"],
    w_in: Weights,
    w_out: Weights,
    b_in: Float[Array, "m g w"] | None = None,
    b_out: Float[Array, "m g d"] | None = None,
    *,
    gated: bool,
    activation: str = "gelu",
    threads: int = 0,
) -> Float[Array, "b d"]:
    """Compute the sum over trees of each row's leaf (`ufbert.ops.routed_tree`), times its gate if `gated`.

    `w_in` and `w_out`, (m, g, w, d), are of one type: a neuron is one row of each.
    """
    none = jnp.zeros((0,), jnp.float32)
    b_in, b_out = none if b_in is None else b_in, none if b_out is None else b_out
    args = (x, node_w, node_b, *_parts(w_in), b_in, *_parts(w_out), b_out)
    return _call(
        "routed_forward", _shape(*x.shape), *args, activation=activation, threads=threads, gated=np.bool_(gated)
    )


class Packed(NamedTuple):
    """A linear layer's weights (float32, bfloat16 or int8) in the order in which this processor's kernels read them. Of use to
    this process only."""

    weights: Num[Array, " size"]
    scale: Float[Array, " scales"]
    """With int8, one factor a column; else empty."""
    input: Float[Array, " rounding"]
    """Step and zero by which rows are rounded, with int8: to step * (n - zero), n from 0 to 255. Empty if each row has a step
    of its own."""


def _room(d: int, f: int, dtype: str) -> np.ndarray:
    """Return memory for packed weights. Raises CannotBuild if there are no kernels, and ValueError for too long a side."""
    if unavailable():
        raise CannotBuild(unavailable())
    if max(d, f) > _LONGEST:
        raise ValueError(f"weights to pack are ({d}, {f}): no side may be over 2^31 - 1")
    size = _library().ufbert_packed_size
    size.argtypes, size.restype = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int32), ctypes.c_int64
    return aligned(size(d, f, TYPES.index(dtype)), jnp.dtype(dtype))


def pack(weights: Float[np.ndarray, "d f"], dtype: str) -> Packed:
    """Pack the weights of a linear layer as `dtype`. Raises CannotBuild if there are no kernels, and ValueError for weights
    with too long a side."""
    (d, f), packed = weights.shape, _room(*weights.shape, dtype)
    scale = aligned(4 * f if dtype == "int8" else 0, np.dtype(np.float32))
    source = np.ascontiguousarray(weights, np.float32)
    kernel, kind = _library().ufbert_pack, TYPES.index(dtype)
    kernel.argtypes = (ctypes.c_int64, ctypes.c_int64, *3 * (ctypes.c_void_p,), ctypes.c_int32, ctypes.c_int64)
    if kernel(d, f, source.ctypes.data, packed.ctypes.data, scale.ctypes.data, kind, 0):
        raise MemoryError(f"there is not enough memory to pack weights of {d} rows and {f} columns")
    return Packed(jnp.asarray(packed), jnp.asarray(scale), jnp.zeros((0,), jnp.float32))


def pack_rounded(
    rounded: Int[np.ndarray, "d f"], scale: Float[np.ndarray, " f"], input: Float[np.ndarray, " rounding"]
) -> Packed:
    """Pack int8 weights of a linear layer with one factor a column, and the rounding of its rows (`Packed.input`).

    Raises as `pack` does.
    """
    (d, f), packed = rounded.shape, _room(*rounded.shape, "int8")
    source, kernel = np.ascontiguousarray(rounded, np.int8), _library().ufbert_pack_rounded
    kernel.argtypes = (ctypes.c_int64, ctypes.c_int64, *2 * (ctypes.c_void_p,), ctypes.c_int64)
    if kernel(d, f, source.ctypes.data, packed.ctypes.data, 0):
        raise MemoryError(f"there is not enough memory to pack weights of {d} rows and {f} columns")
    return Packed(jnp.asarray(packed), jnp.asarray(scale, jnp.float32), jnp.asarray(input, jnp.float32))


def linear(
    x: Float[Array, "b d"], packed: Packed, bias: Float[Array, " f"] | None, width: int, *, threads: int = 0
) -> Float[Array, "b f"]:
    """Compute x w + bias. int8 weights also round every row, by `packed.input` or to 255 even steps of its own; bfloat16
    weights round it where the processor multiplies such numbers."""
    bias = jnp.zeros((0,), jnp.float32) if bias is None else bias
    args = (x, packed.weights, packed.scale, bias, packed.input)
    return _call("linear", _shape(x.shape[0], width), *args, threads=threads)


def feed_forward(
    x: Float[Array, "b d"],
    packed_in: Packed,
    bias_in: Float[Array, " f"] | None,
    packed_out: Packed,
    bias_out: Float[Array, " o"] | None,
    widths: tuple[int, int],
    *,
    activation: str = "gelu",
    threads: int = 0,
) -> Float[Array, "b o"]:
    """Compute activation(x w_in + bias_in) w_out + bias_out, as two calls of `linear` would; `widths` are f and o.

    If the input of the second layer is rounded by a given step, its rows are never written in float32.
    """
    nothing, (f, o) = jnp.zeros((0,), jnp.float32), widths
    layers = ((packed_in, bias_in), (packed_out, bias_out))
    args = [
        part
        for packed, bias in layers
        for part in (packed.weights, packed.scale, nothing if bias is None else bias, packed.input)
    ]
    return _call("feed_forward", _shape(x.shape[0], o), x, *args, activation=activation, threads=threads, width=f)


def layer_norm(
    x: Float[Array, "b d"], scale: Float[Array, " d"], bias: Float[Array, " d"] | None, eps: float, *, threads: int = 0
) -> Float[Array, "b d"]:
    """Compute (x - mean) / sqrt(variance + eps) * scale + bias of each row."""
    bias = jnp.zeros((0,), jnp.float32) if bias is None else bias
    return _call("norm", _shape(*x.shape), x, scale, bias, eps=np.float32(eps), threads=threads)


def add(x: Float[Array, "*rows"], y: Float[Array, "*rows"], *, threads: int = 0) -> Float[Array, "*rows"]:
    """Compute x + y. XLA would use threads of its own, which compete for the cores with the kernels' helpers."""
    return _call("add", _shape(*x.shape), x, y, threads=threads)


def attention(
    qkv: Float[Array, "b t 3 h k"],
    segment_ids: Int[Array, "b t"] | None = None,
    *,
    padding_sees: bool = False,
    narrow: bool = False,
    threads: int = 0,
) -> Float[Array, "b t h k"]:
    """Compute `ufbert.ops.mixing.attention` among the tokens of each document, without forming its mask.

    The documents of a row lie one after the other. Padding (segment 0) gets zeros; with `padding_sees` it attends to every
    real token, as it does there. With `narrow` its products are those of bfloat16 numbers, where the processor has such.
    """
    segments = jnp.zeros((0,), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    out = _shape(*qkv.shape[:2], *qkv.shape[3:])
    sees, is_narrow = np.bool_(padding_sees), np.bool_(narrow)
    return _call("attention", out, qkv, segments, threads=threads, padding_sees=sees, narrow=is_narrow)

"""The product of a GLU's two halves, which lie side by side, and its gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ufbert.ops.gpu import tiles

FORWARD_WARPS, BACKWARD_WARPS = 4, 8
TILE = 4096
"""Numbers that a program holds of one array."""


def fits(rows: int, f: int) -> bool:
    """Tell whether the kernels take so many rows of twice f neurons."""
    return _columns(f) >= 16 and rows % (TILE // _columns(f)) == 0


def _columns(f: int) -> int:
    return min(512, tiles.piece(f))


@jax.custom_vjp
def gated_gelu(x: Float[Array, "r 2 f"]) -> Float[Array, "r f"]:
    """Compute gelu(x[:, 0]) * x[:, 1] in float32, with the exact GELU; the result has the type of x.

    Sizes must be such that `fits`.
    """
    r, _, f = x.shape
    return _call(_forward_kernel, [x], jax.ShapeDtypeStruct((r, f), x.dtype), tiles.interpreted())


def _forward(x: Array) -> tuple[Array, Array]:
    return gated_gelu(x), x


def _backward(x: Array, dy: Array) -> tuple[Array]:
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (_call(_backward_kernel, [x, dy], out, tiles.interpreted()),)


gated_gelu.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=(0, 2, 3))
def _call(kernel: Any, arrays: list[Array], out: jax.ShapeDtypeStruct, interpret: bool) -> Array:
    r, _, f = arrays[0].shape
    columns = _columns(f)
    rows = TILE // columns
    both = pl.BlockSpec((rows, 2, columns), lambda i, j: (i, 0, j))
    single = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    return pl.pallas_call(
        kernel,
        grid=(r // rows, f // columns),
        in_specs=[both if array.ndim == 3 else single for array in arrays],
        out_specs=both if len(out.shape) == 3 else single,
        out_shape=out,
        compiler_params=tiles.triton(FORWARD_WARPS if kernel is _forward_kernel else BACKWARD_WARPS),
        interpret=interpret,
        name="gate_forward" if kernel is _forward_kernel else "gate_backward",
    )(*arrays)


def _forward_kernel(x_ref: Any, y_ref: Any) -> None:
    gate, value = x_ref[:, 0, :].astype(jnp.float32), x_ref[:, 1, :].astype(jnp.float32)
    y_ref[...] = (gate * normal_share(gate)[0] * value).astype(y_ref.dtype)


def _backward_kernel(x_ref: Any, dy_ref: Any, dx_ref: Any) -> None:
    gate, value, dy = (part.astype(jnp.float32) for part in (x_ref[:, 0, :], x_ref[:, 1, :], dy_ref[...]))
    share, density = normal_share(gate)
    dx_ref[:, 0, :] = (dy * value * (share + gate * density)).astype(dx_ref.dtype)
    dx_ref[:, 1, :] = (dy * gate * share).astype(dx_ref.dtype)


def normal_share(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return the normal distribution's share below x, within 1e-7, and its density: gelu(x) is x times that share.

    Formula 7.1.26 of Abramowitz and Stegun (1964). It needs the exponential that the density needs anyway; XLA's own erfc
    costs a hundred operations, as much time as the memory traffic.
    """
    z = jnp.abs(x) * 2.0**-0.5
    bell = jnp.exp2(-z * z * 1.4426950408889634)
    t = 1.0 / (1.0 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    above = 0.5 * poly * bell
    return jnp.where(x < 0, above, 1.0 - above), bell * 0.3989422804014327

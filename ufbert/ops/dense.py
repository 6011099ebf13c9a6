"""The parts of dense layers: products, activations, dropout, and many small networks at once."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int, Key

Activation = Callable[[Array], Array]

gelu: Activation = partial(jax.nn.gelu, approximate=False)
"""The exact (erf) GELU of BERT and the tree layers; the tanh form differs by up to 5e-4."""


def symmetric_gelu(z: Array) -> Array:
    """Compute gelu(z) + gelu(-z) = z erf(z / sqrt 2): even, close to |z|, smooth at zero."""
    return z * jax.lax.erf(z * 2.0**-0.5)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "symmetric_gelu": symmetric_gelu,
}


def activation_name(activation: Activation) -> str:
    """Return the name that the native kernels know an activation by. Raises ValueError if it is not in ACTIVATIONS."""
    for name, known in ACTIVATIONS.items():
        if known is activation:
            return name
    raise ValueError(f"the native kernels know the activations {', '.join(ACTIVATIONS)}, not {activation}")


def settled(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x. XLA on a CPU then computes it once, instead of again inside each of its uses."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def rows_product(x: Float[Array, "r a"], y: Float[Array, "r b"], dtype: jnp.dtype) -> Float[Array, "a b"]:
    """Compute x^T y, the sum over rows that is the gradient of a matrix."""

    def plain(x: Array, y: Array) -> Array:
        return jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=dtype)

    def on_cpu(x: Array, y: Array) -> Array:
        # XLA on a CPU turns a matrix over within the product: slowly if it is the wider one, and it knows no such product of
        # bfloat16. So the narrower one is turned over before.
        if x.shape[1] > y.shape[1]:
            return _row_major(on_cpu(y, x)).T
        return jax.lax.dot_general(
            _row_major(jax.lax.optimization_barrier(x).T), y, (((1,), (0,)), ((), ())), preferred_element_type=dtype
        )

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=plain)


def _row_major(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_vjp
def product(x: Float[Array, "*rows d"], w: Float[Array, "d f"]) -> Float[Array, "*rows f"]:
    """Compute x w, in the type of its arguments, with gradients that a CPU computes well."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, w), (x, w)


def _product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    # Unsettled, what leads to dy (a GELU's derivative, say) would be fused into each of the two products and so be computed
    # twice, the second time against the grain of memory. That was 40 % of a training step.
    dy = settled(dy)
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    return dx, rows_product(x.reshape(-1, w.shape[0]), dy.reshape(-1, w.shape[1]), w.dtype)


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def token_logits(x: Float[Array, "*rows d"], embedding: Float[Array, "v d"]) -> Float[Array, "*rows v"]:
    """Compute x embedding^T in float32, with gradients that a CPU computes well."""
    return jax.lax.dot_general(x, embedding, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _token_logits_forward(x: Array, embedding: Array) -> tuple[Array, tuple[Array, Array]]:
    return token_logits(x, embedding), (x, embedding)


def _token_logits_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, embedding = saved
    dy = settled(dy.astype(x.dtype))
    dx = jax.lax.dot_general(dy, embedding, (((dy.ndim - 1,), (0,)), ((), ())))
    return dx, rows_product(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), embedding.dtype)


token_logits.defvjp(_token_logits_forward, _token_logits_backward)


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Set a share `rate` of the entries of x to 0 and divide the others by 1 - rate. Without a key, return x itself."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(keep_mask(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0).astype(x.dtype)


def keep_mask(key: Key[Array, ""], share: float, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Draw a mask whose entries are true with probability `share`, independently of one another."""
    # An entry's random number is a hash of its position and the key: MurmurHash3's finalizer (Appleby 2011), twice. jax's own
    # generator is a loop that XLA cannot fuse with anything; with several runs side by side on a CPU it took half of a step.
    # Dropout needs no better randomness, and nothing else uses this.
    seeds = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    position = jax.lax.iota(jnp.uint32, int(np.prod(shape))).reshape(shape)
    bits = _scramble(_scramble(position ^ seeds[0]) + seeds[-1])
    return bits < np.uint32(min(share * 2.0**32, 2.0**32 - 1))


def _scramble(bits: Array) -> Array:
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


class Blocks(NamedTuple):
    """Rows of several groups, laid out in n blocks of one group each."""

    size: int
    """Places of a block."""
    slot: Int[Array, " r"]
    """The place of each row among the n * size of all blocks."""
    owner: Int[Array, " n"]
    """The group of each block."""


def cut_into_blocks(group: Int[Array, " r"], g: int) -> Blocks:
    """Lay out r rows of g groups in blocks of one group each, so that the weights gathered for a block serve all its rows.

    Each group wastes less than one block, so r // size + g blocks always suffice and shapes are static.
    """
    r = len(group)
    size = min(64, max(4, 1 << (max(1, r // g) - 1).bit_length()))
    counts = jnp.zeros((g,), jnp.int32).at[group].add(1)
    blocks = -(-counts // size)
    order = jnp.argsort(group, stable=True)
    sorted_group = group[order]
    rank = jnp.arange(r) - (jnp.cumsum(counts) - counts)[sorted_group]  # a row's place among those of its group
    slot = jnp.zeros((r,), jnp.int32).at[order].set((jnp.cumsum(blocks) - blocks)[sorted_group] * size + rank)
    owner = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(r // size + g), side="right", method="compare_all")
    return Blocks(size, slot, jnp.minimum(owner, g - 1))


def grouped_mlp(
    x: Float[Array, "r d"],
    group: Int[Array, " r"],
    w_in: Float[Array, "g d f"],
    w_out: Float[Array, "g f o"],
    activation: Activation,
    b_in: Float[Array, "g f"] | None = None,
    b_out: Float[Array, "g o"] | None = None,
) -> Float[Array, "r o"]:
    """Send row i through network `group[i]` of g: activation(x w_in + b_in) w_out + b_out.

    No row is dropped and none depends on another, however uneven the groups are.
    """
    r, g = x.shape[0], w_in.shape[0]
    if r == 0:
        return jnp.zeros((0, w_out.shape[-1]), x.dtype)
    blocks = cut_into_blocks(group, g)
    empty = jnp.zeros((len(blocks.owner) * blocks.size, x.shape[1]), x.dtype)
    tiles = empty.at[blocks.slot].set(x).reshape(len(blocks.owner), blocks.size, -1)

    def one_block(item: tuple[Array, Array]) -> Array:
        rows, network = item
        hidden = rows @ w_in[network]
        if b_in is not None:
            hidden = hidden + b_in[network][None]
        out = activation(hidden) @ w_out[network]
        return out if b_out is None else out + b_out[network][None]

    return jax.lax.map(one_block, (tiles, blocks.owner)).reshape(len(empty), -1)[blocks.slot]

"""Many small networks, one per token: the leaves of a tree, the experts of a switch layer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ufbert.ops.activations import Activation


def grouped_mlp(
    x: Float[Array, "r d"],
    group: Int[Array, " r"],
    w_in: Float[Array, "g d f"],
    w_out: Float[Array, "g f o"],
    activation: Activation,
    b_in: Float[Array, "g f"] | None = None,
    b_out: Float[Array, "g o"] | None = None,
) -> Float[Array, "r o"]:
    """Row i through network `group[i]`: activation(x w_in + b_in) w_out + b_out. No row is dropped, none sees another.

    Rows are sorted by network and cut into blocks of one network each, so that the weights gathered for a block serve
    all its rows; short blocks are filled up with zeros. Shapes are static: rows / block + networks blocks.
    """
    r, g = x.shape[0], w_in.shape[0]
    if r == 0:
        return jnp.zeros((0, w_out.shape[-1]), x.dtype)
    block = min(64, max(4, 1 << (max(1, r // g) - 1).bit_length()))
    n_blocks = r // block + g
    counts = jnp.zeros((g,), jnp.int32).at[group].add(1)
    blocks = -(-counts // block)
    first_block = jnp.cumsum(blocks) - blocks
    order = jnp.argsort(group, stable=True)
    sorted_group = group[order]
    rank = jnp.arange(r) - (jnp.cumsum(counts) - counts)[sorted_group]
    slot = first_block[sorted_group] * block + rank
    tiles = jnp.zeros((n_blocks * block, x.shape[1]), x.dtype).at[slot].set(x[order]).reshape(n_blocks, block, -1)
    owner = jnp.minimum(jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(n_blocks), side="right"), g - 1)

    def one_block(item: tuple[Array, Array]) -> Array:
        rows, network = item
        hidden = rows @ w_in[network]
        if b_in is not None:
            hidden = hidden + b_in[network][None]
        out = activation(hidden) @ w_out[network]
        return out if b_out is None else out + b_out[network][None]

    found = jax.lax.map(one_block, (tiles, owner)).reshape(n_blocks * block, -1)
    return jnp.zeros((r, w_out.shape[-1]), found.dtype).at[order].set(found[slot])

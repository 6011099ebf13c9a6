"""Kernels for trees of neurons on NVIDIA GPUs, in Pallas (its Mosaic backend): the backend `pallas` of `ufbert.ops.fff`.

A GPU computes a tree at the speed of its memory, so a kernel reads a weight row where a path needs it and keeps the rest in
registers. Four kernels do all the work, with XLA's own operations between them:

- `walk` goes down the trees with each row: logits and leaves. A leaf names its whole path.
- `mix` adds up the weight rows of each path, each times a coefficient: the output, and the gradient of the input.
- `dots` multiplies each row with the weight rows of its path: the gradient of the activations.
- `sum_chunks` and `sum_nodes` compute the gradients of the weights. Rows sorted by leaf visit each node one after the other, at
  every level. So a chunk of sorted rows adds up what its nodes get in registers, and a second pass adds up the chunks of a
  node, in their order. No two programs add to one number, so a sum never depends on which came first.

`mix` and `dots` take the rows in the sorted order too: neighbours share most of a path, which then lies in the cache.

On a CPU the same kernels run through Pallas' interpreter, slowly: for tests.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

OLDEST = 8.0
"""Compute capability that Pallas' Mosaic backend asks for (Ampere)."""
LANES = 128
"""Threads of a program. Widths are padded to a multiple of them."""
ROWS = 8
"""Sorted rows that a program of `mix` or `dots` takes, one after the other."""
CHUNK = 64
"""Sorted rows of a chunk in the sums of the weights' gradients."""
COLUMNS = 256
"""Columns of the weights that a program of these sums takes, where the width is a multiple."""
TOGETHER = 4
"""Weight rows that a program of `mix` or `dots` loads before it uses the first: their latencies overlap."""
ROWS_TOGETHER = 2
"""Rows of a chunk that are loaded together."""
CHUNKS_TOGETHER = 8
"""Sums of chunks that are loaded together."""


@functools.cache
def unavailable() -> str:
    """Say why the kernels cannot run on the default device; "" if they can, by compiling the smallest of them."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return "the default device is no NVIDIA GPU"
    if float(device.compute_capability) < OLDEST:
        return f"{device.device_kind} is older than compute capability {OLDEST}"
    row, weights, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, LANES), (1, 3, LANES), (1, 3)))
    try:
        jax.jit(walk).lower(row, weights, bias).compile()
    except Exception as error:  # whatever Pallas raises, the other backends can do the work
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


class Order(NamedTuple):
    """The b rows in the order of the leaves that they reach, for each of m trees."""

    row: Int[Array, "m b"]
    """The rows, sorted by leaf, and by number within a leaf."""
    leaf: Int[Array, "m b"]
    """Their leaves, from 0 on."""


def order_by_leaf(leaf: Int[Array, "b m"], n_leaves: int) -> Order:
    """Sort the rows of each tree by leaf."""
    by_tree, rows = leaf.T, jnp.arange(leaf.shape[0], dtype=jnp.int32)[None]
    if n_leaves * leaf.shape[0] < 2**31:  # a leaf and a row fit one number, and one number sorts faster than two
        keys = lax.sort(by_tree * leaf.shape[0] + rows, is_stable=False)
        return Order(keys % leaf.shape[0], keys // leaf.shape[0])
    row = jnp.argsort(by_tree, axis=-1, stable=True).astype(jnp.int32)
    return Order(row, jnp.take_along_axis(by_tree, row, axis=-1))


# jit makes layers of one shape share one trace and one lowering of a kernel, which takes a tenth of a second or more.
@jax.jit
def walk(
    x: Float[Array, "b d"], w_in: Float[Array, "m n d"], bias: Float[Array, "m n"]
) -> tuple[Int[Array, "b m"], Float[Array, "b m s"]]:
    """Find the leaf that each row reaches in each tree, and the logits of the s nodes on the way."""
    (b, _), (m, n, _) = x.shape, w_in.shape
    steps = n.bit_length()

    def kernel(row: Any, x_ref: Any, w_ref: Any, bias_ref: Any, leaf_ref: Any, z_ref: Any) -> None:
        x = _load(x_ref, row)

        def descend(k: Any, _: Any) -> Any:
            def step(s: Any, node: Any) -> Any:
                weights, shift = _load(w_ref, k * n + node), bias_ref[k * n + node]
                z = jnp.sum(x * weights) + shift
                z_ref[row, k * steps + s] = z
                return 2 * node + 1 + (z > 0).astype(jnp.int32)

            below = lax.fori_loop(0, steps, step, jnp.int32(0))  # a child of the leaf
            leaf_ref[row, k] = lax.shift_right_logical(below + 1, 1) - (n + 1) // 2
            return _

        lax.fori_loop(0, m, descend, 0)

    out = jax.ShapeDtypeStruct((b, m), jnp.int32), jax.ShapeDtypeStruct((b, m * steps), jnp.float32)
    leaf, z = _launch(kernel, (b,), out, _padded(x), _rows(w_in), bias.reshape(-1))
    return leaf, z.reshape(b, m, steps)


@functools.partial(jax.jit, static_argnames="dtype")
def mix(
    coefficients: Float[Array, "b m s"],
    order: Order,
    leaf: Int[Array, "b m"],
    weights: Float[Array, "m n d"],
    dtype: Any,
) -> Float[Array, "b d"]:
    """Compute the sum of coefficient * weight row over the nodes of each row's paths, in float32; return it as `dtype`."""
    (b, m, steps), (_, n, d) = coefficients.shape, weights.shape
    table = _rows(weights)

    def kernel(program: Any, c_ref: Any, row_ref: Any, leaf_ref: Any, w_ref: Any, y_ref: Any) -> None:
        def one_row(i: Any, _: Any) -> Any:
            row = row_ref[jnp.minimum(program * ROWS + i, b - 1)]  # the last program may do a row again

            def tree(k: Any, y: Any) -> Any:
                at = leaf_ref[row, k] + (n + 1) // 2
                for first in range(0, steps, TOGETHER):
                    group = range(first, min(first + TOGETHER, steps))
                    loaded = [_load(w_ref, k * n + _node(at, s, steps)) for s in group]
                    for s, weight in zip(group, loaded, strict=True):
                        y = y + c_ref[row, k * steps + s] * weight
                return y

            y_ref[row, :] = lax.fori_loop(0, m, tree, jnp.zeros(table.shape[1:], jnp.float32)).astype(dtype)
            return _

        lax.fori_loop(0, ROWS, one_row, 0)

    out = jax.ShapeDtypeStruct((b, table.shape[1]), dtype)
    flat = coefficients.reshape(b, -1)
    return _launch(kernel, (pl.cdiv(b, ROWS),), (out,), flat, order.row[0], leaf, table)[0][:, :d]


@jax.jit
def dots(
    g: Float[Array, "b d"], order: Order, leaf: Int[Array, "b m"], weights: Float[Array, "m n d"]
) -> Float[Array, "b m s"]:
    """Compute g . weight row for the s nodes of each of a row's paths, in float32."""
    (b, m), (_, n, _) = leaf.shape, weights.shape
    steps = n.bit_length()

    def kernel(program: Any, g_ref: Any, row_ref: Any, leaf_ref: Any, w_ref: Any, z_ref: Any) -> None:
        def one_row(i: Any, _: Any) -> Any:
            row = row_ref[jnp.minimum(program * ROWS + i, b - 1)]
            g = _load(g_ref, row)

            def tree(k: Any, _: Any) -> Any:
                at = leaf_ref[row, k] + (n + 1) // 2
                for first in range(0, steps, TOGETHER):
                    group = range(first, min(first + TOGETHER, steps))
                    products = [g * _load(w_ref, k * n + _node(at, s, steps)) for s in group]
                    for s, product in zip(group, products, strict=True):
                        z_ref[row, k * steps + s] = jnp.sum(product)
                return _

            return lax.fori_loop(0, m, tree, _)

        lax.fori_loop(0, ROWS, one_row, 0)

    out = jax.ShapeDtypeStruct((b, m * steps), jnp.float32)
    return _launch(kernel, (pl.cdiv(b, ROWS),), (out,), _padded(g), order.row[0], leaf, _rows(weights))[0].reshape(
        b, m, steps
    )


@functools.partial(jax.jit, static_argnames="n")
def node_sums(
    order: Order, coefficients: Float[Array, "b m s"], rows: Float[Array, "b d"], n: int
) -> tuple[Float[Array, "m n d"], Float[Array, "m n"]]:
    """Sum coefficient * row, and the coefficients, over the rows that visit each node; zeros where none does."""
    (m, b), d = order.row.shape, rows.shape[1]
    steps, chunks = n.bit_length(), pl.cdiv(b, CHUNK)
    begun, going_on = _sum_chunks(order, coefficients.reshape(b, -1), _padded(rows), n, chunks)
    # The rows of a node are those of the leaves below it.
    leaves = jnp.zeros((m, (n + 1) // 2), jnp.int32).at[jnp.arange(m)[:, None], order.leaf].add(1)
    ends = jnp.pad(jnp.cumsum(leaves, axis=1), ((0, 0), (1, 0)))
    level = np.array([(v + 1).bit_length() - 1 for v in range(n)], np.int32)
    first_leaf = (np.arange(1, n + 1) << (steps - 1 - level)) - (n + 1) // 2
    start = ends[:, first_leaf].reshape(-1)
    stop = ends[:, first_leaf + (1 << (steps - 1 - level))].reshape(-1)
    total, count = _sum_nodes(start, stop, np.tile(level, m), begun, going_on, n, chunks)
    return total[:, :d].reshape(m, n, d), count.reshape(m, n)


def _sum_chunks(
    order: Order, coefficients: Array, rows: Array, n: int, chunks: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Sum coefficient * row, and the coefficients, over the rows of each node in each chunk.

    Returns sums by node, of the chunk in which its rows begin (nothing is written for a node without rows), and sums by tree,
    chunk and level, of the node whose rows began in an earlier chunk (nothing is written where there is none).
    """
    (m, b), width = order.row.shape, rows.shape[1]
    steps, top, columns = n.bit_length(), (n + 1) // 2, _columns(width)

    def kernel(chunk: Any, k: Any, block: Any, row_ref: Any, leaf_ref: Any, c_ref: Any, x_ref: Any, *outs: Any) -> None:
        part = pl.ds(block * columns, columns)
        start, stop = chunk * CHUNK, jnp.minimum((chunk + 1) * CHUNK, b)
        before = jnp.where(chunk > 0, leaf_ref[k, jnp.maximum(start - 1, 0)] + top, 0)

        def write(s: int, at: Any, total: Any, count: Any) -> None:
            """Write the sums of level s, whose rows are all past: a later row visits another node."""
            old = lax.shift_right_logical(before, steps - 1 - s) == lax.shift_right_logical(at, steps - 1 - s)

            def put(total_ref: Any, count_ref: Any, index: Any) -> None:
                total_ref[index, part] = total
                count_ref[index] = count

            pl.when(old)(lambda: put(*outs[2:], (k * chunks + chunk) * steps + s))
            pl.when(~old)(lambda: put(*outs[:2], k * n + _node(at, s, steps)))

        def load(i: Any) -> tuple[Any, Any, list[Any]]:
            """Load a row's leaf, its numbers and its coefficients; after the end, those of the last row, times 0."""
            there, i = i < stop, jnp.minimum(i, stop - 1)
            row = row_ref[k, i]
            cs = [jnp.where(there, c_ref[row, k * steps + s], 0.0) for s in range(steps)]
            return leaf_ref[k, i] + top, x_ref[row, part].astype(jnp.float32), cs

        def close(at: Any, new: Any, levels: Any) -> Any:
            """Write, and set to zero, the sums of the levels at which the next row visits another node."""
            opened = []
            for s, sums in enumerate(levels):
                moved = lax.shift_right_logical(new, steps - 1 - s) != lax.shift_right_logical(at, steps - 1 - s)
                pl.when(moved)(lambda s=s, sums=sums: write(s, at, *sums))
                opened.append([_zero_if(moved, each) for each in sums])
            return opened

        def add(group: Any, carry: Any) -> Any:
            at, levels = carry
            for new, x, cs in [load(start + group * ROWS_TOGETHER + j) for j in range(ROWS_TOGETHER)]:
                levels = lax.cond(new != at, functools.partial(close, at, new), lambda levels: levels, levels)
                levels = [[total + c * x, count + c] for (total, count), c in zip(levels, cs, strict=True)]
                at = new
            return at, levels

        zeros = [jnp.zeros((columns,), jnp.float32), jnp.float32(0.0)]
        groups = lax.div(stop - start + ROWS_TOGETHER - 1, ROWS_TOGETHER)
        at, levels = lax.fori_loop(0, groups, add, (leaf_ref[k, start] + top, [zeros] * steps))
        for s, sums in enumerate(levels):
            write(s, at, *sums)

    def table(length: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((length, width), (length,))]

    out = (*table(m * n), *table(m * chunks * steps))
    found = _launch(kernel, (chunks, m, width // columns), out, order.row, order.leaf, coefficients, rows)
    return (found[0], found[1]), (found[2], found[3])


def _sum_nodes(
    start: Array,
    stop: Array,
    level: np.ndarray,
    begun: tuple[Array, Array],
    going_on: tuple[Array, Array],
    n: int,
    chunks: int,
) -> list[Array]:
    """Add up each node's sums over chunks. A node's sorted rows are those from `start` on, before `stop`."""
    (nodes,), steps, width = start.shape, n.bit_length(), begun[0].shape[1]
    columns = _columns(width)

    def kernel(node: Any, block: Any, start_ref: Any, stop_ref: Any, level_ref: Any, *refs: Any) -> None:
        begun_total, begun_count, more_total, more_count, total_ref, count_ref = refs
        first, last = lax.div(start_ref[node], CHUNK), lax.div(stop_ref[node] - 1, CHUNK)
        visited, s = stop_ref[node] > start_ref[node], level_ref[node]
        base, part = lax.div(node, n) * chunks, pl.ds(block * columns, columns)

        def add(i: Any, sums: Any) -> Any:
            total, count = sums
            for chunk in [first + 1 + CHUNKS_TOGETHER * i + j for j in range(CHUNKS_TOGETHER)]:
                at = (base + jnp.minimum(chunk, last)) * steps + s
                total = total + _zero_if(chunk > last, more_total[at, part])
                count = count + _zero_if(chunk > last, more_count[at])
            return total, count

        rounds = jnp.where(visited, lax.div(last - first + CHUNKS_TOGETHER - 1, CHUNKS_TOGETHER), 0)
        sums = _zero_if(~visited, begun_total[node, part]), _zero_if(~visited, begun_count[node])
        total_ref[node, part], count_ref[node] = lax.fori_loop(0, rounds, add, sums)

    out = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in begun)
    return _launch(kernel, (nodes, width // columns), out, start, stop, jnp.asarray(level), *begun, *going_on)


def _columns(width: int) -> int:
    """Return the columns that a program takes of rows of this width."""
    return COLUMNS if width % COLUMNS == 0 else LANES


def forward(
    activation: Callable[[Array], Array],
    dtype: Any,
    x: Float[Array, "b d"],
    w_in: Float[Array, "m n d"],
    bias: Float[Array, "m n"],
    w_out: Float[Array, "m n d"],
) -> tuple[Float[Array, "b d"], tuple[Any, ...]]:
    """Compute a layer's output, and what its backward pass needs. Output weights are read as `dtype`."""
    leaf, z = walk(x, w_in, bias)
    order = order_by_leaf(leaf, (w_in.shape[1] + 1) // 2)
    return mix(activation(z), order, leaf, w_out.astype(dtype), x.dtype), (x, w_in, w_out, leaf, z, order)


def backward(
    activation: Callable[[Array], Array], dtype: Any, saved: tuple[Any, ...], g: Float[Array, "b d"]
) -> tuple[Array, Array, Array, Array]:
    """Compute the gradients of x, w_in, bias and w_out. Weights are read as `dtype`."""
    x, w_in, w_out, leaf, z, order = saved
    active, activation_vjp = jax.vjp(activation, z)
    (dz,) = activation_vjp(dots(g, order, leaf, w_out.astype(dtype)))
    dx = mix(dz, order, leaf, w_in.astype(dtype), x.dtype)
    # One at a time, since Pallas takes four times as long to lay out twice as many vectors. The barrier keeps the result that
    # nobody reads: without it the second call would be another program than the first, and be laid out again.
    d_in, d_bias = node_sums(order, dz, x, w_in.shape[1])
    d_out, _ = lax.optimization_barrier(node_sums(order, active, g, w_in.shape[1]))
    return dx, d_in.astype(w_in.dtype), d_bias, d_out.astype(w_out.dtype)


def _node(at: Any, s: int, steps: int) -> Any:
    """Return the node of level s on the path to a leaf, `at` being the leaf's number in the heap counted from 1."""
    return lax.shift_right_logical(at, steps - 1 - s) - 1


def _zero_if(condition: Any, value: Any) -> Any:
    """Return zeros where the condition holds, else the value, which then may be anything."""
    return jnp.where(jnp.broadcast_to(condition, value.shape), jnp.zeros_like(value), value)


def _load(ref: Any, row: Any) -> Any:
    return ref[row].astype(jnp.float32)


def _rows(weights: Float[Array, "m n d"]) -> Float[Array, "r p"]:
    return _padded(weights.reshape(-1, weights.shape[-1]))


def _padded(rows: Float[Array, "r d"]) -> Float[Array, "r p"]:
    """Append zeros to the rows, to a multiple of LANES numbers."""
    return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % LANES)))


def _launch(
    kernel: Callable[..., None], grid: tuple[int, ...], out: tuple[jax.ShapeDtypeStruct, ...], *args: Array
) -> list[Array]:
    """Run a program at every point of the grid. It gets its place, and references to all of `args` and of the results."""
    from jax.experimental.pallas import mosaic_gpu as plgpu  # a second to import, which only users of the kernels pay

    def place(program: Any) -> list[Any]:
        ids = []
        for size in reversed(grid):
            ids.append(lax.rem(program, size))
            program = lax.div(program, size)
        return ids[::-1]

    programs = math.prod(grid)  # on one axis of the GPU's three: the others end at 65,535
    compiled = plgpu.kernel(
        lambda *refs: kernel(*place(lax.axis_index("program")), *refs),
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        # No thread reads what another one wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    interpreted = pl.pallas_call(
        lambda *refs: kernel(*place(pl.program_id(0)), *refs), out_shape=out, grid=(programs,), interpret=True
    )
    return list(lax.platform_dependent(*args, cuda=compiled, default=interpreted))

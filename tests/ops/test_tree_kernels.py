"""The kernels for GPUs: they equal `masked`, interpreted on a CPU and compiled where a GPU is."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.ops import fff, tree_kernels

SHAPES = [(150, 1, 4, 20), (130, 3, 2, 96), (70, 2, 5, 768)]
"""b, m, depth, d: more rows than a chunk has, and widths that are no power of two."""


def draw(b, m, depth, d):
    n, rng = 2 ** (depth + 1) - 1, np.random.default_rng([b, d])
    shapes = [(b, d), (b, d), (m, n, d), (m, n), (m, n, d)]
    scales = [1.0, 1.0, d**-0.5, 0.3, 1.0]
    return [
        jnp.asarray(rng.normal(size=shape) * scale, jnp.float32) for shape, scale in zip(shapes, scales, strict=True)
    ]


@partial(jax.jit, static_argnames=("backend", "dtype"))
def layer(target, *args, backend, dtype=jnp.float32):
    """The output, and the gradients of x, w_in, bias and w_out."""
    with jax.default_matmul_precision("highest"):
        y, vjp = jax.vjp(partial(fff.fast_feedforward, backend=backend, dtype=dtype), *args)
        return y, *vjp(target)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_masked_in_value_and_gradient_however_uneven_the_leaves_are(shape):
    even = draw(*shape)
    target, x, w_in, bias, w_out = even
    uneven = [target, x, w_in, bias.at[0].set(50.0), w_out]  # all rows take one leaf of the first tree
    for args in (even, uneven):
        assert float(jnp.abs(fff.path_nodes(*args[1:4])[1]).min()) > 1e-6  # no turn hangs by a rounding
        found, wanted = layer(*args, backend="pallas"), layer(*args, backend="masked")
        for name, one, other in zip(["y", "x", "w_in", "bias", "w_out"], found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), err_msg=name)
        again = layer(*args, backend="pallas")
        jax.tree.map(np.testing.assert_array_equal, again, found)


def test_rows_and_weights_in_bfloat16_change_no_route():
    target, x, *weights = draw(*SHAPES[0])
    x, target = x.astype(jnp.bfloat16), target.astype(jnp.bfloat16)
    found = layer(target, x, *weights, backend="pallas", dtype=jnp.bfloat16)
    wanted = layer(target.astype(jnp.float32), x.astype(jnp.float32), *weights, backend="masked")
    assert [one.dtype for one in found] == ["bfloat16", "bfloat16", "float32", "float32", "float32"]
    for name, one, other in zip(["y", "x", "w_in", "bias", "w_out"], found, wanted, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * np.abs(other).max(), err_msg=name)
    np.testing.assert_array_equal(found[2] != 0, wanted[2] != 0)


def test_kernels_lower_for_a_gpu_and_add_nothing_in_an_uncertain_order():
    """A scatter that adds floats would end a run in other bits each time."""
    text = layer.trace(*draw(*SHAPES[1]), backend="pallas").lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 5  # walk, mix, dots, and the two passes of the sums: each is lowered once
    scattered = re.findall(r"stablehlo\.scatter.*?\}\) : \((tensor<\S+>),", text, re.DOTALL)
    assert all(operand.endswith("i32>") for operand in scattered)


def test_many_leaves_are_sorted_like_few():
    leaf = jnp.asarray(np.random.default_rng(0).integers(0, 9, (50, 2)), jnp.int32)
    few, many = tree_kernels.order_by_leaf(leaf, 9), tree_kernels.order_by_leaf(leaf, 2**30)
    jax.tree.map(np.testing.assert_array_equal, few, many)
    np.testing.assert_array_equal(few.row, np.argsort(leaf.T, axis=1, kind="stable"))
    np.testing.assert_array_equal(few.leaf, np.sort(leaf.T, axis=1))

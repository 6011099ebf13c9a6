"""Routed trees: descent, grouped and masked sums, gates, even splits, weights of ancestors, and the native kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.ops import native, routed_tree
from ufbert.ops.dense import ACTIVATIONS, gelu

needs_kernels = pytest.mark.skipif(bool(native.unavailable()), reason="the native kernels cannot be had here")
SHAPES = [(1, 1, 0, 3, 5), (40, 2, 3, 4, 8), (70, 3, 2, 33, 19), (300, 1, 5, 7, 64)]
"""b, trees, depth, width of a leaf, d."""


def draw(b, m, depth, w, d, seed=0):
    g, rng = 2**depth, np.random.default_rng([seed, b, d])
    shapes = [(b, d), (m, g - 1, d), (m, g - 1), (m, g, d, w), (m, g, w, d)]
    scales = [1.0, d**-0.5, 0.3, d**-0.5, w**-0.5]
    return [jnp.asarray(rng.normal(size=s) * scale, jnp.float32) for s, scale in zip(shapes, scales, strict=True)]


def draw_bias(m, depth, w, d, seed=0):
    rng = np.random.default_rng([seed, w, d])
    return routed_tree.LeafBias(*(jnp.asarray(rng.normal(size=(m, 2**depth, k)), jnp.float32) for k in (w, d)))


def by_hand(x, node_w, node_b, w_in, w_out, gated, activation=gelu, bias=None):
    """The layer row by row and tree by tree, and how near each row came to turning the other way."""
    b_in, b_out = (0 * np.asarray(w_in[..., 0, :]), 0 * np.asarray(w_out[..., 0, :])) if bias is None else bias
    y, margin = np.zeros(x.shape), np.full(len(x), np.inf)
    for i, row in enumerate(np.asarray(x, np.float64)):
        for tree in range(len(w_in)):
            node, shares = 0, []
            while node < len(node_w[tree]):
                z = row @ np.asarray(node_w[tree, node], np.float64) + float(node_b[tree, node])
                shares.append(2 / (1 + np.exp(-abs(z))))
                margin[i] = min(margin[i], abs(z))
                node = 2 * node + 1 + (z > 0)
            leaf = node - len(node_w[tree])
            hidden = row @ np.asarray(w_in[tree, leaf], np.float64) + np.asarray(b_in[tree, leaf])
            answer = np.asarray(activation(jnp.asarray(hidden))) @ np.asarray(w_out[tree, leaf]) + np.asarray(
                b_out[tree, leaf]
            )
            y[i] += (np.mean(shares) if gated and shares else 1.0) * answer
    return y, margin > 1e-5


def layer(x, node_w, node_b, w_in, w_out, *, way, gated=True, bias=None):
    logits = routed_tree.node_logits(x, node_w, node_b)
    path = routed_tree.descend(logits)
    gate = routed_tree.path_gate(path) if gated else jnp.ones(path.leaf.shape)
    if way == "grouped":
        return routed_tree.grouped(x, path.leaf, gate, w_in, w_out, gelu, bias)
    shares = jax.nn.one_hot(path.leaf, w_in.shape[1]) * gate[..., None]
    return routed_tree.masked(x, shares, w_in, w_out, gelu, bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, False), (True, True), (False, True)])
def test_grouped_masked_and_native_layers_equal_the_rows_by_hand(shape, gated, biased):
    arrays, bias = draw(*shape), draw_bias(*shape[1:]) if biased else None
    wanted, clear = by_hand(*arrays, gated, bias=bias)
    assert clear.sum() >= 0.9 * len(wanted)
    x, node_w, node_b, w_in, w_out = arrays
    rows = jnp.swapaxes(w_in, 2, 3)
    found = {way: layer(*arrays, way=way, gated=gated, bias=bias) for way in ("grouped", "masked")}
    if not native.unavailable():
        found["native"] = native.routed_forward(x, node_w, node_b, rows, w_out, *(bias or ()), gated=gated)
    for way, y in found.items():
        np.testing.assert_allclose(y[clear], wanted[clear], atol=2e-5 * np.abs(wanted).max(), err_msg=way)


@needs_kernels
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_narrow_weights_of_the_native_layer_count_as_what_they_stand_for(kind, activation):
    x, node_w, node_b, w_in, w_out = draw(40, 2, 3, 20, 24)

    def narrow(weights):
        return native.quantize(weights) if kind == "int8" else weights.astype(jnp.bfloat16)

    own_in, own_out = narrow(jnp.swapaxes(w_in, 2, 3)), narrow(w_out)
    y = native.routed_forward(x, node_w, node_b, own_in, own_out, gated=True, activation=activation)
    restored = jnp.swapaxes(native.restore(own_in), 2, 3), native.restore(own_out)
    wanted, clear = by_hand(x, node_w, node_b, *restored, True, ACTIVATIONS[activation])
    np.testing.assert_allclose(y[clear], wanted[clear], atol=2e-5 * np.abs(wanted).max())


@needs_kernels
def test_a_row_of_the_native_layer_does_not_depend_on_its_batch():
    x, node_w, node_b, w_in, w_out = draw(300, 2, 4, 40, 70)
    rest = (node_w, node_b, jnp.swapaxes(w_in, 2, 3), w_out)
    y = np.asarray(native.routed_forward(x, *rest, gated=True))
    for some in (slice(0, 1), slice(7, 30), slice(100, 300)):
        for threads in (1, 2):
            np.testing.assert_array_equal(native.routed_forward(x[some], *rest, gated=True, threads=threads), y[some])
    assert native.routed_forward(x[:0], *rest, gated=True).shape == (0, 70)


def test_grouped_and_masked_have_the_same_gradients_however_uneven_the_leaves_are():
    arrays = draw(70, 3, 2, 33, 19)
    arrays[2] = arrays[2].at[0].set(50.0)  # all rows take one leaf of the first tree
    bias = draw_bias(3, 2, 33, 19)

    def slopes(way):
        of = jax.grad(lambda b, *a: jnp.sum(jnp.sin(layer(*a, way=way, bias=b))), argnums=(1, 2, 3, 4, 5, 0))
        *slopes, of_bias = of(bias, *arrays)
        return *slopes, *of_bias

    names = ["x", "node", "threshold", "in", "out", "bias in", "bias out"]
    for name, one, other in zip(names, slopes("grouped"), slopes("masked"), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1e-6, np.abs(other).max()), err_msg=name)
    assert not np.any(slopes("grouped")[2]), "a threshold learns from means alone"
    assert np.abs(slopes("grouped")[1]).max() > 1e-3, "a gate teaches the decisions"


def test_thresholds_that_follow_means_split_every_node_evenly():
    x, node_w, node_b, *_ = draw(2000, 2, 3, 1, 16)
    x = (
        (3.0 * x.at[:, 0].add(40.0)).at[1900:].set(-500.0)
    )  # what all tokens share is far larger than what tells them apart
    node_w, real = routed_tree.directions(node_w), jnp.arange(2000) < 1900
    np.testing.assert_allclose(jnp.linalg.norm(node_w, axis=-1), 1.0, rtol=1e-5)

    def path(bias):
        return routed_tree.descend(routed_tree.node_logits(x, node_w, bias))

    def counts(bias):
        return np.stack([np.bincount(tree, minlength=8) for tree in np.asarray(path(bias).leaf[:1900]).T])

    def total(bias):
        return routed_tree.centred(path(bias), bias, 0.1, real)

    assert counts(node_b).max() > 1500
    assert float(total(node_b)) == 0.0
    slope, bias = jax.jit(jax.grad(total)), node_b
    for _ in range(200):
        bias = bias - slope(bias)
    assert counts(bias).min() > 150
    assert counts(bias).max() < 350
    one = jax.tree.map(lambda part: part[:1], path(node_b))
    still = jax.grad(lambda bias: routed_tree.centred(one, bias, 0.1))(node_b) == 0
    np.testing.assert_array_equal(still.sum(axis=1), 7 - 3, err_msg="nodes that no token reaches keep their thresholds")


def test_straight_through_is_the_leaf_in_value_and_the_mixture_in_gradient():
    x, node_w, node_b, w_in, w_out = draw(40, 2, 3, 4, 8)
    logits = routed_tree.node_logits(x, node_w, node_b)
    shares = routed_tree.leaf_shares(logits)
    leaf = routed_tree.descend(logits).leaf
    np.testing.assert_allclose(shares, jax.nn.one_hot(leaf, 8), atol=1e-6)

    def loss(node_w):
        shares = routed_tree.leaf_shares(routed_tree.node_logits(x, node_w, node_b))
        return jnp.sum(routed_tree.masked(x, shares, w_in, w_out, gelu) ** 2)

    assert float(jnp.abs(jax.grad(loss)(node_w)).max()) > 1e-3


def test_annealed_shares_are_soft_at_first_and_hard_from_their_time_on():
    x, node_w, node_b, *_ = draw(40, 2, 3, 4, 8)
    logits = routed_tree.node_logits(x, node_w, node_b)
    hard = jax.nn.one_hot(routed_tree.descend(logits).leaf, 8)
    gaps = []
    for progress in (0.0, 0.35, 0.6, 0.7, 1.0):
        shares = routed_tree.annealed_shares(logits, progress, 0.7)
        np.testing.assert_allclose(shares.sum(-1), 1.0, rtol=1e-5)
        gaps.append(float(jnp.abs(shares - hard).mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1
    assert gaps[-1] < 0.01


def test_weights_of_ancestors_are_added_to_their_leaves():
    leaves = jnp.arange(8.0).reshape(1, 8, 1)
    above = jnp.array([100.0, 1e3, 2e3, 1e4, 2e4, 3e4, 4e4]).reshape(1, 7, 1)
    summed = routed_tree.with_ancestors(leaves, above)[0, :, 0]
    np.testing.assert_array_equal(summed, [11100, 11101, 21102, 21103, 32104, 32105, 42106, 42107])
    np.testing.assert_array_equal(routed_tree.with_ancestors(leaves, above[:, :1])[0, :, 0], 100 + np.arange(8))
    np.testing.assert_array_equal(routed_tree.with_ancestors(leaves, above[:, :0]), leaves)


def test_hashed_leaves_follow_the_token_alone():
    ids = jnp.arange(4000)
    leaves = np.asarray(routed_tree.hashed_leaves(ids, 2, 8))
    for tree in leaves.T:
        assert np.bincount(tree, minlength=8).min() > 400
    assert (leaves[:, 0] != leaves[:, 1]).mean() > 0.8
    np.testing.assert_array_equal(routed_tree.hashed_leaves(ids[5:6], 2, 8)[0], leaves[5])


def test_the_gradients_of_leaves_are_added_in_one_order_on_an_accelerator():
    """A scatter that adds floats would end a run in other bits each time."""
    x, *_, w_in, w_out = draw(40, 2, 3, 4, 8)
    leaf, gate = jnp.zeros((40, 2), jnp.int32), jnp.ones((40, 2))

    def output(x, gate, w_in, w_out):
        return jnp.sum(jnp.sin(routed_tree.grouped(x, leaf, gate, w_in, w_out, gelu)))

    traced = jax.jit(jax.grad(output, argnums=(0, 1, 2, 3))).trace(x, gate, w_in, w_out)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    scattered = re.findall(r"stablehlo\.scatter.*?\}\) : \((tensor<\S+>),", text, re.DOTALL)
    assert scattered
    assert all(operand.endswith("i32>") for operand in scattered)

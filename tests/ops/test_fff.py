"""The tree layer: both backends equal a loop written from the definition, in value and in gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ufbert.ops import fff, native
from ufbert.ops.fff import gelu, tree_depth

BACKENDS = ["masked", "gather", "pallas"] + ["native"] * (not native.unavailable())
fast_feedforward = jax.jit(
    fff.fast_feedforward, static_argnames=("backend", "dtype")
)  # one compilation a shape, not one an operation
path_nodes, path_mask = jax.jit(fff.path_nodes), jax.jit(fff.path_mask)


SHAPES = [(1, 1, 0, 1), (9, 4, 3, 5), (6, 2, 8, 6), (2, 3, 1, 3)]
"""b, m, depth, d: few, since each costs a compilation for every way to compute a tree."""


def draw(seed: int, b: int, m: int, depth: int, d: int):
    rng, n = np.random.default_rng([seed, b, m, depth, d]), 2 ** (depth + 1) - 1
    x, w_in, bias, w_out = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(b, d), (m, n, d), (m, n), (m, n, d)]
    )
    return x, w_in, 0.3 * bias, w_out


def naive(x, w_in, bias, w_out):
    """One token, one tree, one node at a time; also every visited node, and the paths."""
    x, w_in, bias, w_out = (np.asarray(a, np.float64) for a in (x, w_in, bias, w_out))
    y, visited, paths = np.zeros_like(x), set(), np.zeros((len(x), len(w_in), tree_depth(w_in.shape[1]) + 1), int)
    for b in range(len(x)):
        for tree in range(len(w_in)):
            node, step = 0, 0
            while node < w_in.shape[1]:
                z = x[b] @ w_in[tree, node] + bias[tree, node]
                paths[b, tree, step], step = node, step + 1
                y[b] += float(gelu(jnp.float32(z))) * w_out[tree, node]
                visited.add((tree, node))
                node = 2 * node + 1 + int(z > 0)
    return y, visited, paths


shapes = st.tuples(st.integers(0, 2**16), st.sampled_from(SHAPES)).map(lambda drawn: (drawn[0], *drawn[1]))


@settings(max_examples=20, deadline=None)
@given(shapes)
def test_backends_equal_the_naive_loop(shape):
    args = draw(*shape)
    nodes, logits = path_nodes(*args[:3])
    assume(float(np.abs(logits).min()) > 1e-5)  # nearer to a turn, float32 and float64 may rightly disagree
    wanted, _, paths = naive(*args)
    np.testing.assert_array_equal(nodes, paths)
    for backend in BACKENDS:
        found = fast_feedforward(*args, backend=backend)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1.0, np.abs(wanted).max()))


@partial(jax.jit, static_argnames="backend")
@partial(jax.grad, argnums=(1, 2, 3, 4))
def gradient(target, x, *weights, backend):
    return jnp.sum(fast_feedforward(x, *weights, backend=backend) * target)


@settings(max_examples=12, deadline=None)
@given(shapes)
def test_gradients_are_equal_and_touch_visited_rows_only(shape):
    x, *weights = draw(*shape)
    target = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    grads = {b: gradient(target, x, *weights, backend=b) for b in BACKENDS}
    _, visited, _ = naive(x, *weights)
    for backend in BACKENDS[1:]:
        for one, other in zip(grads["masked"], grads[backend], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, np.abs(one).max()))
        for found in map(np.asarray, grads[backend][1:]):
            for tree, node in np.ndindex(found.shape[:2]):
                if (tree, node) not in visited:
                    assert not np.any(found[tree, node])


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1, 9]), st.sampled_from([1, 8]), st.sampled_from([1, 6]))
def test_depth_zero_is_a_dense_layer(seed, b, m, d):
    x, w_in, bias, w_out = draw(seed, b, m, 0, d)
    dense = gelu(x @ w_in[:, 0].T + bias[:, 0][None]) @ w_out[:, 0]
    for backend in BACKENDS:
        np.testing.assert_allclose(fast_feedforward(x, w_in, bias, w_out, backend=backend), dense, atol=1e-5, rtol=1e-5)


@settings(max_examples=5, deadline=None)
@given(shapes)
def test_trees_are_summed(shape):
    x, *weights = map(np.asarray, draw(*shape))
    for backend in BACKENDS:
        whole = fast_feedforward(x, *weights, backend=backend)
        one_by_one = sum(
            np.asarray(fast_feedforward(x, *(w[i : i + 1] for w in weights), backend=backend))
            for i in range(len(weights[0]))
        )
        np.testing.assert_allclose(whole, one_by_one, atol=1e-5 * max(1.0, np.abs(whole).max()))


@settings(max_examples=5, deadline=None)
@given(shapes, st.randoms(use_true_random=False))
def test_rows_are_independent_and_their_order_is_nothing(shape, random):
    x, *weights = map(np.asarray, draw(*shape))
    order = list(range(len(x)))
    random.shuffle(order)
    alone = random.randrange(len(x))
    for backend in BACKENDS:
        whole = np.asarray(fast_feedforward(x, *weights, backend=backend))
        close = {"atol": 1e-5 * max(1.0, np.abs(whole).max())}
        moved = fast_feedforward(x[np.array(order)], *weights, backend=backend)
        np.testing.assert_allclose(moved, whole[np.array(order)], **close)
        row = fast_feedforward(x[alone : alone + 1], *weights, backend=backend)
        np.testing.assert_allclose(row, whole[alone : alone + 1], **close)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0, 1, 2, 5, 12]), st.data())
def test_tree_arithmetic(depth, data):
    """Heap numbering: who is whose child, on which level, and where the leaves lie."""
    n = 2 ** (depth + 1) - 1
    assert tree_depth(n) == depth
    node = data.draw(st.integers(0, n - 1))
    level = (node + 1).bit_length() - 1
    assert 2**level - 1 <= node <= 2 ** (level + 1) - 2
    left, right = 2 * node + 1, 2 * node + 2
    assert (left >= n) == (level == depth) == (node >= 2**depth - 1)
    assert (left - 1) // 2 == (right - 1) // 2 == node
    logits = np.full((1, 1, n), -1.0, np.float32)
    at = node
    while at > 0:  # let every ancestor turn towards the node
        logits[0, 0, (at - 1) // 2] = 1.0 if at % 2 == 0 else -1.0
        at = (at - 1) // 2
    on_path = np.flatnonzero(np.asarray(path_mask(logits))[0, 0])
    assert len(on_path) == depth + 1
    assert node in on_path


def test_a_tie_turns_left():
    x, w_in, bias, _ = draw(0, 2, 1, 3, 4)
    nodes, logits = path_nodes(jnp.zeros_like(x), w_in, jnp.zeros_like(bias))
    np.testing.assert_array_equal(nodes[:, 0], [[0, 1, 3, 7]] * 2)
    np.testing.assert_array_equal(logits, 0.0)
    np.testing.assert_array_equal(np.flatnonzero(path_mask(jnp.zeros((1, 1, 15)))[0, 0]), [0, 1, 3, 7])


def test_paths_descend_by_the_sign_of_the_logit():
    x, w_in, bias, _ = draw(5, 64, 2, 6, 8)
    nodes, logits = path_nodes(x, w_in, bias)
    np.testing.assert_array_equal(nodes[..., 1:], 2 * nodes[..., :-1] + 1 + (logits[..., :-1] > 0))
    assert nodes.shape[-1] == 7
    assert len(np.unique(nodes[..., -1])) > 10


@pytest.mark.parametrize("n", [0, 2, 4, 8])
def test_only_full_trees_are_accepted(n):
    with pytest.raises(ValueError, match="nodes"):
        tree_depth(n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_compute_changes_no_route(backend):
    """Node i writes on channel i alone, so the output shows the path."""
    d = n = 127
    x, w_in, bias, _ = draw(22, 256, 1, 6, d)
    x = x * d**-0.5  # logits of a few units, so that no activation rounds to zero
    w_out = jnp.eye(n)[None]
    exact, rounded = (
        fast_feedforward(x, w_in, bias, w_out, backend=backend, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_array_equal(np.asarray(exact) != 0, np.asarray(rounded) != 0)
    nodes, logits = path_nodes(x, w_in, bias)
    assert float(jnp.abs(logits).min()) < 0.01  # some turn hangs by less than bfloat16 resolves
    np.testing.assert_array_equal(np.asarray(exact != 0).sum(1), 7)
    coarse, _ = path_nodes(x.astype(jnp.bfloat16).astype(jnp.float32), w_in, bias)
    assert np.any(np.asarray(coarse) != np.asarray(nodes))  # rounding the input would have changed some


def test_empty_batches_pass():
    x, *weights = draw(0, 1, 2, 3, 4)
    for backend in BACKENDS:
        assert fast_feedforward(x[:0], *weights, backend=backend).shape == (0, 4)

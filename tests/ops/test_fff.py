"""The tree layer: both backends equal a loop written from the definition, in value and in gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufbert.ops.fff import fast_feedforward, gelu, path_mask, path_nodes, tree_depth

BACKENDS = ["masked", "gather"]


def draw(seed: int, b: int, m: int, depth: int, d: int):
    x, w_in, bias, w_out = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed), 4),
            [(b, d), (m, 2 ** (depth + 1) - 1, d), (m, 2 ** (depth + 1) - 1), (m, 2 ** (depth + 1) - 1, d)],
            strict=True,
        )
    )
    return x, w_in, 0.3 * bias, w_out


def naive(x, w_in, bias, w_out):
    """One token, one tree, one node at a time; also every visited node."""
    x, w_in, bias, w_out = (np.asarray(a, np.float64) for a in (x, w_in, bias, w_out))
    y, visited = np.zeros_like(x), set()
    for b in range(len(x)):
        for tree in range(len(w_in)):
            node = 0
            while node < w_in.shape[1]:
                z = x[b] @ w_in[tree, node] + bias[tree, node]
                y[b] += float(gelu(jnp.float32(z))) * w_out[tree, node]
                visited.add((tree, node))
                node = 2 * node + 1 + int(z > 0)
    return y, visited


shapes = st.tuples(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 4), st.integers(0, 8), st.integers(1, 6))


@settings(max_examples=8, deadline=None)
@given(shapes)
def test_backends_equal_the_naive_loop(shape):
    args = draw(*shape)
    wanted, _ = naive(*args)
    for backend in BACKENDS:
        found = fast_feedforward(*args, backend=backend)
        np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1.0, np.abs(wanted).max()))


@settings(max_examples=6, deadline=None)
@given(shapes)
def test_gradients_are_equal_and_touch_visited_rows_only(shape):
    x, *weights = draw(*shape)
    target = jax.random.normal(jax.random.key(1), x.shape)

    def loss(x, *weights, backend):
        return jnp.sum(fast_feedforward(x, *weights, backend=backend) * target)

    grads = {b: jax.grad(loss, argnums=(0, 1, 2, 3))(x, *weights, backend=b) for b in BACKENDS}
    for one, other in zip(grads["masked"], grads["gather"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, np.abs(one).max()))
    _, visited = naive(x, *weights)
    for gradient in (grads["gather"][1], grads["gather"][2], grads["gather"][3]):
        for tree, node in np.ndindex(gradient.shape[:2]):
            if (tree, node) not in visited:
                assert not np.any(gradient[tree, node])


@pytest.mark.parametrize("backend", BACKENDS)
def test_depth_zero_is_a_dense_layer(backend):
    x, w_in, bias, w_out = draw(0, 5, 7, 0, 6)
    dense = gelu(x @ w_in[:, 0].T + bias[:, 0][None]) @ w_out[:, 0]
    np.testing.assert_allclose(fast_feedforward(x, w_in, bias, w_out, backend=backend), dense, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trees_are_summed_and_rows_independent(backend):
    x, w_in, bias, w_out = draw(3, 16, 3, 4, 8)
    whole = fast_feedforward(x, w_in, bias, w_out, backend=backend)
    one_by_one = sum(
        fast_feedforward(x, w_in[i : i + 1], bias[i : i + 1], w_out[i : i + 1], backend=backend) for i in range(3)
    )
    np.testing.assert_allclose(whole, one_by_one, atol=1e-5)
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_allclose(fast_feedforward(x[order], w_in, bias, w_out, backend=backend), whole[order], atol=1e-6)
    np.testing.assert_allclose(fast_feedforward(x[4:5], w_in, bias, w_out, backend=backend), whole[4:5], atol=1e-6)


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
    x, w_in, bias, _ = draw(7, 256, 1, 6, d)
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

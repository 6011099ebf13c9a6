"""The original tree of leaf networks: sums, descents, annealing, usage and balance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufbert.ops import leaf_fff
from ufbert.ops.dense import gelu
from ufbert.ops.leaf_fff import LeafTree

SHAPES = [(1, 0, 1), (9, 5, 2), (4, 3, 5)]
"""b, depth, width: few, since each costs a compilation."""
shapes = st.tuples(st.integers(0, 2**16), st.sampled_from(SHAPES)).map(lambda drawn: (drawn[0], *drawn[1]))


def draw(seed: int, b: int, depth: int, width: int, d: int = 6, o: int = 4) -> tuple[LeafTree, jax.Array]:
    g = 2**depth
    sizes = [(g - 1, d), (g - 1,), (g, d, width), (g, width), (g, width, o), (g, o), (b, d)]
    rng = np.random.default_rng([seed, b, depth, width])
    *weights, x = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    return LeafTree(*weights), x


right_shares, leaf_weights = jax.jit(leaf_fff.right_shares), jax.jit(leaf_fff.leaf_weights)
descend = jax.jit(partial(leaf_fff.descend, activation=gelu))


@jax.jit
def soft(x, tree, temperature=1.0):
    return leaf_fff.mixture(x, tree, leaf_fff.leaf_weights(leaf_fff.right_shares(x, tree, temperature)), gelu)


@settings(max_examples=12, deadline=None)
@given(shapes)
def test_leaf_weights_sum_to_one_and_follow_the_path(shape):
    tree, x = draw(*shape)
    depth = leaf_fff.depth_of(tree)
    shares = np.asarray(right_shares(x, tree))
    weights = np.asarray(leaf_weights(jnp.asarray(shares)))
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    for leaf in range(2**depth):
        wanted, node = np.ones(len(x)), 0
        for bit in range(depth - 1, -1, -1):
            turn = leaf >> bit & 1
            wanted *= shares[:, node] if turn else 1 - shares[:, node]
            node = 2 * node + 1 + turn
        np.testing.assert_allclose(weights[:, leaf], wanted, atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(shapes)
def test_hard_descent_is_the_mixture_at_temperature_zero(shape):
    tree, x = draw(*shape)
    y, leaf = descend(x, tree)
    np.testing.assert_allclose(y, soft(x, tree, 1e-9), atol=2e-5)
    chosen = leaf_weights(right_shares(x, tree, 1e-9)).argmax(axis=1)
    np.testing.assert_array_equal(leaf, chosen)


def test_depth_zero_is_one_network():
    tree, x = draw(0, 5, 0, 3)
    dense = gelu(x @ tree.w_in[0] + tree.b_in[0][None]) @ tree.w_out[0] + tree.b_out[0][None]
    np.testing.assert_allclose(soft(x, tree), dense, atol=1e-5)
    np.testing.assert_allclose(descend(x, tree)[0], dense, atol=1e-5)


def test_rows_do_not_see_each_other():
    tree, x = draw(3, 40, 4, 3)
    y, leaf = descend(x, tree)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_allclose(descend(x[order], tree)[0], y[order], atol=1e-5)
    np.testing.assert_allclose(descend(x[7:8], tree)[0], y[7:8], atol=1e-5)
    assert descend(x[:0], tree)[0].shape == (0, 4)
    assert len(np.unique(leaf)) > 4


def test_a_tie_turns_right():
    tree, x = draw(0, 3, 3, 2)
    tree = tree._replace(node_b=jnp.zeros_like(tree.node_b))
    np.testing.assert_array_equal(leaf_fff.hard_leaves(jnp.zeros_like(x), tree), 7)


def test_straight_through_is_hard_in_value_and_soft_in_gradient():
    tree, x = draw(5, 16, 3, 4)

    def through(node_w):
        shares = leaf_fff.straight_through(leaf_fff.right_shares(x, tree._replace(node_w=node_w)))
        return leaf_fff.mixture(x, tree, leaf_fff.leaf_weights(shares), gelu)

    np.testing.assert_allclose(through(tree.node_w), descend(x, tree)[0], atol=1e-5)
    gradient = jax.grad(lambda w: jnp.sum(through(w) ** 2))(tree.node_w)
    assert float(jnp.abs(gradient).min(axis=1).max()) > 1e-4
    rounded = jax.grad(lambda w: jnp.sum(leaf_fff.right_shares(x, tree._replace(node_w=w)).round()))(tree.node_w)
    assert not np.any(rounded)  # what the reference's own hard training sends back


def test_region_leak_is_uniform_at_a_half():
    tree, x = draw(6, 1, 2, 2)
    shares = jnp.broadcast_to(leaf_fff.right_shares(x, tree), (20_000, 3))
    mean = leaf_fff.leaf_weights(leaf_fff.leak_regions(shares, 0.5, jax.random.key(0))).mean(axis=0)
    np.testing.assert_allclose(mean, 0.25, atol=0.01)
    np.testing.assert_array_equal(leaf_fff.leak_regions(shares, 0.0, jax.random.key(0)), shares)


def test_entropies_lie_between_the_clamp_and_ln_two():
    entropies = leaf_fff.node_entropies(jnp.array([[0.5, 0.0, 1.0]]))
    np.testing.assert_allclose(entropies, [np.log(2), 1.4816e-5, 1.4816e-5], rtol=2e-2)
    real = jnp.array([True, False])
    np.testing.assert_allclose(leaf_fff.node_entropies(jnp.array([[0.5], [0.01]]), real), np.log(2), rtol=1e-5)


def test_usage_sums_to_the_rows():
    tree, x = draw(7, 37, 4, 2)
    weights = leaf_fff.leaf_weights(leaf_fff.right_shares(x, tree))
    np.testing.assert_allclose(leaf_fff.soft_usage(weights).sum(), 37, rtol=1e-5)


def test_the_balance_loss_runs_from_one_to_the_number_of_leaves():
    even, one = jnp.eye(4), jnp.zeros((4, 4)).at[:, 2].set(1.0)
    np.testing.assert_allclose(leaf_fff.balance_loss(even), 1.0)
    np.testing.assert_allclose(leaf_fff.balance_loss(one), 4.0)
    padded = jnp.concatenate([even, one])
    np.testing.assert_allclose(leaf_fff.balance_loss(padded, jnp.arange(8) < 4), 1.0)


@pytest.mark.parametrize("leaves", [3, 6])
def test_only_full_trees_are_accepted(leaves):
    tree, _ = draw(0, 1, 2, 2)
    with pytest.raises(ValueError, match="not a full binary tree"):
        leaf_fff.depth_of(tree._replace(w_in=jnp.zeros((leaves, 6, 2))))


def test_annealing_and_straight_through_close_the_gap_between_soft_and_hard():
    """A soft tree that was not made to harden is worse when it must decide; both remedies mend most of that."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(512, 6)), jnp.float32)
    y = jnp.asarray(np.sign(x[:, :1] * x[:, 1:2]) * x[:, 2:3] + np.abs(x[:, 3:4]), jnp.float32)
    start, _ = draw(1, 1, 3, 4, o=1)
    start = jax.tree.map(lambda a: 0.4 * a, start)
    optimizer = optax.adam(1e-2)

    def losses(temperature, hard):
        def loss_of(tree, progress):
            shares = leaf_fff.right_shares(x, tree, temperature**progress)
            shares = leaf_fff.straight_through(shares) if hard else shares
            return jnp.mean((leaf_fff.mixture(x, tree, leaf_fff.leaf_weights(shares), gelu) - y) ** 2)

        def step(carry, progress):
            tree, state = carry
            updates, state = optimizer.update(jax.grad(loss_of)(tree, progress), state)
            return (optax.apply_updates(tree, updates), state), None

        (tree, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jnp.linspace(0, 1, 400))
        decided = jnp.mean((descend(x, tree)[0] - y) ** 2)
        return float(loss_of(tree, 1.0)), float(decided)

    soft_loss, soft_decided = losses(1.0, False)
    annealed_loss, annealed = losses(0.005, False)
    hard_loss, hard_decided = losses(1.0, True)
    assert soft_decided > 3 * soft_loss
    assert annealed < 1.1 * annealed_loss
    assert annealed < 0.3 * soft_decided
    np.testing.assert_allclose(hard_decided, hard_loss, rtol=1e-3)
    assert hard_decided < 0.5 * soft_decided

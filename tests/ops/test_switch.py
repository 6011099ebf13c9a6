"""Experts: grouped networks equal a loop, routing and capacity, padding that is never routed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ufbert.ops import switch
from ufbert.ops.dense import ACTIVATIONS, grouped_mlp

RELU = ACTIVATIONS["relu"]


def draw(seed: int, r: int, e: int, d: int = 5, f: int = 3):
    sizes = [(r, d), (d, e), (e, d, f), (e, f, d)]
    rng = np.random.default_rng([seed, r, e])
    return [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]


grouped = jax.jit(partial(grouped_mlp, activation=RELU))


@settings(max_examples=16, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1, 7, 70]), st.sampled_from([1, 9]), st.booleans())
def test_grouped_networks_equal_a_loop(seed, r, g, biased):
    x, _, w_in, w_out = draw(seed, r, g)
    rng = np.random.default_rng(seed)
    group = rng.integers(0, g, r) if seed % 3 else np.full(r, rng.integers(0, g))
    b_in, b_out = (jnp.asarray(rng.normal(size=(g, n)), jnp.float32) for n in (3, 5))
    biases = (b_in, b_out) if biased else (None, None)
    found = grouped(x, jnp.asarray(group, jnp.int32), w_in, w_out, b_in=biases[0], b_out=biases[1])
    x, w_in, w_out, b_in, b_out, found = (np.asarray(a) for a in (x, w_in, w_out, b_in, b_out, found))
    for i, e in enumerate(group):
        hidden = np.maximum(x[i] @ w_in[e] + (b_in[e] if biased else 0.0), 0.0)
        np.testing.assert_allclose(found[i], hidden @ w_out[e] + (b_out[e] if biased else 0.0), atol=1e-4)


def test_room_for_all_equals_no_limit():
    x, router, w_in, w_out = draw(0, 24, 4)
    routing = switch.route(x, router)
    limited, kept = switch.switch_with_capacity(x, routing, w_in, w_out, RELU, 24)
    assert bool(kept.all())
    np.testing.assert_allclose(limited, switch.switch_whole(x, routing, w_in, w_out, RELU), atol=1e-5)


def test_tokens_over_capacity_get_nothing_and_the_first_ones_come_first():
    expert = jnp.array([0, 0, 1, 0, 1, 0], jnp.int32)
    kept, place = switch.kept_tokens(expert, 2, 2)
    np.testing.assert_array_equal(kept, [True, True, True, False, True, False])
    np.testing.assert_array_equal(place, [0, 1, 0, 2, 1, 3])
    assert [switch.capacity(24, 4, 1.5), switch.capacity(10, 4, 1.0), switch.capacity(1, 8, 1.0)] == [9, 3, 1]


def test_padding_is_never_routed():
    x, router, w_in, w_out = draw(1, 12, 3)
    real = jnp.arange(12) % 3 != 1
    routing = switch.route(x, router, real)
    alone = switch.route(x[real], router)
    np.testing.assert_allclose(routing.balance_loss, alone.balance_loss, rtol=1e-5)
    np.testing.assert_allclose(routing.z_loss, alone.z_loss, rtol=1e-5)
    y, kept = switch.switch_with_capacity(x, routing, w_in, w_out, RELU, 3, real)
    few, few_kept = switch.switch_with_capacity(x[real], alone, w_in, w_out, RELU, 3)
    assert not np.any(kept[~real])
    np.testing.assert_array_equal(kept[real], few_kept)
    np.testing.assert_allclose(y[real], few, atol=1e-5)
    assert not np.any(y[~real])
    assert not np.any(switch.switch_whole(x, routing, w_in, w_out, RELU, real)[~real])


def test_perfect_balance_costs_one_and_collapse_costs_the_number_of_experts():
    even = switch.route(100.0 * jnp.eye(4), jnp.eye(4))
    np.testing.assert_allclose(even.balance_loss, 1.0, rtol=1e-5)
    one = switch.route(100.0 * jnp.ones((6, 1)) * jnp.eye(4)[:1], jnp.eye(4))
    np.testing.assert_allclose(one.balance_loss, 4.0, rtol=1e-5)


def test_jitter_needs_a_key_and_stays_within_its_bound():
    x, router, _, _ = draw(2, 50, 4)
    still = switch.route(x, router, jitter=0.1)
    np.testing.assert_array_equal(still.probability, switch.route(x, router).probability)
    shaken = switch.route(x, router, jitter=0.1, key=jax.random.key(0))
    moved = np.abs(np.log(shaken.probability / still.probability))
    assert 1e-3 < moved.max() < 2 * 0.1 * np.abs(x).sum(1).max() * np.abs(router).max()

"""Rotary positions, Fourier mixing, and what the tree layer counts."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ufbert.ops import fff
from ufbert.ops.dense import ACTIVATIONS, gelu, symmetric_gelu
from ufbert.ops.mixing import fourier_mix, rotate


@jax.jit
def rotated_product(query, key, p, q):
    return jnp.einsum("bthk,bthk->h", rotate(query, p, 1e4), rotate(key, q, 1e4))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(0, 400), st.integers(0, 400), st.integers(0, 200))
def test_rotated_products_depend_on_the_offset_only(seed, p, q, shift):
    query, key = jax.random.normal(jax.random.key(seed), (2, 1, 1, 2, 16))

    def product(p, q):
        return np.asarray(rotated_product(query, key, jnp.array([[p]]), jnp.array([[q]])))

    np.testing.assert_allclose(product(p, q), product(p + shift, q + shift), atol=5e-3)
    assert np.abs(product(p, q) - product(p, q + 1)).max() > 1e-6  # it does rotate


def test_rotation_keeps_lengths_and_position_zero():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    turned = rotate(x, jnp.arange(5)[None], 1e4)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_the_gradient_of_a_rotation_is_that_of_its_formula():
    x, dy = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8))
    position_ids = jnp.array([[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]])
    angle = jnp.einsum("bt,r->btr", position_ids, 1e4 ** (-jnp.arange(4) / 4))[:, :, None]

    def formula(x):
        turned = (x[..., :4] + 1j * x[..., 4:]) * jnp.exp(1j * angle)
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    for found, wanted in zip(
        *(jax.vjp(f, x)[1](dy) for f in (lambda x: rotate(x, position_ids, 1e4), formula)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_fourier_mixing_is_the_transform_written_out():
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 6, 8)), np.float64)
    t, d = (np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) for n in (6, 8))
    wanted = (t @ x @ d).real
    np.testing.assert_allclose(fourier_mix(jnp.asarray(x, jnp.float32), ortho=False), wanted, atol=1e-4)
    np.testing.assert_allclose(fourier_mix(jnp.asarray(x, jnp.float32), ortho=True), wanted / np.sqrt(48), atol=1e-5)


def test_symmetric_gelu_is_even_and_alive_on_the_left():
    z = jnp.linspace(-5, 5, 101)
    np.testing.assert_allclose(symmetric_gelu(z), symmetric_gelu(-z), atol=1e-6)
    np.testing.assert_allclose(symmetric_gelu(z), gelu(z) + gelu(-z), atol=1e-5)
    slope = jax.vmap(jax.grad(lambda v: symmetric_gelu(v)))(z)
    assert float(slope[10]) < -0.99
    assert abs(float(jax.grad(lambda v: gelu(v))(-4.0))) < 1e-3
    assert set(ACTIVATIONS) == {"gelu", "gelu_tanh", "relu", "symmetric_gelu"}


def random_paths(seed: int, b: int = 200, m: int = 2, depth: int = 4, d: int = 6):
    x, w_in = (
        jax.random.normal(jax.random.key(seed), (b, d)),
        jax.random.normal(jax.random.key(1), (m, 2 ** (depth + 1) - 1, d)),
    )
    return x, w_in, jnp.zeros(w_in.shape[:2])


def test_visits_sum_to_the_rows_at_every_level():
    nodes, _ = fff.path_nodes(*random_paths(0))
    visits = np.asarray(fff.node_visits(nodes, 31))
    for level in range(5):
        np.testing.assert_array_equal(visits[:, 2**level - 1 : 2 ** (level + 1) - 1].sum(1), [200, 200])
    half = np.asarray(fff.node_visits(nodes, 31, jnp.arange(200) < 50))
    np.testing.assert_array_equal(half[:, 0], [50, 50])


def test_usage_finds_dead_subtrees():
    visits = np.array([[8.0, 8, 0, 4, 4, 0, 0]])
    summary = fff.usage_summary(visits)
    assert summary == {"nodes_visited": 4 / 7, "leaves_in_use": 0.5, "dead_subtrees": 1.0}
    assert fff.usage_summary(np.array([[4.0, 2, 2, 1, 1, 1, 1]]))["leaves_in_use"] == 1.0


def test_balance_is_one_for_even_turns_and_its_gradient_evens_them():
    x, w_in, bias = random_paths(3, m=1, depth=3)

    def loss_of(bias):
        return fff.balance_loss(*fff.path_nodes(x, w_in, bias), 15)

    skewed = bias + 2.0
    before = float(loss_of(skewed))
    assert 1.3 < before < 2.0
    assert 0.98 < float(loss_of(bias)) < 1.15
    stepped, slope = skewed, jax.jit(jax.grad(loss_of))
    for _ in range(200):
        stepped = stepped - 0.5 * slope(stepped)
    assert float(loss_of(stepped)) < before - 0.2
    right = np.asarray(fff.path_nodes(x, w_in, stepped)[1][..., 0] > 0).mean()
    assert 0.35 < right < 0.65
    real = jnp.arange(200) < 120
    nodes, logits = fff.path_nodes(x, w_in, skewed)
    alone = fff.balance_loss(nodes[:120], logits[:120], 15)
    np.testing.assert_allclose(fff.balance_loss(nodes, logits, 15, real), alone, rtol=1e-5)

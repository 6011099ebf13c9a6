"""Masking hides exactly what it promises; attention sees exactly what it may."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufbert import nn
from ufbert.config.presets import load_preset, preset_names
from ufbert.ops.losses import cross_entropy
from ufbert.ops.masking import count_masked, mask_tokens
from ufbert.ops.mixing import attention, attention_mask, sinusoid

SPECIAL = (0, 2, 3)


mask = jax.jit(
    partial(mask_tokens, vocab_size=100, mask_id=4, special_ids=SPECIAL),
    static_argnames=("max_rate",),
)


def masked(ids, seed=0, rate=0.25, max_rate=None):
    return mask(jnp.asarray(ids, jnp.int32), jax.random.key(seed), rate=rate, max_rate=max_rate or rate)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([(16, 0.4), (64, 0.25), (128, 0.15)]))
def test_every_row_hides_exactly_its_share(seed, size):
    t, rate = size
    ids = np.random.default_rng(seed).integers(5, 100, (3, t))
    ids[:, 0], ids[:, 5] = 2, 3
    found = masked(ids, seed, rate)
    k = count_masked(rate, t)
    assert k == round(rate * t)
    for row in range(3):
        positions = np.asarray(found.positions[row])
        assert len(set(positions.tolist())) == k
        assert not set(positions.tolist()) & {0, 5}
        np.testing.assert_array_equal(found.labels[row], ids[row, positions])
        untouched = np.setdiff1d(np.arange(t), positions)
        np.testing.assert_array_equal(found.ids[row, untouched], ids[row, untouched])
        assert np.sum(np.asarray(found.ids[row]) == 4) >= round(0.8 * k)
    np.testing.assert_array_equal(found.weights, 1.0)


def test_the_split_of_32_is_26_3_3():
    ids = np.full((1, 128), 50)
    found = np.asarray(masked(ids).ids)[0]
    assert np.sum(found == 4) == 26
    assert np.sum(found != 50) <= 29
    assert np.sum(found == 50) >= 96 + 3


@pytest.mark.parametrize("rate", [0.3, 0.25, 0.2, 0.15])
def test_a_lower_rate_as_an_array_hides_what_its_own_compilation_would(rate):
    ids = np.random.default_rng(0).integers(5, 100, (3, 64))
    staged = jax.jit(lambda ids, rate: masked(ids, 1, rate, 0.3))(ids, jnp.float32(rate))
    k = round(rate * 64)
    np.testing.assert_array_equal(staged.weights.sum(axis=1), k)
    np.testing.assert_array_equal(staged.weights[:, :k], 1.0)
    np.testing.assert_array_equal(staged.positions[:, :k], masked(ids, 1, rate).positions)
    assert np.all(np.sum(np.asarray(staged.ids) == 4, axis=1) >= round(0.8 * k))
    assert np.all(np.sum(np.asarray(staged.ids) != ids, axis=1) <= round(0.8 * k) + round(0.1 * k))


def test_a_hidden_token_leaves_no_trace():
    ids = np.random.default_rng(0).integers(5, 100, (4, 64))
    found = masked(ids, seed=9)
    other = ids.copy()
    for row in range(4):
        hidden = np.asarray(found.positions[row])[: round(0.8 * 16)]
        other[row, hidden] = (ids[row, hidden] - 5 + 17) % 95 + 5
    assert np.any(other != ids)
    np.testing.assert_array_equal(found.ids, masked(other, seed=9).ids)


def test_rows_short_of_words_weigh_less():
    ids = np.full((1, 16), 2)
    ids[0, 3] = 50
    found = masked(ids)
    assert float(found.weights.sum()) == 1.0
    assert np.sum(np.asarray(found.ids) == 2) == 15


def test_visibility_is_the_own_document_and_never_padding():
    segments = jnp.array([[1, 1, 2, 0]])
    visible = np.asarray(attention_mask(segments))[0].astype(int)
    np.testing.assert_array_equal(visible, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("segments", [None, [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]])
def test_attention_and_its_gradients_are_those_of_jax(segments, dtype):
    mask = None if segments is None else attention_mask(jnp.array(segments))
    q, k, v, dy = jax.random.normal(jax.random.key(0), (4, 3, 6, 2, 4)).astype(dtype)

    def output_and_gradients(implementation):
        y, back = jax.vjp(lambda *qkv: attention(*qkv, mask, implementation=implementation), q, k, v)
        return y, *back(dy)

    for found, wanted in zip(*(output_and_gradients(i) for i in (None, "xla")), strict=True):
        assert found.dtype == wanted.dtype
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2}
        np.testing.assert_allclose(np.float32(found), np.float32(wanted), **close)


def test_dropout_attention_equals_attention_in_the_mean():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8))
    exact = attention(q, k, v)
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = jax.vmap(lambda key: attention(q, k, v, dropout=0.1, key=key))(keys)
    np.testing.assert_allclose(drawn.mean(0), exact, atol=0.03)
    assert float(jnp.abs(drawn[0] - exact).max()) > 0.01


encode = jax.jit(nn.encode, static_argnames="config")


@pytest.mark.parametrize("name", [n for n in preset_names() if "fnet" not in n and "path" not in n])
def test_no_token_sees_padding_or_a_neighbouring_document(name):
    small = {"vocab_size": 50, "d_model": 32, "n_heads": 2, "n_layers": 2, "d_hidden": 32, "max_len": 16}
    model = replace(load_preset(name).model, **small, tree_depth=3, n_trees=2, leaf_width=4, n_experts=3)
    params = nn.init(model, jax.random.key(0))
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    ids = jnp.array([[2, 9, 3, 2, 7, 8, 3, 0, 0]])
    other = jnp.array([[2, 9, 3, 2, 30, 31, 32, 44, 45]])
    hidden, _ = encode(params, model, ids, segments)
    changed, _ = encode(params, model, other, segments)
    np.testing.assert_array_equal(hidden[:, :3], changed[:, :3])
    assert float(jnp.abs(hidden[:, 3:7] - changed[:, 3:7]).max()) > 1e-3
    padded, _ = encode(params, model, ids.at[:, 7:].set(40), segments)
    np.testing.assert_array_equal(hidden[:, :7], padded[:, :7])


def test_equal_logits_prefer_no_label():
    logits = jnp.array([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0], [0.0, 0.1, 0.1]])
    sums = cross_entropy(logits, jnp.array([1, 1, 1]), jnp.ones(3))
    assert float(sums.correct) == 1.0


def test_cross_entropy_is_the_closed_form():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    sums = cross_entropy(logits, jnp.array([0, 2]), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(sums.loss, np.log(2) + np.log(10), rtol=1e-6)
    assert (float(sums.count), float(sums.correct)) == (2.0, 1.0)


def test_sinusoid_has_sines_on_even_channels():
    table = np.asarray(sinusoid(8, 6))
    np.testing.assert_allclose(table[3, 2], np.sin(3 / 10000 ** (2 / 6)), rtol=1e-5)
    np.testing.assert_allclose(table[3, 5], np.cos(3 / 10000 ** (4 / 6)), rtol=1e-5)

"""Products have the gradients of the plain formula. Dropout: the right share, nothing predictable from entry to entry or key to
key, and no cost without a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.ops.dense import dropout, keep_mask, product, token_logits

N = 1 << 18


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("f", [5, 9])  # narrower and wider than x
@pytest.mark.parametrize(("ours", "formula"), [(product, "btd,df->btf"), (token_logits, "btd,fd->btf")])
def test_a_product_and_its_gradients_are_those_of_the_formula(ours, formula, f, dtype):
    shapes = (2, 5, 7), (7, f) if ours is product else (f, 7), (2, 5, f)
    x, w, dy = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes))
    wide = jnp.float32 if ours is token_logits else dtype

    def found_and_gradients(f):
        y, back = jax.vjp(f, x, w)
        return y, *back(dy.astype(y.dtype))

    found = jax.jit(lambda: found_and_gradients(ours))()
    wanted = jax.jit(lambda: found_and_gradients(lambda x, w: jnp.einsum(formula, x, w, preferred_element_type=wide)))()
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5 if dtype == jnp.float32 else 2e-2, atol=1e-5)


def masks(n, share=0.9, shape=(N,)):
    keys = [*jax.random.split(jax.random.key(7), n), *(jax.random.fold_in(jax.random.key(3), i) for i in range(n))]
    return np.stack([np.asarray(keep_mask(key, share, shape), np.float64) for key in keys])


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_share_that_stays_is_the_one_asked_for(share):
    means = masks(8, share).mean(axis=1)
    assert np.all(np.abs(means - share) < 5 * np.sqrt(share * (1 - share) / N))
    assert np.ptp(means) > 0


def test_entries_say_nothing_about_each_other():
    for mask in masks(4, 0.5):
        centred = mask - mask.mean()
        for lag in (1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 128, 384, 768, 1024, 4096):
            correlation = np.mean(centred[:-lag] * centred[lag:]) / np.var(mask)
            assert abs(correlation) < 5 / np.sqrt(N), lag
        patterns = np.bincount(mask.reshape(-1, 8).astype(int) @ (1 << np.arange(8)), minlength=256)
        expected = N / 8 / 256
        chi_square = ((patterns - expected) ** 2 / expected).sum()
        assert 255 - 6 * np.sqrt(510) < chi_square < 255 + 6 * np.sqrt(510)


def test_keys_say_nothing_about_each_other():
    found = masks(6, 0.5)
    correlations = np.corrcoef(found)[np.triu_indices(len(found), 1)]
    assert np.all(np.abs(correlations) < 5 / np.sqrt(N))


def test_what_stays_is_scaled_and_without_a_key_all_stays():
    x = jnp.linspace(1.0, 2.0, 1000).reshape(10, 100)
    found = dropout(x, 0.25, jax.random.key(0))
    zero = np.asarray(found == 0)
    assert 150 < zero.sum() < 350
    np.testing.assert_allclose(np.asarray(found)[~zero], np.asarray(x)[~zero] / 0.75, rtol=1e-6)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert dropout(x.astype(jnp.bfloat16), 0.5, jax.random.key(0)).dtype == jnp.bfloat16
    side_by_side = jax.vmap(lambda x, key: dropout(x, 0.25, key))(x[None], jax.random.key(0)[None])
    np.testing.assert_array_equal(side_by_side[0], found)

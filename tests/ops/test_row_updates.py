"""Gradients as lists of rows, and AdaGrad on the rows that were read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.ops.row_updates import RowGradient, adagrad, merged, spread

ROWS, WIDTH = 12, 3


def drawn(n=20, seed=0) -> RowGradient:
    """Entries of rows 0 to 8, most of them more than once, and of no row."""
    rng = np.random.default_rng(seed)
    rows = rng.choice([*range(9), ROWS], n)
    return RowGradient(jnp.asarray(rows, jnp.int32), jnp.asarray(rng.normal(size=(n, WIDTH)), jnp.float32))


def summed(gradient: RowGradient) -> np.ndarray:
    total = np.zeros((ROWS, WIDTH))
    for row, value in zip(np.asarray(gradient.rows), np.asarray(gradient.values), strict=True):
        if row < ROWS:
            total[row] += value
    return total


def test_entries_of_equal_rows_add_up():
    gradient = drawn()
    one = merged(gradient, ROWS)
    real = np.asarray(one.rows)[np.asarray(one.rows) < ROWS]
    assert sorted(real) == sorted(set(np.asarray(gradient.rows).tolist()) - {ROWS})
    for array in (spread(gradient, jnp.zeros((ROWS, WIDTH))), summed(one)):
        np.testing.assert_allclose(array, summed(gradient), atol=1e-6)
    np.testing.assert_allclose(spread(gradient, jnp.ones((ROWS, WIDTH))), 1 + summed(gradient), atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_adagrad_is_that_of_a_loop_and_leaves_other_rows_alone(whole):
    table = start = jnp.asarray(np.random.default_rng(5).normal(size=(ROWS, WIDTH)), jnp.float32)
    squares, wanted, sums = jnp.zeros(ROWS), np.asarray(table, np.float64), np.zeros(ROWS)
    step = jax.jit(adagrad)
    for seed in range(3):
        gradient, g = drawn(seed=seed), summed(drawn(seed=seed))
        given = spread(gradient, jnp.zeros((ROWS, WIDTH))) if whole else gradient
        table, squares = step(table, squares, given, 0.1)
        for row in range(9):
            if g[row].any():
                sums[row] += (g[row] ** 2).mean()
                wanted[row] -= 0.1 * g[row] / np.sqrt(sums[row])
    np.testing.assert_allclose(table, wanted, atol=1e-5)
    np.testing.assert_allclose(squares, sums, rtol=1e-5)
    np.testing.assert_array_equal(table[9:], start[9:])
    assert not np.asarray(squares[9:]).any()

"""Tables of which a batch reads few rows: their gradient as a list of rows, and the optimizer that touches those alone."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class RowGradient(NamedTuple):
    """The gradient of a table, as the gradients of the rows that were read. It is the sum over all entries of equal row."""

    rows: Int[Array, " n"]
    """Number of each row; a number past the end stands for none."""
    values: Float[Array, "n w"]


def spread(gradient: RowGradient, onto: Float[Array, "rows w"]) -> Float[Array, "rows w"]:
    """Add a gradient to the array of a whole table."""
    return onto.at[gradient.rows].add(gradient.values, mode="drop")


def merged(gradient: RowGradient, n_rows: int) -> RowGradient:
    """Add up the entries of equal rows: the sum stands at the first of them, and the others point past the end."""
    n = len(gradient.rows)
    entries = jnp.arange(n, dtype=jnp.int32)
    first_of_row = jnp.full(n_rows, n, jnp.int32).at[gradient.rows].min(entries, mode="drop")
    first = first_of_row.at[gradient.rows].get(mode="fill", fill_value=n)
    values = jnp.zeros_like(gradient.values).at[first].add(gradient.values, mode="drop")
    return RowGradient(jnp.where(first == entries, gradient.rows, n_rows), values)


def adagrad(
    table: Float[Array, "rows w"],
    squares: Float[Array, " rows"],
    gradient: RowGradient | Float[Array, "rows w"],
    lr: Float[Array, ""] | float,
) -> tuple[Float[Array, "rows w"], Float[Array, " rows"]]:
    """Take a step of AdaGrad with one rate a row; return the new table and its new sums of squares.

    A row r with gradient g moves by -lr g / sqrt(s_r), where s_r is the sum over all steps of the mean of g^2 (Duchi et al.
    2011; one sum a row as in DLRM, arXiv 1906.00091). So a row without gradient stays as it is, and a list of rows gives what
    the whole table's gradient gives, up to rounding.
    """
    if not isinstance(gradient, RowGradient):
        squares = squares + jnp.square(gradient).mean(axis=-1)
        return table - lr * gradient * _inverse_root(squares)[:, None], squares
    rows, values = merged(gradient, len(table))
    new = squares.at[rows].get(mode="fill", fill_value=1.0) + jnp.square(values).mean(axis=-1)
    step = lr * values * _inverse_root(new)[:, None]
    return table.at[rows].add(-step, mode="drop"), squares.at[rows].set(new, mode="drop")


def _inverse_root(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """1 / sqrt(x), and 0 for 0."""
    return jnp.where(x > 0, 1.0 / jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)

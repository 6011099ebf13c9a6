"""Tables of which a batch reads few rows: their gradient as a list of rows, and the optimizer that touches those alone.

AdamW would read and write every row of every table, its two moments and its average in each update. Here the optimizer is
AdaGrad with one rate a row. Tables are neither clipped, nor do they decay, nor is there an average of their past: the rate
falls to zero at a run's end, and so do the last steps of their rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class RowGradient(NamedTuple):
    """The gradient of a table, as the gradients of the rows that were read. It is the sum over all entries of equal row."""

    rows: Int[Array, " n"]
    """Number of each row; a number past the end stands for none."""
    values: Float[Array, "n w"]


class TablesState(NamedTuple):
    """The optimizer's state of a model that has tables."""

    others: Any
    """That of all other parameters."""
    squares: dict[str, Float[Array, " rows"]]
    """By table, the sum of squares of each row."""


def row_gradient(rows: Int[Array, "b t"], values: Float[Array, "b t w"]) -> RowGradient:
    """Make a table's gradient of the rows that tokens read, and the gradients with respect to these."""
    return RowGradient(rows.reshape(-1), values.reshape(-1, values.shape[-1]))


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


def start_tables(others: Any, tables: Mapping[str, Any]) -> Any:
    """Add the state of tables, if there are any, to that of the other parameters' optimizer."""
    if not tables:
        return others
    return TablesState(others, {name: jnp.zeros(len(table), table.dtype) for name, table in tables.items()})


def update_tables(
    tables: Mapping[str, Any],
    squares: Mapping[str, Any],
    gradients: Mapping[str, Any],
    lr: Float[Array, ""],
    applied: Bool[Array, ""] | bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take a step of AdaGrad on every table; return them and their sums of squares. Unless `applied`, nothing changes."""
    new = {}
    for name, table in tables.items():
        g = gradients[name]
        # A branch would copy whole tables. Rows past the end and gradients of zero change nothing.
        if isinstance(g, RowGradient):
            g = g._replace(rows=jnp.where(applied, g.rows, len(table)))
        else:
            g = jnp.where(applied, g, 0.0)
        new[name] = adagrad(table, squares[name], g, lr)
    return {name: pair[0] for name, pair in new.items()}, {name: pair[1] for name, pair in new.items()}


def scaled(gradients: Mapping[str, Any], share: Float[Array, ""]) -> dict[str, Any]:
    """Multiply the gradients of tables."""
    return {
        name: g._replace(values=g.values * share) if isinstance(g, RowGradient) else g * share
        for name, g in gradients.items()
    }


def all_finite(gradients: Mapping[str, Any]) -> Bool[Array, ""]:
    """Tell if the gradients of tables hold finite numbers alone."""
    arrays = [g.values if isinstance(g, RowGradient) else g for g in gradients.values()]
    return jnp.isfinite(sum((jnp.sum(jnp.square(array)) for array in arrays), jnp.zeros(())))

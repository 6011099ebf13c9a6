"""The optimizer of hashed tables: AdaGrad with one rate a row, which touches the rows that were read and no others.

AdamW would read and write every row of every table, its two moments and its average in each update. The sums of squares stand
beside the state of the other parameters' optimizer, if a model has tables. Tables are neither clipped, nor do they decay, nor
is there an average of their past: the rate falls to zero at a run's end, and so do the last steps of their rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ufbert.nn.ngrams import join_tables, split_tables
from ufbert.ops.row_updates import RowGradient, adagrad


class TablesState(NamedTuple):
    """The optimizer's state of a model that has hashed tables."""

    others: Any
    """That of all other parameters."""
    squares: dict[str, Float[Array, " rows"]]
    """By table, the sum of squares of each row."""


def start(others: Any, tables: Mapping[str, Any]) -> Any:
    """Add the state of tables to that of the other parameters' optimizer."""
    if not tables:
        return others
    return TablesState(others, {name: jnp.zeros(len(table), table.dtype) for name, table in tables.items()})


def row_gradient(rows: Int[Array, "b t"], values: Float[Array, "b t w"]) -> RowGradient:
    """Make a table's gradient of the rows that tokens read."""
    return RowGradient(rows.reshape(-1), values.reshape(-1, values.shape[-1]))


def all_finite(gradients: Mapping[str, Any]) -> Bool[Array, ""]:
    """Tell if the gradients of tables hold finite numbers alone."""
    arrays = [g.values if isinstance(g, RowGradient) else g for g in gradients.values()]
    return jnp.isfinite(sum((jnp.sum(jnp.square(array)) for array in arrays), jnp.zeros(())))


def update(
    tables: Mapping[str, Any],
    squares: Mapping[str, Any],
    gradients: Mapping[str, Any],
    share: Float[Array, ""],
    lr: Float[Array, ""],
    applied: Bool[Array, ""],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take a step along `share` times the gradients, if it is `applied`; return the tables and their sums of squares."""
    new = {}
    for name, table in tables.items():
        g = gradients[name]
        # A branch would copy whole tables. Rows past the end and gradients of zero change nothing.
        if isinstance(g, RowGradient):
            g = RowGradient(jnp.where(applied, g.rows, len(table)), g.values * share)
        else:
            g = jnp.where(applied, g * share, 0.0)
        new[name] = adagrad(table, squares[name], g, lr)
    return {name: pair[0] for name, pair in new.items()}, {name: pair[1] for name, pair in new.items()}


def averaged_params(params: Any, average: Any) -> Any:
    """Put the tables of the parameters into the average of past weights, which has none."""
    return join_tables(average, split_tables(params)[1])

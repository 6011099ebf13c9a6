"""Hashed tables of n-grams: a vector of each token from the rows that its own id and its neighbours' pick.

Their parameters are `encoder/ngrams/KEY`, (rows, width) each, and `encoder/ngrams/projection/kernel` where rows are
narrower than the model.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ufbert.config import ModelConfig
from ufbert.nn.layers import dense
from ufbert.ops.ngrams import NGRAMS, ngram_rows

Rows = dict[str, Float[Array, "b t w"]]
"""Rows of the tables that the tokens of a batch read, by the table's name."""


class Ngrams(nn.Module):
    """The sum of the rows that each token reads, or, of narrower ones, a linear layer of them side by side.

    Rows start at zero: an n-gram that training never met adds nothing. `gathered` are the rows, if they were looked up before.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        gathered: Rows | None = None,
        causal: bool = False,
    ) -> Float[Array, "b t d"]:
        cfg = self.config
        if gathered is None:
            shape = (cfg.ngram_rows, cfg.ngram_width or cfg.d_model)
            tables: dict[str, Any] = {key: self.param(key, nn.initializers.zeros, shape) for key in cfg.ngram_keys}
            gathered = {key: tables[key][rows] for key, rows in table_rows(cfg, ids, segment_ids, causal).items()}
        rows = [gathered[key] for key in cfg.ngram_keys]
        if not cfg.ngram_width:
            return sum(rows[1:], rows[0])
        x = jnp.concatenate(rows, axis=-1)
        return dense(cfg, cfg.d_model, "projection", use_bias=False)(x).astype(jnp.float32)


def table_rows(
    config: ModelConfig, ids: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None, causal: bool = False
) -> dict[str, Int[Array, "b t"]]:
    """Return the row of each table that every token reads. A neighbour that is not there has the id of padding.

    With `causal`, no right neighbour is there.
    """
    return ngram_rows(
        ids, segment_ids, keys=config.ngram_keys, rows=config.ngram_rows, missing=config.pad_id, causal=causal
    )


def split_tables(params: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Take the tables out of a model's parameters, or of a tree of like shape: (the others, the tables by their names)."""
    encoder = params.get("encoder", {})
    if "ngrams" not in encoder:
        return params, {}
    tables: dict[str, Any] = {key: encoder["ngrams"][key] for key in NGRAMS if key in encoder["ngrams"]}
    rest = {key: part for key, part in encoder["ngrams"].items() if key not in tables}
    return {**params, "encoder": {**encoder, "ngrams": rest}}, tables


def join_tables(params: Mapping[str, Any], tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put tables back into the tree that they were taken out of."""
    if not tables:
        return params
    encoder = params["encoder"]
    return {**params, "encoder": {**encoder, "ngrams": {**encoder["ngrams"], **tables}}}


def averaged_params(params: Mapping[str, Any], average: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put the tables of the parameters into the average of past weights, which has none."""
    return join_tables(average, split_tables(params)[1])

"""Hashed tables in the encoder: what they add, where, and to whom."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.nn.ngrams import table_rows
from ufbert.ops.mixing import sinusoid

SMALL = ModelConfig(
    vocab_size=60, max_len=16, d_model=32, n_layers=2, n_heads=2, d_hidden=24, pooler_width=16, init_std=0.2,
    ngram_rows=101,
)  # fmt: skip
IDS = jnp.asarray(np.random.default_rng(0).integers(5, 60, (3, 16)), jnp.int32)
encode = jax.jit(nn.encode, static_argnames="config")


def layer_norm(x, scale):
    off = x - x.mean(axis=-1, keepdims=True)
    return off / np.sqrt(np.square(off).mean(axis=-1, keepdims=True) + 1e-12) * scale


def drawn(config: ModelConfig, seed=1) -> dict:
    """Parameters whose tables are random: they start at zero."""
    params = nn.init(config, jax.random.key(0))
    tables = params["encoder"]["ngrams"]
    for i, key in enumerate(config.ngram_keys):
        tables[key] = 0.3 * jax.random.normal(jax.random.key(seed + i), tables[key].shape)
    return params


def test_tables_start_at_zero_and_leave_all_other_weights_as_they_were():
    with_tables, without = nn.init(SMALL, jax.random.key(0)), nn.init(replace(SMALL, ngram_rows=0), jax.random.key(0))
    tables = with_tables["encoder"].pop("ngrams")
    assert {key: table.shape for key, table in tables.items()} == dict.fromkeys(SMALL.ngram_keys, (101, 32))
    assert not any(np.any(table) for table in tables.values())
    jax.tree.map(np.testing.assert_array_equal, with_tables, without)


@pytest.mark.parametrize("width", [0, 8])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_token_gets_its_rows_at_the_place_that_is_set(width, layer):
    config = replace(SMALL, ngram_width=width, ngram_layer=layer, ngram_keys=("after", "trigram"))
    params, rows = drawn(config), table_rows(config, IDS, None)
    tables = params["encoder"]["ngrams"]
    parts = [np.asarray(tables[key])[np.asarray(rows[key])] for key in ("after", "trigram")]
    added = (
        np.concatenate(parts, axis=-1) @ np.asarray(tables["projection"]["kernel"]) if width else parts[0] + parts[1]
    )
    # The same stream in a model without tables, whose embeddings are what the first block (or the second) should read.
    encoder = {name: part for name, part in params["encoder"].items() if name != "ngrams"}
    plain = replace(config, ngram_rows=0, embedding_norm=False, max_len=48, vocab_size=48)
    bare = {**encoder["embeddings"], "position_scale": jnp.zeros(1)}
    norm = bare.pop("norm")
    if layer == 0:
        x = np.asarray(params["encoder"]["embeddings"]["tokens"])[np.asarray(IDS)] + added
        x = x + float(encoder["embeddings"]["position_scale"][0]) * np.asarray(sinusoid(config.max_len, config.d_model))
        x = layer_norm(x, np.asarray(norm["scale"]))
        rest = encoder
    else:
        one = replace(config, ngram_rows=0, ngram_layer=0, n_layers=1, final_norm=False)
        x = np.asarray(encode({"encoder": encoder}, one, IDS)[0]) + added
        rest = {"layer_00": encoder["layer_01"], "final_norm": encoder["final_norm"]}
        plain = replace(plain, n_layers=1, ngram_layer=0)
    fake = {**rest, "embeddings": {**bare, "tokens": jnp.asarray(x.reshape(48, 32))}}
    wanted = encode({"encoder": fake}, plain, jnp.arange(48).reshape(3, 16))[0]
    np.testing.assert_allclose(encode(params, config, IDS)[0], wanted, atol=2e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_packed_row_equals_its_parts(layer):
    config = replace(SMALL, positions="rotary", ngram_layer=layer, ngram_keys=("around", "before", "after", "trigram"))
    params = drawn(config)
    parts = [IDS[:1, :9], IDS[1:2, :4], IDS[2:, :3]]
    segments = jnp.asarray(np.repeat([1, 2, 3], [9, 4, 3])[None])
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in (9, 4, 3)])[None])
    packed = encode(params, config, jnp.concatenate(parts, axis=1), segments, positions)[0]
    alone = [encode(params, config, part)[0] for part in parts]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=2e-5)
    padded = jnp.zeros((1, 16), jnp.int32).at[:, :4].set(parts[1])
    found = encode(params, config, padded, (jnp.arange(16) < 4).astype(jnp.int32)[None])[0]
    np.testing.assert_allclose(found[:, :4], alone[1], atol=2e-5)


def test_in_a_causal_pass_tables_tell_nothing_of_later_tokens():
    config = replace(SMALL, positions="rotary", ngram_keys=("around", "before", "after", "trigram"))
    params = drawn(config)
    causal = jax.jit(lambda ids: nn.encode(params, config, ids, causal=True)[0])
    before, after = causal(IDS), causal(IDS.at[:, 9:].set(7))
    np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert np.abs(before[:, 9] - after[:, 9]).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ngram_layer": 2}, r"^model\.ngram_layer is 2, and the blocks of the model are numbered 0 to 1\.$"),
        ({"ngram_keys": ()}, "must name at least one table, and none twice"),
        ({"ngram_keys": ("after", "after")}, r"^model\.ngram_keys 'after after' must name"),
        ({"ngram_rows": 2**20 + 1}, r"^model\.ngram_rows is 1048577; it must be a whole number .* at most 1,048,576"),
    ],
)
def test_tables_that_cannot_be_are_refused_in_a_sentence(fields, words):
    with pytest.raises(UserError, match=words):
        replace(SMALL, **fields)

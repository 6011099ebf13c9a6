"""Every preset: parameter counts of the papers, the documented parameter tree, scales that keep their rules."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from ufbert import nn
from ufbert.config import ModelConfig, RunConfig, from_json, to_json
from ufbert.errors import UserError
from ufbert.presets import load_preset, preset_names, preset_summary, scaled


@pytest.mark.parametrize(
    ("name", "changes", "heads", "count"),
    [
        ("ultrafastbert_1x11", {}, ("masked_lm",), 163_671_025),
        ("ultrafastbert_128x4", {}, ("masked_lm",), 160_547_841),
        ("crammed_bert", {}, ("masked_lm",), 119_589_889),
        ("crammed_bert", {"feedforward": ("dense",), "d_hidden": 3072}, ("masked_lm",), 138_464_257),
        ("bert_base", {}, ("pooler",), 109_482_240),
        ("bert_base", {}, ("masked_lm",), 109_514_298),
    ],
)
def test_parameter_counts_are_those_of_the_references(name, changes, heads, count):
    assert nn.count_params(replace(load_preset(name).model, **changes), heads) == count


@pytest.mark.parametrize("name", preset_names())
def test_presets_trace_and_describe_themselves(name):
    config = load_preset(name)
    assert len(preset_summary(name)) > 20
    tree = nn.shapes(config.model)
    ids = jax.ShapeDtypeStruct((2, config.data.seq_len), jnp.int32)
    hidden, aux = jax.eval_shape(lambda p, i: nn.encode(p, config.model, i, i), tree, ids)
    assert hidden.shape == (2, config.data.seq_len, config.model.d_model)
    assert aux == {}
    assert from_json(RunConfig, to_json(config), "here") == config


def test_the_parameter_tree_is_the_documented_format():
    model = replace(load_preset("tiny").model, n_layers=1)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(nn.shapes(model))
    }
    d, n = 128, 511
    norm = {"scale": (d,), "bias": (d,)}
    wanted = {
        "encoder.embeddings.tokens": (4096, d),
        "encoder.embeddings.position_scale": (1,),
        **{f"encoder.embeddings.norm.{k}": v for k, v in norm.items()},
        **{f"encoder.layer_00.{part}_norm.{k}": v for part in ("mixer", "feedforward") for k, v in norm.items()},
        **{f"encoder.layer_00.attention.{part}.kernel": (d, d) for part in ("query", "key", "value", "out")},
        "encoder.layer_00.tree.w_in": (1, n, d),
        "encoder.layer_00.tree.bias": (1, n),
        "encoder.layer_00.tree.w_out": (1, n, d),
        **{f"encoder.final_norm.{k}": v for k, v in norm.items()},
    }
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "scale", "layers", "d", "trees", "depth"),
    [
        ("ultrafastbert_1x11", "tiny", 2, 128, 1, 8),
        ("ultrafastbert_1x11", "mini", 4, 256, 1, 9),
        ("ultrafastbert_1x11", "small", 4, 512, 1, 10),
        ("ultrafastbert_128x4", "mini", 4, 256, 128, 2),
    ],
)
def test_scales_keep_trees_within_four_widths(name, scale, layers, d, trees, depth):
    model = scaled(load_preset(name), scale).model
    assert (model.n_layers, model.d_model, model.n_trees, model.tree_depth) == (layers, d, trees, depth)
    assert model.n_trees * model.nodes_per_tree <= 4 * d < model.n_trees * (2 * model.nodes_per_tree + 1)


def test_base_changes_nothing():
    config = load_preset("ultrafastbert_1x11")
    assert scaled(config, "base") == config


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="not a multiple"):
        ModelConfig(d_model=100, n_heads=3)
    with pytest.raises(UserError, match="longer than"):
        replace(load_preset("tiny"), data=replace(load_preset("tiny").data, seq_len=256))
    with pytest.raises(UserError, match="does not know: n_layrs"):
        from_json(ModelConfig, {"n_layrs": 3}, "config.json")

"""Every preset: parameter counts of the papers, the documented parameter tree, scales that keep their rules."""

import subprocess
import sys
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO
from jax import export

from ufbert import nn
from ufbert.config import ModelConfig, PretrainConfig, RunConfig
from ufbert.config.presets import load_preset, preset_folder, preset_names, preset_summary, scaled, with_recipe
from ufbert.cost.flops import forward_flops_per_token, neurons
from ufbert.data.tokenizer import SpecialIds
from ufbert.errors import UserError
from ufbert.pretrain.step import StepInputs, build_steps, init_state
from ufbert.runtime.typed import convert

SPECIAL = SpecialIds(0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "changes", "heads", "count"),
    [
        ("ultrafastbert_1x11", {}, ("masked_lm",), 163_671_025),
        ("ultrafastbert_128x4", {}, ("masked_lm",), 160_547_841),
        ("ultrafastbert_symmetric", {}, ("masked_lm",), 163_671_025),
        ("crammed_bert", {}, ("masked_lm",), 119_589_889),
        ("crammed_bert", {"feedforward": ("dense",), "d_hidden": 3072}, ("masked_lm",), 138_464_257),
        ("crammed_rope", {}, ("masked_lm",), 119_591_936),
        ("modern_hf", {}, ("masked_lm",), 120_186_368),
        ("bert_base", {}, ("pooler",), 109_482_240),
        ("bert_base", {}, ("masked_lm",), 109_514_298),
        ("fnet", {}, ("masked_lm",), 82_894_592),
        ("fnet_hybrid", {}, ("masked_lm",), 87_619_328),
        ("fnet_ultrafast", {}, ("masked_lm",), 125_922_289),
        ("original_fff", {}, ("masked_lm",), 167_630_337),
        ("switch_8e", {}, ("masked_lm",), 402_754_561),
        ("tiny", {}, ("masked_lm",), 919_551),
        ("path_dense_1x11", {}, ("masked_lm",), 63_261_697),
        ("path_dense_128x4", {}, ("masked_lm",), 78_695_425),
        ("fixed_tree_1x11", {}, ("masked_lm",), 188_824_561),
        ("no_feedforward", {}, ("masked_lm",), 62_942_209),
        ("routed_tree", {}, ("masked_lm",), 163_741_169),
    ],
)
def test_parameter_counts_are_those_of_the_references_and_documents(name, changes, heads, count):
    assert nn.count_params(replace(load_preset(name).model, **changes), heads) == count


@pytest.mark.parametrize("name", preset_names())
def test_presets_trace_and_describe_themselves(name):
    config = load_preset(name)
    assert len(preset_summary(name)) > 20
    tree = nn.shapes(config.model)
    ids = jax.ShapeDtypeStruct((2, config.data.seq_len), jnp.int32)
    hidden, aux = jax.eval_shape(lambda p, i: nn.encode(p, config.model, i, i), tree, ids)
    assert hidden.shape == (2, config.data.seq_len, config.model.d_model)
    assert not jax.tree.leaves(aux)
    assert convert(asdict(config), RunConfig, "here") == config
    documentation = (preset_folder() / f"{name}.py").read_text().split('"""')[1]
    for part in ("Paper:", f"--config={name}", "Expected:", "Cost:"):
        assert part in documentation, part
    assert f"{nn.count_params(config.model):,} parameters" in documentation


def small(name: str) -> RunConfig:
    """A preset at the tiny scale with a tiny vocabulary and short rows, and a layer of each kind."""
    run = scaled(load_preset(name), "tiny")
    kinds = list(dict.fromkeys(run.model.layers))
    mixer, feedforward = zip(*kinds, strict=True)
    model = replace(run.model, n_layers=len(kinds), mixer=mixer, feedforward=feedforward)
    model = replace(model, vocab_size=120, max_len=32, fixed_len=0, d_model=32, n_heads=2, d_hidden=32)
    model = replace(model, tree_depth=3, n_trees=min(2, model.n_trees), pooler_width=16, leaf_width=4, init_std=0.1)
    train = PretrainConfig(batch_rows=8, micro_rows=8)
    return RunConfig(model, train, replace(run.data, seq_len=32, short_until=0.0))


CONTROLS = ("path_dense_1x11", "path_dense_128x4", "no_feedforward", "fixed_tree_1x11")
REPEATS = ("tiny", "ultrafastbert_128x4", "fnet", "fnet_ultrafast", *CONTROLS)
"""So small, these presets train what others do, or what `nn/test_controls.py` does."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in REPEATS else ()) for name in preset_names()]
)
def test_a_training_step_lowers_the_loss(name):
    run = small(name)
    state, steps = init_state(run, jax.random.key(0)), build_steps(run, SPECIAL)
    rows = jnp.asarray(np.random.default_rng(0).integers(5, 120, (8, 32)), jnp.int32).at[:, 0].set(2)
    args = (rows, jax.random.key(1), StepInputs(jnp.float32(1e-3), jnp.float32(0.5), jnp.float32(0.25), jnp.int32(8)))
    state, (before, norm, _) = steps.train_step(state, *args)
    state, (after, _, applied) = steps.train_step(state, *args)
    assert applied
    assert float(after.loss / after.count) < float(before.loss / before.count) - 1e-3
    assert 0 < float(norm) < 1e3
    assert (float(before.extra) > 0) == (name in ("switch_8e", "original_fff", "ultrafastbert_symmetric"))
    sums, counts = steps.heldout_sums(state.params, rows, jax.random.key(1))
    assert np.isfinite(float(sums.loss))
    kinds = {kind for _, kind in run.model.layers}
    assert bool(jax.tree.leaves(counts)) == bool(kinds & {"tree", "fixed_tree", "leaf_tree", "routed_tree", "switch"})
    for found in jax.tree.leaves(counts):
        assert float(found.reshape(-1, found.shape[-1])[0, 0 if found.ndim > 1 else slice(None)].sum()) == 8 * 32


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in CONTROLS[:3] else ()) for name in preset_names()]
)
def test_the_whole_training_step_lowers_for_accelerators(name):
    """At full width; two layers, of which one is of each kind there is, since the others are more of the same."""
    run, two = load_preset(name), scaled(load_preset(name), "tiny").model
    layers = {"n_layers": two.n_layers, "mixer": two.mixer, "feedforward": two.feedforward}
    run = replace(run, model=replace(run.model, tree_backend="masked", dtype="bfloat16", **layers))
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(lambda key: init_state(run, key), key)
    rows = jax.ShapeDtypeStruct((run.train.micro_rows, run.data.seq_len), jnp.int32)
    number, count = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    lowered = export.export(build_steps(run, SPECIAL).train_step, platforms=("cuda", "tpu"))(
        state, rows, key, StepInputs(number, number, number, count)
    )
    assert lowered.platforms == ("cuda", "tpu")
    text = lowered.mlir_module()
    assert "tf.aliasing_output" in text or "jax.buffer_donor" in text  # the state is donated


def test_neurons_and_arithmetic_of_the_presets():
    used = {name: neurons(load_preset(name).model) for name in preset_names()}
    assert used["ultrafastbert_1x11"] == used["fnet_ultrafast"] == (12, 4095)
    assert used["ultrafastbert_128x4"] == (640, 3968)
    assert used["switch_8e"] == (3072, 8 * 3072)
    assert used["original_fff"] == (7 + 32 + 32, 127 + 128 * 32 + 32)
    infer = {
        name: forward_flops_per_token(load_preset(name).model, 128, masked_trees=False, training=False)
        for name in preset_names()
    }
    attention = 16 * (8 * 768**2 + 4 * 128 * 768)
    assert infer["ultrafastbert_1x11"] == attention + 16 * 4 * 768 * 12
    assert infer["fnet_ultrafast"] == pytest.approx(16 * (5 * 768 * np.log2(768 * 128) + 4 * 768 * 12))
    assert infer["original_fff"] == attention + 16 * 2 * 768 * (7 + 2 * (32 + 32))


def test_scaling_keeps_patterns_and_the_top_layers():
    assert scaled(load_preset("fnet_hybrid"), "tiny").model.mixer == ("fourier", "attention")
    assert scaled(load_preset("fnet_hybrid"), "mini").model.mixer == ("fourier", "fourier", "fourier", "attention")
    assert scaled(load_preset("switch_8e"), "mini").model.feedforward == ("dense", "switch")
    leaf = scaled(load_preset("original_fff"), "tiny").model
    assert 2**leaf.tree_depth * leaf.leaf_width == 4 * 128


@pytest.mark.parametrize("name", ["fnet", "fnet_hybrid", "fnet_ultrafast"])
def test_fourier_models_read_rows_of_one_length(name):
    run = small(name)
    assert (run.model.only_len, load_preset(name).model.only_len) == (32, 128)
    params = nn.init(run.model, jax.random.key(0))
    with pytest.raises(UserError, match="reads rows of 32 tokens, not 16"):
        nn.encode(params, run.model, jnp.zeros((1, 16), jnp.int32))
    with pytest.raises(UserError, match="rows of one length"):
        replace(run, data=replace(run.data, seq_len=16))
    with pytest.raises(UserError, match=r"short_until 0"):
        replace(run, data=replace(run.data, short_until=0.5))
    assert load_preset("crammed_bert").model.only_len == 0


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


def test_small_scales_pool_the_mean_and_hold_the_position_scale():
    small = scaled(load_preset("ultrafastbert_1x11"), "tiny")
    assert (small.model.pooling, small.train.position_scale_lr) == ("mean", 0.01)
    assert (ModelConfig().pooling, PretrainConfig().position_scale_lr) == ("first", 1.0)


def test_base_changes_nothing():
    config = load_preset("ultrafastbert_1x11")
    assert scaled(config, "base") == config


def test_lists_of_kinds_are_as_good_as_tuples():
    """In a process without the tests' type checks, as users have it."""
    code = "import ufbert; c = ufbert.preset('tiny', mixer=['attention']); print(c.model.mixer, len(ufbert.init(c)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.stdout == "('attention',) 2\n", done.stderr


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="not a multiple"):
        ModelConfig(d_model=100, n_heads=3)
    with pytest.raises(UserError, match="longer than"):
        replace(load_preset("tiny"), data=replace(load_preset("tiny").data, seq_len=256))
    with pytest.raises(UserError, match="even head width"):
        ModelConfig(d_model=6, n_heads=2, positions="rotary")
    with pytest.raises(UserError, match=r"leaf_leak is 2.*at most 1"):
        ModelConfig(leaf_leak=2.0)
    with pytest.raises(UserError, match="capacity_factor is 0"):
        ModelConfig(capacity_factor=0.0)
    with pytest.raises(UserError, match="does not know: n_layrs"):
        convert({"n_layrs": 3}, ModelConfig, "config.json", exact=True)


def test_the_modern_recipe_is_a_set_of_fields():
    crammed = scaled(load_preset("crammed_bert"), "mini")
    assert with_recipe(crammed, "crammed", "mini") == crammed
    modern = with_recipe(crammed, "modern", "mini")
    assert (modern.train.optimizer, modern.train.schedule, modern.train.mask_rate[0]) == ("muon", "stable", 0.3)
    assert (modern.model.final_norm_start, modern.model.d_hidden, modern.train.aim_updates) == (0.0625, 128, 1500)
    old = replace(modern.model, zero_init_out=False, positions="scaled_sinusoid", final_norm_start=1.0, d_hidden=512)
    assert old == crammed.model
    assert with_recipe(load_preset("crammed_bert"), "modern", "base").model.d_hidden == 1536
    switch = scaled(load_preset("switch_8e"), "mini")
    assert with_recipe(switch, "modern", "mini").model.d_hidden == switch.model.d_hidden
    assert with_recipe(load_preset("bert_base"), "modern", "base").model.positions == "learned"
    params = nn.init(replace(modern.model, n_layers=1), jax.random.key(0))["encoder"]["layer_00"]
    for part, name in (("attention", "out"), ("glu", "out")):
        assert not np.any(params[part][name]["kernel"])
    assert np.any(params["glu"]["gate"]["kernel"])

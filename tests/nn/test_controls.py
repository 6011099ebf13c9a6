"""The controls of a comparison: as many plain neurons as a path has, no feedforward, and trees that decide at random."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert import nn
from ufbert.config import ModelConfig, PretrainConfig, RunConfig
from ufbert.config.presets import load_preset, scaled, with_recipe
from ufbert.cost.flops import neurons
from ufbert.data.encode import encode_texts
from ufbert.data.tokenizer import SpecialIds
from ufbert.errors import UserError
from ufbert.hub import onnx_export
from ufbert.inference.engine import Engine
from ufbert.ops import fff
from ufbert.ops.dense import gelu
from ufbert.options.given import over
from ufbert.pretrain.optim import averaged
from ufbert.pretrain.step import StepInputs, build_steps, init_state

MODEL = ModelConfig(
    vocab_size=60, max_len=8, d_model=16, n_layers=2, n_heads=2, d_hidden=12, tree_depth=3, n_trees=2, pooler_width=8,
    init_std=0.2,
)  # fmt: skip
IDS = jnp.asarray(np.random.default_rng(0).integers(5, 60, (4, 8)), jnp.int32)


@pytest.mark.parametrize("scale", ["tiny", "mini", "small", "base"])
@pytest.mark.parametrize(
    ("name", "of_path", "of_all"),
    [
        ("ultrafastbert_1x11", "tree_path", "tree_all"),
        ("ultrafastbert_128x4", "tree_path", "tree_all"),
        ("routed_tree", "routed_path", "routed_all"),
    ],
)
def test_a_control_has_the_neurons_of_its_tree_at_every_scale_and_recipe(name, of_path, of_all, scale):
    preset = load_preset(name)
    for recipe in ("crammed", "modern"):
        tree = with_recipe(scaled(preset, scale), recipe, scale).model
        for wanted, origin in zip(neurons(tree), (of_path, of_all), strict=True):
            control = replace(preset, model=replace(preset.model, feedforward=("dense",), hidden_from=origin))
            assert neurons(with_recipe(scaled(control, scale), recipe, scale).model) == (wanted, wanted)


def test_the_controls_of_the_title_are_presets():
    for name, used in (("1x11", 12), ("128x4", 640)):
        control, tree = load_preset(f"path_dense_{name}"), load_preset(f"ultrafastbert_{name}")
        assert neurons(control.model) == (used, used)
        assert replace(control, model=replace(control.model, feedforward=("tree",), hidden_from="d_hidden")) == replace(
            tree, model=replace(tree.model, d_hidden=used)
        )


def test_a_width_that_contradicts_its_origin_is_refused():
    control = load_preset("path_dense_1x11")
    assert over(control, {"model.tree_depth": 4}).model.d_hidden == 5
    assert over(control, {"model.d_hidden": 7, "model.hidden_from": "d_hidden"}).model.d_hidden == 7
    with pytest.raises(UserError, match=r"model.d_hidden 7 contradicts model.hidden_from tree_path, which makes it 12"):
        over(control, {"model.d_hidden": 7})
    with pytest.raises(UserError, match=r"hidden_from tree_all: model.d_hidden is 2097151; .*at most"):
        replace(MODEL, n_trees=1, tree_depth=20, hidden_from="tree_all")


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_without_feedforward_is_its_mixer(norm):
    cfg = replace(MODEL, norm=norm, feedforward=("none",), final_norm=norm == "pre")
    params = nn.init(cfg, jax.random.key(0), ())
    assert params["encoder"]["layer_00"].keys() == {"attention", "mixer_norm"}
    assert neurons(cfg) == (0, 0)
    dense = replace(cfg, feedforward=("dense",))
    silent = nn.init(dense, jax.random.key(0), ())
    for name, layer in params["encoder"].items():
        silent["encoder"][name] = {**silent["encoder"][name], **layer} if name.startswith("layer") else layer
    for name in ("layer_00", "layer_01"):
        silent["encoder"][name]["dense"]["out"]["kernel"] = jnp.zeros((12, 16))
    # After post-norm a silent feedforward is a second norm of what is normal already.
    np.testing.assert_allclose(nn.encode(params, cfg, IDS)[0], nn.encode(silent, dense, IDS)[0], atol=1e-5)


def test_nodes_decided_by_random_directions_sum_their_neurons():
    keys = jax.random.split(jax.random.key(0), 5)
    x, route = jax.random.normal(keys[0], (5, 6)), jax.random.normal(keys[1], (2, 3, 6))
    w_in, w_out = (jax.random.normal(key, (2, 7, 6)) for key in keys[2:4])
    bias = jax.random.normal(keys[4], (2, 7))
    nodes = fff.decided_nodes(x, route)

    on_path = np.zeros((5, 2, 7), np.float32)
    for i, tree in np.ndindex(5, 2):
        node = 0
        while node < 7:
            on_path[i, tree, node] = 1
            node = 2 * node + 1 + int(np.asarray(route)[tree, node] @ np.asarray(x)[i] > 0) if node < 3 else 7

    def naive(x, w_in, bias, w_out):
        z = jnp.einsum("bd,mnd->bmn", x, w_in) + bias[None]
        return jnp.einsum("bmn,mnd->bd", gelu(z) * on_path, w_out)

    arguments = x, w_in, bias, w_out
    found = fff.sum_of_nodes(gelu, x, nodes, w_in, bias, w_out)
    np.testing.assert_allclose(found, naive(*arguments), atol=1e-5)

    def ours(x, w_in, bias, w_out):
        return fff.sum_of_nodes(gelu, x, nodes, w_in, bias, w_out)

    wanted, gradients = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2, 3)))(*arguments)
        for f in (naive, ours)
    )
    for mine, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_nothing_moves_the_decisions_of_a_fixed_tree_and_its_neurons_learn():
    train = PretrainConfig(batch_rows=4, micro_rows=4, weight_decay=0.5)
    run = RunConfig(
        replace(MODEL, n_layers=1, feedforward=("fixed_tree",)), train, replace(RunConfig().data, seq_len=8)
    )
    state, steps = init_state(run, jax.random.key(0)), build_steps(run, SpecialIds(0, 1, 2, 3, 4))
    before = jax.tree.map(np.array, state.params["encoder"]["layer_00"]["fixed_tree"])
    inputs = StepInputs(jnp.float32(1e-2), jnp.float32(0.5), jnp.float32(0.3), jnp.int32(4))
    for step in range(3):
        state, _ = steps.train_step(state, IDS, jax.random.key(step), inputs)
    after = state.params["encoder"]["layer_00"]["fixed_tree"]
    np.testing.assert_array_equal(after["route"], before["route"])
    for name in ("w_in", "bias", "w_out"):
        assert np.abs(after[name] - before[name]).max() > 1e-4, name
    assert before["route"].shape == (2, 7, 16)
    mean = averaged({"fixed_tree": jax.tree.map(jnp.asarray, before)}, {"fixed_tree": after}, jnp.int32(7), 5.0)
    np.testing.assert_array_equal(mean["fixed_tree"]["route"], before["route"])
    _, counts = steps.heldout_sums(state.params, IDS, jax.random.key(0))
    assert {float(visits[0, 0]) for visits in jax.tree.leaves(counts)} == {32.0}  # every token passes the root


def test_the_engine_and_onnx_compute_fixed_trees_and_blocks_without_feedforward(family, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = family("crammed", feedforward=("fixed_tree", "none"), n_trees=2, tree_depth=3)
    rows = encode_texts(model.tokenizer, ["the cat sees the dog", "a king"], None, model.config)
    batch = rows.pad([0, 1])
    wanted = np.asarray(nn.encode(model.params, model.config, *map(jnp.asarray, batch[:2]))[0])
    onnx_export.export_onnx(model, tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    given = {"input_ids": batch.ids, "attention_mask": batch.segment_ids, "token_type_ids": batch.type_ids}
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(["last_hidden_state"], {name: given[name].astype(np.int64) for name in names})[0]
    for i, hidden in enumerate(Engine(model).hidden(rows)):
        np.testing.assert_allclose(hidden, wanted[i, : len(hidden)], atol=1e-4)
        np.testing.assert_allclose(found[i, : len(hidden)], wanted[i, : len(hidden)], atol=1e-4)

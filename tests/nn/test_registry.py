"""One entry a kind of layer: what it says holds for the layer, and a layer of one's own runs through everything by it."""

import re
import runpy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO, SMALL

from ufbert import nn
from ufbert.cli import call
from ufbert.config import ModelConfig, PretrainConfig, RunConfig
from ufbert.config.model import FEEDFORWARD_NAMES, MIXER_NAMES
from ufbert.config.presets import load_preset, with_recipe
from ufbert.cost.flops import forward_flops_per_token, neurons, routing_flops_per_token, train_bytes_per_token
from ufbert.data.encode import encode_texts
from ufbert.data.tokenizer import SpecialIds
from ufbert.errors import UserError
from ufbert.glue.run import finetune
from ufbert.hub import onnx_export
from ufbert.hub.convert import export_model
from ufbert.hub.folder import load_model
from ufbert.inference.predictor import Predictor
from ufbert.nn import registry
from ufbert.nn.registry import FEEDFORWARDS, MIXERS, Layer, register_feedforward, register_mixer
from ufbert.options.finetune import FinetuneOptions
from ufbert.pretrain.optim import groups
from ufbert.pretrain.step import StepInputs, build_steps, init_state

MODEL = ModelConfig(
    vocab_size=60, max_len=8, d_model=16, n_layers=2, n_heads=2, d_hidden=12, tree_depth=2, leaf_width=3, n_experts=2,
    pooler_width=8, tree_backend="gather",
)  # fmt: skip
TEXTS = ["the cat sees the dog", "a king", "the river in london follows the bird"]


def forget(name):
    """Make a layer unknown again, as in a process that has not registered it."""
    FEEDFORWARDS.pop(name, None)
    if name in FEEDFORWARD_NAMES:
        FEEDFORWARD_NAMES.remove(name)
    jax.clear_caches()


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The file of docs/layers.md, whose layer is known while these tests run."""
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "layers.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("layers") / "my_preset.py"
    path.write_text(code)
    runpy.run_path(str(path))
    yield path
    forget("squared_relu")


@pytest.fixture(scope="module")
def trained(preset, corpus_file):
    """A run folder of a few steps with the layer of the documentation and hashed tables, by the modern recipe."""
    folder = preset.parent / "run"
    mine = [
        f"--config={preset}",
        "--recipe=modern",
        "--model.d-hidden=24",
        "--model.ngram-rows=40",
        "--train.n-evals=1",
    ]
    call("train", [*SMALL, *mine, "--budget=3steps", f"--corpus=text:{corpus_file}", f"--out={folder}"])
    return folder


@pytest.mark.parametrize("kind", [*MIXER_NAMES, *FEEDFORWARD_NAMES, "squared_relu"])
def test_the_entry_of_every_kind_holds_for_its_layer(preset, kind):
    field, layers = ("mixer", MIXERS) if kind in MIXERS else ("feedforward", FEEDFORWARDS)
    layer, model = layers[kind], replace(MODEL, **{field: (kind,)})
    run = RunConfig(model, PretrainConfig(batch_rows=2, micro_rows=2), replace(RunConfig().data, seq_len=8))
    run = with_recipe(run, "modern", "tiny")
    assert (model.only_len > 0) == layer.one_length

    used, in_all = neurons(model)
    assert used <= in_all
    assert (used == 0) == (model.feedforward == ("none",))
    for masked in (False, True):
        trains, infers = (forward_flops_per_token(model, 8, masked_trees=masked, training=t) for t in (True, False))
        assert 0 < infers <= trains
        assert 0 <= 2 * routing_flops_per_token(run, masked_trees=masked) < 3 * trains
    for backend in ("masked", "gather", "native"):
        assert train_bytes_per_token(run, trees=backend, bfloat16=False) > 0

    params = nn.shapes(model)
    part = params["encoder"]["layer_01"].get(kind, {})
    which = groups(params)["encoder"]["layer_01"].get(kind, {})
    for (path, shape), group in zip(jax.tree.leaves_with_path(part), jax.tree.leaves(which), strict=True):
        assert (group == "muon") == (path[-1].key in layer.muon)
        assert group == "adamw" or len(shape.shape) in (2, 4)

    state = jax.eval_shape(lambda key: init_state(run, key), jax.random.key(0))
    inputs = StepInputs(jnp.float32(1e-3), jnp.float32(0.5), jnp.float32(0.25), jnp.int32(2))
    steps = build_steps(run, SpecialIds(0, 1, 2, 3, 4))
    after, _ = jax.eval_shape(steps.train_step, state, jnp.zeros((2, 8), jnp.int32), jax.random.key(1), inputs)
    assert jax.tree.structure(after.params) == jax.tree.structure(state.params)

    function, shapes = layer.timed_part(model, 2, 8)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert jax.eval_shape(jax.grad(lambda *x: function(*x).sum()), *arrays).shape == shapes[0]

    graph = onnx_export.Graph()
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params["encoder"])
    assert onnx_export.encoder(graph, model, zeros)
    assert any(node.name.startswith("layer_01/") for node in graph.nodes)


@pytest.mark.long
def test_a_layer_of_ones_own_trains_and_is_planned_by_the_modern_recipe(preset, trained, capsys):
    model = load_model(trained / "model")
    assert model.config.feedforward == ("squared_relu",)
    assert model.config.zero_init_out
    kernel = model.params["encoder"]["layer_00"]["squared_relu"]["out"]["kernel"]
    assert np.abs(kernel).max() > 0  # it started at zero, and so did the tables
    assert all(np.any(model.params["encoder"]["ngrams"][key]) for key in model.config.ngram_keys)
    call(
        "plan",
        [*SMALL, f"--config={preset}", "--recipe=modern", "--model.ngram-rows=40", "--budget=3steps", "--no-check"],
    )
    assert f"{preset} at scale base" in capsys.readouterr().out


def test_a_layer_of_ones_own_is_fine_tuned_and_predicts(trained, tmp_path):
    rows = "".join(f"{text} {i}\t{i % 2}\n" for i in range(8) for text in TEXTS)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + rows)
    files = {"train": str(tmp_path / "train.tsv"), "dev": str(tmp_path / "dev.tsv"), "text": "text", "label": "label"}
    out = str(tmp_path / "out")
    options = FinetuneOptions(str(trained / "model"), **files, out=out, seeds="0", device="cpu")
    finetune(options, {"tune.epochs": 1})
    assert (tmp_path / "out" / "glue.json").is_file()
    model = load_model(trained / "model")
    batch = encode_texts(model.tokenizer, TEXTS, None, model.config)
    ids, segments, _ = map(jnp.asarray, batch.pad(range(3)))
    wanted = np.asarray(nn.encode(model.params, model.config, ids, segments)[0])
    for i, hidden in enumerate(Predictor(model).encode(TEXTS)):
        np.testing.assert_allclose(hidden, wanted[i, : len(hidden)], atol=1e-4)


def test_a_layer_of_ones_own_is_exported_by_its_rule_or_refused_with_a_sentence(trained, tmp_path):
    from onnxruntime import InferenceSession

    model = load_model(trained / "model")
    onnx_export.export_onnx(model, tmp_path / "onnx")
    batch = encode_texts(model.tokenizer, TEXTS, None, model.config).pad(range(3))
    session = InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = {"input_ids": batch.ids.astype(np.int64), "attention_mask": (batch.segment_ids > 0).astype(np.int64)}
    (found,) = session.run(["last_hidden_state"], inputs)
    wanted = np.asarray(nn.encode(model.params, model.config, *map(jnp.asarray, batch[:2]))[0])
    real = batch.segment_ids > 0
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)

    with pytest.raises(UserError, match=r"cannot express this model: .*feedforward=\('squared_relu',\)"):
        export_model(model, tmp_path / "hf", "hf")
    ruled = FEEDFORWARDS["squared_relu"]
    try:
        FEEDFORWARDS["squared_relu"] = replace(ruled, onnx="ONNX has no such operator.")
        with pytest.raises(UserError, match="'squared_relu' cannot be exported to ONNX: ONNX has no such operator"):
            onnx_export.export_onnx(model, tmp_path / "no")
    finally:
        FEEDFORWARDS["squared_relu"] = ruled


def test_a_folder_whose_layer_is_not_registered_says_so_and_the_environment_registers_it(preset, trained, monkeypatch):
    monkeypatch.delenv("UFBERT_LAYERS", raising=False)
    forget("squared_relu")
    with pytest.raises(UserError, match=r"model.feedforward names 'squared_relu'; known are dense, .*\$UFBERT_LAYERS"):
        load_model(trained / "model")
    broken = preset.with_name("broken.py")
    broken.write_text("1 / 0\n")
    monkeypatch.setenv("UFBERT_LAYERS", str(broken))
    with pytest.raises(UserError, match=r"UFBERT_LAYERS names .*broken.py, which fails: ZeroDivisionError"):
        load_model(trained / "model")
    monkeypatch.setenv("UFBERT_LAYERS", str(preset))
    assert load_model(trained / "model").config.feedforward == ("squared_relu",)


def test_registering_a_name_again_replaces_the_layer(preset):
    model = replace(load_preset(str(preset)).model, n_layers=1, d_model=16, n_heads=2, d_hidden=12, vocab_size=60)
    before = nn.count_params(model)
    usual = FEEDFORWARDS["squared_relu"]
    register_feedforward("squared_relu", replace(usual, module=FEEDFORWARDS["glu"].module))
    assert nn.count_params(model) == before + 16 * 12
    register_feedforward("squared_relu", usual)


@pytest.mark.parametrize("name", ["dense", "attention", "mixer_norm", "two words", "4x"])
def test_a_name_that_is_taken_or_no_name_is_refused(name):
    for register in (register_feedforward, register_mixer):
        with pytest.raises(UserError, match="A layer cannot be called"):
            register(name, FEEDFORWARDS["dense"])


@pytest.mark.long
def test_a_mixer_of_ones_own_can_read_one_length_only():
    try:
        register_mixer("swap", replace(MIXERS["fourier"], onnx="not yet."))
        assert replace(MODEL, mixer=("attention", "swap")).only_len == MODEL.max_len
        register_mixer("swap", Layer(**{**vars(MIXERS["attention"]), "timed": None}))
        assert replace(MODEL, mixer=("attention", "swap")).only_len == 0
        function, shapes = MIXERS["swap"].timed_part(MODEL, 2, 8)
        assert jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).shape == (
            2,
            8,
            16,
        )
    finally:
        registry.MIXERS.pop("swap")
        MIXER_NAMES.remove("swap")

"""Quantised folders: they load wherever a model folder loads, are near the model, and are refused if damaged."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ufbert.cli import call
from ufbert.compress.report import read_results
from ufbert.data.encode import encode_texts
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, flatten, load_model, save_model
from ufbert.hub.quantized import Quantization, QuantizedTensor
from ufbert.inference.calibrate import hurting, layer_errors, quantized, widened
from ufbert.inference.predictor import Predictor
from ufbert.ops import native

SENTENCE = "the cat sees the dog in london and a king follows the river to rome where birds find an old house"
WORDS = SENTENCE.split(" ")
TEXTS = [" ".join(WORDS[:n]) for n in (1, 5, 2, 17, 9, 12, 3)]

needs_kernels = pytest.mark.skipif(bool(native.unavailable()), reason="without kernels nothing computes in int8")


def made_of(model: ModelFolder, folder, **how) -> ModelFolder:
    """Quantise a model into a folder, and read that."""
    rows = encode_texts(model.tokenizer, TEXTS, None, model.config)
    save_model(folder, quantized(model, Quantization(**how), rows))
    return load_model(folder, lazily=True)


def distance(one, other) -> float:
    """The median over tokens of the length of the difference over that of the right answer."""
    pairs = zip(one, other, strict=True)
    return float(
        np.median(np.concatenate([np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1) for a, b in pairs]))
    )


PRUNED = {"layer_heads": (1, 2), "layer_hidden": (8, 24), "head_width": 16}


@needs_kernels
@pytest.mark.parametrize("kind", ["bert", "pruned", "trees", "leaf tree", "routed trees", "ngrams"])
def test_rounding_moves_hidden_states_little(family, kind):
    model = family("bert", "masked_lm", **PRUNED) if kind == "pruned" else family(kind, "masked_lm")
    rows = encode_texts(model.tokenizer, TEXTS, None, model.config)
    how = Quantization("static" if kind in ("bert", "routed trees") else "dynamic", exact_routing=True)
    errors = layer_errors(model, quantized(model, how, rows), rows)
    # A token may take another way through a tree.
    most = 0.5 if kind in ("trees", "routed trees") else 0.05
    assert all(1e-5 < error.hidden < most for error in errors), errors


@needs_kernels
@pytest.mark.parametrize(("kind", "activations"), [("bert", "static"), ("trees", "dynamic")])
def test_a_quantised_folder_answers_nearly_as_its_model(family, kind, activations, tmp_path):
    model = family(kind, "masked_lm", "classifier")
    child = made_of(model, tmp_path / "int8", activations=activations, exact_routing=True)
    narrow, whole = Predictor(child, exact_routing=True), Predictor(model)
    assert narrow.engine.dtype == "int8"
    assert 1e-5 < distance(narrow.encode(TEXTS), whole.encode(TEXTS)) < 0.05
    masked = [f"{text} [MASK]" for text in TEXTS]
    for ours, theirs in zip(narrow.fill_mask(masked, 300), whole.fill_mask(masked, 300), strict=True):
        p, q = ({guess.token: guess.probability for guess in mask[0]} for mask in (ours, theirs))
        assert sum(abs(p[token] - q[token]) for token in q) < 0.1


def test_it_holds_a_byte_a_weight_and_what_the_floats_are_made_of(family, tmp_path):
    model = family("bert", "masked_lm", "classifier")
    child = made_of(model, tmp_path / "int8", activations="static", wide=(1,))
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    narrow, wide = "encoder.layer_00.dense.in.kernel", "encoder.layer_01.dense.in.kernel"
    assert (stored[narrow].dtype, stored[wide].dtype) == (np.int8, np.float32)
    assert stored["encoder.embeddings.tokens"].dtype == np.int8
    assert stored[f"{narrow}.factor"].shape == stored[narrow].shape[1:]
    # All clips are at most 1, so that every column reaches 127.
    np.testing.assert_array_equal(np.abs(stored[narrow]).max(axis=0), 127)
    three = [stored[f"encoder.layer_00.attention.{name}.kernel.input"] for name in ("query", "key", "value")]
    np.testing.assert_array_equal(three, [three[0]] * 3)
    floats = load_model(tmp_path / "int8")
    assert floats.quantized is None
    flat = flatten(floats.params)
    np.testing.assert_array_equal(flat[narrow], stored[narrow] * stored[f"{narrow}.factor"][None])
    np.testing.assert_array_equal(flat[wide], flatten(model.params)[wide])
    np.testing.assert_allclose(flat[narrow], flatten(model.params)[narrow], atol=stored[f"{narrow}.factor"].max() * 40)
    assert child.quantized == Quantization("static", (1,))


def test_reading_and_writing_are_inverse(family, tmp_path):
    child = made_of(family("leaf tree", "masked_lm"), tmp_path / "int8", activations="static", tables=False)
    save_model(tmp_path / "again", child)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "int8" / name).read_bytes(), name
    assert not isinstance(child.params["encoder"]["embeddings"]["tokens"], QuantizedTensor)


def test_floats_made_of_it_are_written_as_a_folder_that_older_versions_read(family, tmp_path, capsys):
    made_of(family("bert", "masked_lm"), tmp_path / "int8")
    save_model(tmp_path / "floats", load_model(tmp_path / "int8"))
    assert "is quantised; its int8 weights are made float32" in capsys.readouterr().err
    assert json.loads((tmp_path / "floats" / "config.json").read_text())["format_version"] == 1
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["format_version"] == 2
    assert {array.dtype.name for array in load_file(tmp_path / "floats" / "model.safetensors").values()} == {"float32"}


@needs_kernels
def test_the_engine_takes_the_numbers_as_they_are_stored(family, tmp_path):
    child = made_of(family("tree", "masked_lm"), tmp_path / "int8")
    packed = Predictor(child).engine.params["encoder"]
    tree, table = packed["layer_00"]["tree"], packed["embeddings"]["tokens"]
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    for name in ("w_in", "w_out"):
        np.testing.assert_array_equal(tree[name].rows, stored[f"encoder.layer_00.tree.{name}"])
        np.testing.assert_array_equal(tree[name].scale, stored[f"encoder.layer_00.tree.{name}.factor"])
    np.testing.assert_array_equal(table.rows, stored["encoder.embeddings.tokens"])
    with pytest.raises(UserError, match="deciding weights are rounded, and the unrounded ones are not in it"):
        Predictor(child, exact_routing=True)


@needs_kernels
def test_errors_are_those_of_each_part_and_layers_that_hurt_stay_wide(family):
    model = family("bert", "masked_lm", n_layers=3)
    layer = model.params["encoder"]["layer_01"]["dense"]
    hurt = np.array(layer["in"]["kernel"])
    hurt[5] *= 300.0  # a row that takes the steps of all columns for itself
    encoder = {**model.params["encoder"], "layer_01": {**model.params["encoder"]["layer_01"], "dense": {
        **layer, "in": {**layer["in"], "kernel": jax.numpy.asarray(hurt)}}}}  # fmt: skip
    model = replace(model, params={**model.params, "encoder": encoder})
    rows = encode_texts(model.tokenizer, TEXTS, None, model.config)
    child = quantized(model, Quantization(), rows)
    errors = layer_errors(model, child, rows)
    assert [error.name for error in errors] == ["embeddings", "layer_00", "layer_01", "layer_02"]
    assert all(0 < error.alone < 1 and 0 < error.hidden < 1 for error in errors)
    assert errors[-1].hidden > errors[0].hidden
    assert hurting(errors) == (1,)
    wider = widened(child, model, (1,))
    assert wider.quantized == Quantization(wide=(1,))
    better = layer_errors(model, wider, rows)
    assert better[2].alone < 1e-6
    assert better[-1].hidden < errors[-1].hidden


def test_what_cannot_be_rounded_is_refused(family, tmp_path):
    model = family("bert", "masked_lm")
    child = made_of(model, tmp_path / "int8")
    rows = encode_texts(model.tokenizer, TEXTS, None, model.config)
    with pytest.raises(UserError, match="is quantised already"):
        quantized(child, Quantization(), rows)
    with pytest.raises(UserError, match="no layer 7 to keep wide; the layers are 0 to 1"):
        quantized(model, Quantization(wide=(0, 7)), rows)
    bad = {**model.params, "encoder": {**model.params["encoder"], "final": np.array([np.nan], np.float32)}}
    with pytest.raises(UserError, match="not finite"):
        quantized(replace(model, params=bad), Quantization(), rows)


KERNEL = "encoder.layer_00.attention.out.kernel"
DAMAGES = [
    (lambda t: t.pop(f"{KERNEL}.factor"), f"has no {KERNEL}.factor, and without it no weights"),
    (lambda t: t.pop(f"{KERNEL}.input"), f"has no {KERNEL}.input"),
    (lambda t: t.update({f"{KERNEL}.factor": np.zeros(32, np.float32)}), "finite and above 0"),
    (lambda t: t.update({f"{KERNEL}.factor": np.full(32, np.nan, np.float32)}), "finite and above 0"),
    (lambda t: t.update({f"{KERNEL}.factor": np.ones(3, np.float32)}), r"shape \(3,\), not float32 of shape \(32,\)"),
    (lambda t: t.update({f"{KERNEL}.input": np.array([1, 0.5], np.float32)}), "zero of 0.5"),
    (lambda t: t.update({f"{KERNEL}.input": np.array([1, 256], np.float32)}), "zero of 256"),
    (lambda t: t.update({KERNEL: t[KERNEL].astype(np.float32)}), f"{KERNEL} as float32, and its config.json says int8"),
    (lambda t: t.update({KERNEL: t[KERNEL].astype(np.int16)}), r"\(int16\)"),
    (lambda t: t.update({KERNEL: t[KERNEL][:5]}), r"kernel has shape \(5, 32\) instead of \(32, 32\)"),
    (lambda t: t.update({"encoder.final.input": np.ones(2, np.float32)}), "final.input"),
]


@pytest.fixture(scope="module")
def stored(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "int8"
    made_of(family("bert", "masked_lm"), folder, activations="static")
    return folder


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_folder_is_refused(stored, tmp_path, damage, words):
    tensors = load_file(stored / "model.safetensors")
    damage(tensors)
    (tmp_path / "config.json").write_bytes((stored / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((stored / "tokenizer.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    for lazily in (False, True):
        with pytest.raises(UserError, match=words):
            load_model(tmp_path, lazily=lazily)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 1}, "has format version 1"),
        ({"quantized": None}, "has format version 2"),
        ({"quantized": {"activations": "none"}}, r'activations is "none"; it must be one of dynamic, static'),
        ({"quantized": {"wide": [0]}}, "as int8, and its config.json says float32"),
        ({"quantized": {"activations": "static", "wide": [9]}}, "names layer 9"),
        ({"quantized": {"activations": "dynamic"}}, "does not speak of"),
        ({"quantized": {"activations": "static", "bits": 4}}, "bits"),
    ],
)
def test_a_configuration_that_says_otherwise_is_refused(stored, tmp_path, changes, words):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((stored / name).read_bytes())
    config = json.loads((stored / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


def compressed(family, tmp_path, *more: str, kind="bert"):
    """Quantise a model by the command, and return the folder."""
    model, lines = family(kind, "masked_lm"), tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXTS) + "\n")
    if not (tmp_path / "model").exists():
        save_model(tmp_path / "model", model)
    options = ["--method=quantize", f"--out={tmp_path / 'out'}", "--blocks=1", "--shape=1x8", "--device=cpu", *more]
    call("compress", [str(tmp_path / "model"), *options])
    return tmp_path / "out"


@needs_kernels
def test_the_command_makes_a_folder_and_states_what_it_changed(family, tmp_path, capsys):
    lines = tmp_path / "lines.txt"
    folder = compressed(family, tmp_path, f"--texts={lines}", "--keep-wide=1", kind="tree")
    results = read_results(folder)
    before, after = results.rows
    assert after.bytes < before.bytes
    assert after.parameters == before.parameters
    assert list(after.milliseconds) == ["int8"]
    said = "\n".join(results.notes)
    for words in ("chosen on 7 texts", "Layers 1 stay float32", "layer_00", "take another way through a tree"):
        assert words in said, words
    child = load_model(folder / "model", lazily=True)
    assert child.quantized == Quantization(wide=(1,))
    capsys.readouterr()
    call("fill-mask", [f"--model={folder / 'model'}", "the cat [MASK] the dog", "--device=cpu"])
    assert "mask 1" in capsys.readouterr().out
    call("export", [str(folder / "model"), "--to=onnx", f"--out={tmp_path / 'onnx'}"])
    assert "made float32" in capsys.readouterr().err
    options = ["--method=quantize", f"--texts={lines}", "--device=cpu", "--blocks=1", "--shape=1x8"]
    with pytest.raises(UserError, match="is quantised already"):
        call("compress", [str(folder / "model"), *options, f"--out={tmp_path / 'twice'}"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "no text to choose the factors on; name files"),
        (("--texts={empty}",), "has no text to choose the factors on"),
        (("--texts={lines}", "--keep-wide=first"), "--keep-wide is 'first'; it must be none, auto, or numbers"),
        (("--texts={lines}", "--keep-wide=9"), "There is no layer 9 to keep wide"),
        (("--texts={lines}", "--keep=0.5"), "--keep belongs to --method"),
    ],
)
@needs_kernels
def test_bad_options_are_refused(family, tmp_path, more, words):
    (tmp_path / "empty.txt").write_text("\n \n")
    places = {"empty": tmp_path / "empty.txt", "lines": tmp_path / "lines.txt"}
    with pytest.raises(UserError, match=words):
        compressed(family, tmp_path, *(option.format(**places) for option in more))

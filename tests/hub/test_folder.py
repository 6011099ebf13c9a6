"""Model folders: round trips, and one sentence for each kind of damage."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ufbert.errors import UserError
from ufbert.hub.folder import flatten, load_model, save_model, unflatten


@pytest.fixture
def folder(run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    return tmp_path / "model"


def test_save_and_load_are_bit_equal_and_replace_whole_folders(folder, tmp_path):
    model = load_model(folder)
    save_model(tmp_path / "copy", model)
    save_model(tmp_path / "copy", model)
    copy = load_model(tmp_path / "copy")
    assert copy.config == model.config
    assert copy.tokenizer.to_str() == model.tokenizer.to_str()
    one, other = flatten(model.params), flatten(copy.params)
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model"]


def test_fields_that_say_otherwise_than_the_weights_are_named(family, tmp_path):
    model = family("skips", "masked_lm")
    save_model(tmp_path / "model", model)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for changes in ({"unet_skips": False}, {"value_embeddings": 0}, {"value_embeddings": 1}, {"tie_head": True}):
        ((field, value),) = changes.items()
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model": {**config["model"], **changes}}))
        with pytest.raises(UserError, match=rf"config\.json beside it says .*model\.{field}={value}"):
            load_model(tmp_path / "model")


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": np.ones(2), "c": {"d": np.zeros(1)}}, "e": np.ones(3)}
    assert flatten(unflatten(flatten(tree))).keys() == {"a.b", "a.c.d", "e"}


def test_a_missing_folder_or_file_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="There is no model folder"):
        load_model(tmp_path / "nowhere")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_model(folder)


def test_a_run_folder_points_to_its_model(run_folder):
    with pytest.raises(UserError, match=r"its model/ folder is one"):
        load_model(run_folder)


def test_a_model_of_another_kind_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 64}))
    with pytest.raises(UserError, match="a 'bert' model of another library"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"format_version": True}, "format version True"),
        ({"format_version": 0}, "format version 0"),
        ({"extra": 1}, "does not know: extra"),
        ({"heads": ["masked_lm", "tagger"]}, r"heads\[1\] is \"tagger\"; it must be one of masked_lm"),
        ({"heads": "masked_lm"}, 'heads is "masked_lm"; it must be a list'),
        ({"model": [1]}, r"model is \[1\]; it must be an object"),
        ({"model": {"norm": "x"}}, 'norm is "x"; it must be one of pre, post'),
        ({"model": {"d_model": "32"}}, 'd_model is "32"; it must be a whole number'),
        ({"task": {"name": "x", "labels": "ab", "metrics": {}}}, 'labels is "ab"; it must be a list'),
    ],
)
def test_a_newer_format_and_settings_of_another_kind_are_refused(folder, changes, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=words):
        load_model(folder)


def test_weights_of_types_that_are_no_weights_are_refused_however_they_are_read(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "encoder.layer_00.attention.out.kernel"
    save_file(tensors | {name: tensors[name].astype(np.int8)}, path)
    for lazily in (False, True):
        with pytest.raises(UserError, match=rf"{name} \(int8\)"):
            load_model(folder, lazily=lazily)


def test_truncated_and_misfitting_weights_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_model(folder)
    renamed = {("encoder.extra" if k == "encoder.final_norm.bias" else k): v for k, v in tensors.items()}
    renamed["encoder.final_norm.scale"] = np.ones(7, np.float32)
    save_file(renamed, path)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    for words in (
        "final_norm.bias is missing",
        "extra is unexpected",
        "final_norm.scale has shape (7,) instead of (32,)",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ngram_rows": 60}, r"ngrams\.\w+ has shape \(61, 8\) instead of \(60, 8\).*model\.ngram_rows=60"),
        ({"ngram_width": 0}, r"projection\.kernel is unexpected.*model\.ngram_width=0"),
        ({"ngram_rows": 0}, r"ngrams\.\w+ is unexpected.*model\.ngram_rows=0"),
        ({"ngram_keys": ["after", "before"]}, r"before is missing.*model\.ngram_keys=\('after', 'before'\)"),
    ],
)
def test_tables_and_fields_that_contradict_each_other_are_refused(family, tmp_path, changes, words):
    model = family("narrow ngrams", "masked_lm")
    save_model(tmp_path / "model", model)
    copy = load_model(tmp_path / "model")
    assert copy.config == model.config
    np.testing.assert_array_equal(
        flatten(copy.params)["encoder.ngrams.trigram"], model.params["encoder"]["ngrams"]["trigram"]
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["model"] |= changes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "model")


def test_a_config_with_a_typo_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["n_layrs"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="n_layrs"):
        load_model(folder)


def test_a_read_only_place_is_one_sentence(folder, tmp_path):
    model = load_model(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write a model folder"):
        save_model(tmp_path / "file" / "model", model)

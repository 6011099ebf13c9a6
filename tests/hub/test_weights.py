"""Weight files as people have them: tied, wrapped, sharded, of odd types, or not there at all."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_fields import GOLDEN, checkpoint

from ufbert.errors import UserError
from ufbert.hub.convert import import_weights, read_checkpoint
from ufbert.hub.folder import flatten
from ufbert.hub.leaf_layer import from_state, load_layer, save_layer
from ufbert.hub.tensors import read_tensors, stored_tensors
from ufbert.hub.vocabulary import find_tokenizer
from ufbert.runtime.typed import read_typed

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 438007537\n"


def same_params(found: Any, wanted: Any) -> None:
    one, other = flatten(found.params), flatten(wanted.params)
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("hf_bert", {"bert.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight"}),
        ("hf_bert", {"cls.predictions.bias": "cls.predictions.decoder.bias"}),
        ("hf_fnet", {"fnet.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight"}),
        ("hf_fnet", {"cls.predictions.bias": "cls.predictions.decoder.bias"}),
        ("hf_modernbert", {"model.embeddings.tok_embeddings.weight": "decoder.weight"}),
    ],
)
def test_a_tied_tensor_may_lie_under_either_name_or_both(name, copies):
    tensors, values = checkpoint(name)
    wanted = import_weights(tensors, values, "here")
    other = {copies.get(stored, stored): array for stored, array in tensors.items()}
    same_params(import_weights(other, values, "here"), wanted)
    both = tensors | other
    same_params(import_weights(both, values, "here"), wanted)
    (copy,) = copies.values()
    with pytest.raises(UserError, match=rf"untied weights, which this encoder ties: {copy}"):
        import_weights(both | {copy: both[copy] + 1}, values, "here")
    if "bias" not in copy:
        untied = values | {"tie_word_embeddings": False}
        same_params(import_weights(both, untied, "here"), wanted)
        for lacking in (tensors, other):
            with pytest.raises(UserError, match="tie_word_embeddings=False, and the weights hold only one"):
                import_weights(lacking, untied, "here")


@pytest.mark.parametrize("wrap", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_fsdp_wrapped_module.{}"])
def test_marks_of_wrappers_are_taken_out_of_names(wrap):
    tensors, values = checkpoint("hf_bert")
    found = import_weights({wrap.format(name): array for name, array in tensors.items()}, values, "here")
    same_params(found, import_weights(tensors, values, "here"))
    (note,) = found.notes
    assert note.startswith("taken out of the tensors' names: ")
    assert all(f"{part}." in note for part in wrap.removesuffix(".{}").split("."))


def test_two_names_of_one_tensor_are_a_sentence():
    tensors, values = checkpoint("hf_bert")
    twice = tensors | {"module.cls.predictions.bias": tensors["cls.predictions.bias"]}
    with pytest.raises(
        UserError, match=r"cls\.predictions\.bias and module\.cls\.predictions\.bias, which are the same"
    ):
        import_weights(twice, values, "here")


def test_tensors_are_named_as_the_file_has_them():
    tensors, values = checkpoint("hf_bert")
    bare = {name.removeprefix("bert."): array for name, array in tensors.items() if name.startswith("bert.")}
    values |= {"architectures": ["BertModel"]}
    found = import_weights(bare | {"embeddings.position_ids": np.arange(12)}, values, "here")
    assert found.skipped == ["embeddings.position_ids"]
    del bare["embeddings.LayerNorm.bias"]
    bare["_orig_mod.odd.weight"] = np.zeros(1, np.float32)
    with pytest.raises(UserError) as caught:
        import_weights(bare, values, "here")
    assert ": embeddings.LayerNorm.bias is missing; _orig_mod.odd.weight is unexpected." in str(caught.value)


def test_long_lists_of_names_end_in_a_number():
    tensors, values = checkpoint("hf_bert")
    odd = {f"x{i}": np.zeros(1, np.float32) for i in range(100)}
    with pytest.raises(UserError, match=r"x0 is unexpected, .*, x3 is unexpected and 96 more") as caught:
        import_weights(tensors | odd, values, "here")
    assert len(str(caught.value)) < 300


def test_a_classifier_of_no_dimension_is_misshapen():
    tensors, values = checkpoint("hf_bert_classifier")
    values |= {"id2label": None}
    with pytest.raises(UserError, match=r"classifier\.weight has shape \(\) instead of \(1, 16\)"):
        import_weights(tensors | {"classifier.weight": np.float32(1).reshape(())}, values, "here")


def test_an_embedding_of_another_vocabulary_is_named():
    tensors, values = checkpoint("hf_bert")
    with pytest.raises(UserError, match=r"word_embeddings\.weight of here has 40 rows, and vocab_size .* is 41"):
        import_weights(tensors, values | {"vocab_size": 41}, "here")


def test_whole_numbers_are_no_weights():
    tensors, values = checkpoint("hf_bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    for kind in (np.int8, np.bool_, np.uint8):
        with pytest.raises(UserError, match=rf"{name} \({np.dtype(kind).name}\).*Quantised"):
            import_weights(tensors | {name: tensors[name].astype(kind)}, values, "here")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F4", "C64", "NEW"])
@pytest.mark.parametrize("read", [read_tensors, stored_tensors])
def test_types_that_numpy_lacks_are_a_sentence(kind, read, tmp_path):
    header = json.dumps({"a.weight": {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match=rf"a dtype that is not read: a\.weight \({kind}\)\. Convert"):
        read(path)


@pytest.mark.parametrize("header", [b"[]", b"3", b'{"a": 1}', b'{"a": {}}', b"{", b"\xff", b'{"a": {"dtype": []}}'])
def test_a_header_of_another_kind_is_damage(header, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    for read in (read_tensors, stored_tensors):
        with pytest.raises(UserError, match="damaged or cut short"):
            read(path)


def test_a_pointer_of_git_lfs_is_said_to_be_one(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "vocab.txt"):
        (tmp_path / name).write_text(POINTER)
    for call in (
        lambda: read_checkpoint(tmp_path),
        lambda: stored_tensors(tmp_path / "model.safetensors"),
        lambda: read_typed(tmp_path / "config.json", dict[str, Any]),
        lambda: find_tokenizer(tmp_path, ""),
        lambda: find_tokenizer(tmp_path, str(tmp_path / "vocab.txt")),
    ):
        with pytest.raises(UserError, match=r"is a Git LFS pointer.*git lfs pull"):
            call()


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"x"', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", ""])
def test_a_config_that_is_no_object_is_a_sentence(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UserError, match=r"config\.json:? (holds .* where an object belongs|is not readable JSON|a is 9{9,})"
    ):
        read_typed(tmp_path / "config.json", dict[str, Any])


def test_shards_are_read_together_and_missing_and_doubled_ones_named(tmp_path):
    def index(**homes: str) -> None:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": homes})
        (tmp_path / "model.safetensors.index.json").write_text(text)

    def shard(name: str, *tensors: str) -> None:
        save_file({tensor: np.ones(2, np.float32) for tensor in tensors}, tmp_path / name)

    shard("model-00001-of-00002.safetensors", "a", "b")
    index(a="model-00001-of-00002.safetensors", c="model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 of the 2 files .*: model-00002-of-00002\.safetensors\. Download"):
        read_checkpoint(tmp_path)
    shard("model-00002-of-00002.safetensors", "c")
    assert sorted(read_checkpoint(tmp_path)[0]) == ["a", "b", "c"]
    index(
        a="model-00002-of-00002.safetensors", c="model-00001-of-00002.safetensors", d="model-00002-of-00002.safetensors"
    )
    with pytest.raises(UserError, match=r"do not hold what model\.safetensors\.index\.json says: a, c, d"):
        read_checkpoint(tmp_path)
    shard("model-00002-of-00002.safetensors", "b", "c")
    with pytest.raises(
        UserError, match=r"-00001-of-00002\.safetensors and model-00002-\S+ in .* both hold b; name the file"
    ):
        read_checkpoint(tmp_path)
    for odd in ([1], {"a": 1}):
        Path(tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": odd}))
        with pytest.raises(UserError, match=r"json: weight_map.* must be"):
            read_checkpoint(tmp_path)


def test_weights_that_are_no_numbers_are_named():
    tensors, values = checkpoint("hf_bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    for bad in (np.nan, np.inf):
        broken = tensors[name].copy()
        broken[0, 1] = bad
        with pytest.raises(UserError, match=rf"here has weights that are no finite numbers: {re.escape(name)}\."):
            import_weights(tensors | {name: broken}, values, "here")


def test_folders_without_their_own_safetensors_say_what_to_do(tmp_path):
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            read_checkpoint(tmp_path)

    refused(r"no \.safetensors file\. Name a folder that has")
    (tmp_path / "model.onnx").touch()
    refused("ONNX, HDF5, msgpack and GGUF files are not read")
    (tmp_path / "pytorch_model.bin").touch()
    refused("can run code; .* save_pretrained")
    (tmp_path / "snapshots" / "0a").mkdir(parents=True)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "snapshots" / "0a" / "model.safetensors")
    refused(r"There is one in .*snapshots/0a; name that folder")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused("is an adapter of org/base, not a model; merge it")


def test_json_may_begin_with_a_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_typed(tmp_path / "config.json", dict[str, Any]) == {"a": 1}


def test_a_layer_folder_of_other_settings_or_numbers_is_refused_by_name(tmp_path):
    golden = dict(np.load(GOLDEN / "leaf_tree.npz"))
    state = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    layer = from_state(state, "here")
    for changes, words in (
        ({"depth": np.array([3, 3])}, r"8 leaves at depth \[3, 3\]"),
        ({"depth": np.array(-1)}, "8 leaves at depth -1"),
        ({"depth": np.array(10**12)}, "8 leaves at depth 1000000000000"),
        ({"w1s": state["w1s"].astype(np.int8)}, r"w1s \(int8\)"),
    ):
        with pytest.raises(UserError, match=words):
            from_state(state | changes, "here")
    save_layer(tmp_path / "layer", layer, "relu")
    assert load_layer(tmp_path / "layer")[1] == "relu"
    config = json.loads((tmp_path / "layer" / "config.json").read_text())
    for changes, words in (
        ({"activation": "x"}, 'activation is "x"; it must be one of gelu'),
        ({"activation": [1]}, "activation is "),
        ({"format_version": 2}, "format version 2"),
        ({"format_version": "1"}, "format version '1'"),
        ({"more": 1}, "does not know: more"),
        ({"format": "x"}, "does not hold a leaf-tree layer"),
    ):
        (tmp_path / "layer" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words):
            load_layer(tmp_path / "layer")

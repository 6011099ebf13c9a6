"""Model folders and files of other libraries, damaged and hostile: a value, or a sentence that names the file and the field."""

import json
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_fields import checkpoint
from test_hostile_files import Reader, check, net, written
from test_tokenizers import lines, state

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.data.encode import encode_texts
from ufbert.data.tokenizer import train_wordpiece
from ufbert.errors import UserError
from ufbert.hub import leaf_layer, tensors, tokenizer_settings, vocabulary
from ufbert.hub.convert import import_weights, read_checkpoint
from ufbert.hub.folder import ModelFolder, TaskInfo, _Stored, load_model, save_model
from ufbert.hub.leaf_layer import from_state, load_layer, save_layer, to_state
from ufbert.hub.vocabulary import find_tokenizer, read_tokenizer
from ufbert.ops.leaf_fff import LeafTree
from ufbert.runtime.typed import read_whole

__all__ = ["net"]

CONFIG = ModelConfig(vocab_size=21, max_len=16, d_model=8, n_layers=1, n_heads=2, d_hidden=8, pooler_width=8)


def write_model(folder: Path) -> None:
    """A model of random weights with a classifier."""
    (folder / "tokenizer.json").write_text(json.dumps(state()))
    params = nn.init(CONFIG, jax.random.key(0), ("masked_lm",))
    params["classifier"] = nn.init_classifier(CONFIG, jax.random.key(1), 2)
    task = TaskInfo("toy", ("no", "yes"), {"accuracy": 0.5})
    save_model(folder, ModelFolder(CONFIG, params, read_tokenizer(folder / "tokenizer.json"), task))


def write_layer(folder: Path) -> None:
    ones = np.ones
    layer = LeafTree(
        *map(jax.numpy.asarray, (ones((3, 5)), ones(3), ones((4, 5, 2)), ones((4, 2)), ones((4, 2, 6)), ones((4, 6))))
    )
    save_layer(folder, layer, "relu")


ANSWERS = {
    "id2label": {"0": "a", "1": "b", "2": "c"}, "problem_type": "single_label_classification",
    "architectures": ["BertForSequenceClassification"],
}  # fmt: skip


def write_foreign(folder: Path) -> None:
    arrays, values = checkpoint("hf_bert_classifier")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values | ANSWERS))


def read_foreign(folder: Path) -> Any:
    arrays, values, _ = read_checkpoint(folder)
    return import_weights(arrays, values or {}, str(folder))


def beside_vocabulary(file: str, value: Any):
    def write(folder: Path) -> None:
        (folder / "vocab.txt").write_text(lines())
        (folder / file).write_text(json.dumps(value))

    return write


def with_shard(file: str, value: Any):
    def write(folder: Path) -> None:
        save_file({"a": np.ones(2, np.float32)}, folder / "x.safetensors")
        (folder / file).write_text(json.dumps(value))

    return write


def read_header(folder: Path) -> Any:
    """Reads a tensor file whose header lies beside it."""
    header, path = read_whole(folder / "header.json"), folder / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return tensors.read_tensors(path)


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
NAMES = {f"{name.lower()}_token": {"content": f"[{name}]", **FLAGS} for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
NAMES |= {"bos_token": NAMES["cls_token"], "eos_token": NAMES["sep_token"]}
KINDS = {dict: dict[str, str], list: list[str]}
VALUES = checkpoint("hf_bert_classifier")[1] | ANSWERS
FOREIGN = make_dataclass("FOREIGN", [(name, KINDS.get(type(value), Any)) for name, value in VALUES.items()])
SETTINGS = {
    "tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None, **NAMES,
    "added_tokens_decoder": {"3": {"content": "[SEP]", "special": True}}, "extra_special_tokens": ["[SEP]"],
}  # fmt: skip
TOKENIZER = lambda folder: find_tokenizer(folder, "")  # noqa: E731
CONFIG_FILE, INDEX = "tokenizer_config.json", "model.safetensors.index.json"

READERS = [
    Reader("model folder", "config.json", write_model, load_model, _Stored),
    Reader("layer folder", "config.json", write_layer, load_layer, leaf_layer._Stored),
    Reader("foreign model", "config.json", write_foreign, read_foreign, FOREIGN),
    Reader("tokenizer", "tokenizer.json", written("tokenizer.json", state()), TOKENIZER, vocabulary._TokenizerFile),
    Reader("settings", CONFIG_FILE, beside_vocabulary(CONFIG_FILE, SETTINGS), TOKENIZER, tokenizer_settings.TokenizerConfig),
    Reader(
        "special tokens", "special_tokens_map.json",
        beside_vocabulary("special_tokens_map.json", NAMES | {"additional_special_tokens": ["[E1]"]}),
        TOKENIZER, tokenizer_settings.TokenizerConfig,
    ),
    Reader(
        "added tokens", "added_tokens.json", beside_vocabulary("added_tokens.json", {"[E1]": 21}), TOKENIZER, dict[str, int],
    ),
    Reader(
        "header of tensors", "header.json",
        written("header.json", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), read_header,
        dict[str, tensors._Entry],
    ),
    Reader("index", INDEX, with_shard(INDEX, {"weight_map": {"a": "x.safetensors"}}), read_checkpoint, tensors._Index),
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_is_a_value_or_a_sentence_that_names_file_and_field(reader, tmp_path, net):
    check(reader, tmp_path / "folder")


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "int32", "bool", "complex64"])
def test_weights_of_other_types_are_converted_or_refused_by_name(kind, lazily, tmp_path):
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: array.astype(jax.numpy.dtype(kind)) for name, array in load_file(path).items()}, path)
    if "float" not in kind:
        with pytest.raises(UserError, match=r"model\.safetensors holds .*classifier\.out\.bias"):
            load_model(tmp_path, lazily=lazily)
        return
    model = load_model(tmp_path, lazily=lazily)
    assert {jax.numpy.asarray(array).dtype.name for array in jax.tree.leaves(model.params)} == {"float32"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9), ("hidden_size", 10**15), ("hidden_size", 2**20), ("intermediate_size", 2**20),
        ("max_position_embeddings", 10**12), ("max_position_embeddings", 2**20), ("type_vocab_size", 2**30),
    ],
)  # fmt: skip
def test_sizes_of_a_foreign_config_are_compared_before_anything_is_made_of_them(field, value, tmp_path):
    write_foreign(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {field: value}))
    with pytest.raises(UserError, match=str(tmp_path)):
        read_foreign(tmp_path)


@pytest.mark.parametrize("depth", [10**12, np.nan, np.inf, -1, 2.5, True])
def test_a_layer_of_another_depth_than_its_leaves_is_refused(depth, tmp_path):
    write_layer(tmp_path)
    arrays = to_state(load_layer(tmp_path)[0])
    with pytest.raises(UserError, match="here does not fit its configuration: 4 leaves at depth"):
        from_state(arrays | {"depth": np.asarray(depth)}, "here")
    with pytest.raises(UserError, match="here"):
        from_state({name: array[:0] for name, array in arrays.items() if name != "depth"}, "here")


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre_tokenizer": split("(a+)+$")}, "retry-limit"),
        ({"pre_tokenizer": split("a*a*a*a*$")}, "retry-limit"),
        ({"pre_tokenizer": split("(")}, "unmatched parenthesis"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "precompiled"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "non-zero"),
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 64}}, "more than 100 times longer"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 64}},
            "more than 100 times longer",
        ),
        ({"model": {"max_input_chars_per_word": 10**9}}, r"model\.max_input_chars_per_word is 1000000000"),
        ({"model": {"vocab": {"a": 10**18}}}, "model.vocab.*1000000000000000000"),
        ({"model": {"vocab": {"a": -1}}}, "model.vocab"),
        ({"model": {"vocab": [1, 2]}}, "model.vocab"),
        ({"model": {"type": ["BPE"]}}, "model.type"),
    ],
)
def test_a_tokenizer_that_would_not_end_or_panics_is_a_sentence(changes, words, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state(**changes)))
    with pytest.raises(UserError, match=words) as caught:
        read_tokenizer(path)
    assert str(path) in str(caught.value)


def test_patterns_that_people_use_are_read(tmp_path):
    pattern = (
        r"(?i:'s|'t|'re|'ve)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(state(pre_tokenizer=split(pattern))))
    assert read_tokenizer(tmp_path / "tokenizer.json").encode("the").ids == [2, 5, 3]


def test_a_text_at_which_the_library_panics_is_a_sentence(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(state(pre_tokenizer=split("(z+)+$"))))
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"A text: the tokenizers library fails: .*retry-limit"):
        encode_texts(tokenizer, ["z" * 64 + "!"], None, CONFIG)


def test_a_word_of_hundreds_of_thousands_of_letters_is_unknown():
    word = "x" * 300_000
    tokenizer = train_wordpiece(["the cat sees the cat", word], 40)
    (row,) = encode_texts(tokenizer, [word], None, CONFIG).ids
    assert tokenizer.decode(row, skip_special_tokens=False) == "[CLS] [UNK] [SEP]"

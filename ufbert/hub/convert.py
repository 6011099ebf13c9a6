"""Checkpoints of other libraries to model folders and back."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ufbert.config import ModelConfig
from ufbert.data.tokenizer import check_fits, special_ids
from ufbert.errors import UserError
from ufbert.hub import bert, crammed, modernbert
from ufbert.hub.files import read_json, read_tensors, write_folder
from ufbert.hub.folder import ModelFolder, TaskInfo, flat_shapes, flatten, unflatten
from ufbert.hub.layout import Layout, Tensors, to_ours, to_theirs
from ufbert.hub.vocabulary import find_tokenizer, tokenizer_files


class Format(NamedTuple):
    """A family of foreign checkpoints."""

    label: str
    """What a person calls it."""
    kinds: tuple[str, ...]
    """Values of `model_type` in its `config.json`."""
    root: str
    """Prefix of its encoder's tensors, which a checkpoint of the bare encoder lacks; empty if it always has it."""
    skipped: str
    """Pattern of names that hold nothing this package uses: buffers, and heads it does not have."""
    model_config: Callable[[dict[str, Any], tuple[str, ...]], ModelConfig]
    foreign_config: Callable[[ModelConfig, tuple[str, ...], int], dict[str, Any]]
    heads_of: Callable[[set[str]], tuple[str, ...]]
    layout: Callable[[ModelConfig, tuple[str, ...]], Layout]


BUFFERS = r".*embeddings\.(position_ids|token_type_ids)|.*rotary_emb\..*|.*\.pe"
_BERT_SKIPPED = BUFFERS + r"|cls\.seq_relationship\..*"
_BERT = (bert.model_config, bert.foreign_config, bert.heads_of, bert.layout)
_CRAMMED = (crammed.model_config, crammed.foreign_config, crammed.heads_of, crammed.layout)
_MODERN = (modernbert.model_config, modernbert.foreign_config, modernbert.heads_of, modernbert.layout)
FORMATS = (
    Format("Hugging Face BERT", ("bert",), "bert.", _BERT_SKIPPED, *_BERT),
    Format("Hugging Face FNet", ("fnet",), "fnet.", _BERT_SKIPPED, *_BERT),
    Format("Hugging Face ModernBERT", ("modernbert",), "model.", BUFFERS, *_MODERN),
    Format("crammedBERT / UltraFastBERT", ("crammedBERT",), "", BUFFERS, *_CRAMMED),
)
HEAD_NAMES = ("cls.", "classifier.", "head.", "decoder.")


class Weights(NamedTuple):
    """What a checkpoint's tensors and `config.json` amount to."""

    format: Format
    config: ModelConfig
    heads: tuple[str, ...]
    params: dict[str, Any]
    labels: tuple[str, ...]
    """Class names of a classifier; empty for regression."""
    skipped: list[str]
    """Tensors left aside because they hold nothing that is used here."""


def read_checkpoint(source: Path, config: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any] | None, Path]:
    """Tensors, `config.json` (None where there is none) and the folder of a checkpoint folder or safetensors file.

    Raises UserError for a missing or damaged file, and for weights that are not safetensors.
    """
    if not source.exists():
        raise UserError(f"There is no checkpoint at {source}.")
    folder = source if source.is_dir() else source.parent
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if (source / "model.safetensors").is_file():
        files = [source / "model.safetensors"]
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise UserError(f"{source} has no .safetensors file; other weight files are not read, for they can run code.")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        tensors |= read_tensors(file)
    path = Path(config) if config else folder / "config.json"
    return tensors, read_json(path) if config or path.is_file() else None, folder


def import_weights(tensors: Tensors, values: dict[str, Any], where: str, *, fixed_len: int = 0) -> Weights:
    """Configuration and parameters from a checkpoint's tensors and its `config.json`.

    Raises UserError for a kind that is not known, for an architecture that the encoder does not express, and, naming
    each, for missing, unexpected or misshapen tensors.
    """
    kind = values.get("model_type")
    found = next((f for f in FORMATS if kind in f.kinds), None)
    if found is None:
        known = ", ".join(f.label for f in FORMATS)
        raise UserError(f"{where} holds a model of type {kind!r}; this package imports {known}.")
    renamed = {_clean(name, found.root): array for name, array in tensors.items()}
    skipped = sorted(name for name in renamed if re.fullmatch(found.skipped, name))
    used = {name: array for name, array in renamed.items() if name not in skipped}
    heads = found.heads_of(set(used))
    try:
        config = found.model_config(values, heads)
    except KeyError as error:
        raise UserError(f"The config.json of {where} lacks {error}.") from error
    if fixed_len:
        config = replace(config, fixed_len=fixed_len)
    labels = _labels(values, used) if "classifier" in heads else ()
    shapes = flat_shapes(config, heads, max(1, len(labels)) if "classifier" in heads else 0)
    flat = to_ours(found.layout(config, heads), used, shapes, where)
    params = unflatten({name: flat[name].astype(np.float32) for name in shapes})
    if "masked_lm" in heads:
        params.setdefault("masked_lm", {})
    return Weights(found, config, heads, params, labels, skipped)


def with_tokenizer(weights: Weights, folder: Path, tokenizer: str = "") -> ModelFolder:
    """The model of imported weights and the tokenizer of its folder (or the file given).

    Raises UserError if there is no tokenizer, or one of its ids lies past the model's embeddings.
    """
    words = find_tokenizer(folder, tokenizer)
    check_fits(words, weights.config.vocab_size, tokenizer or str(folder))
    task = TaskInfo("imported", weights.labels, {}) if "classifier" in weights.heads else None
    return ModelFolder(weights.config, weights.params, words, task)


def _clean(name: str, root: str) -> str:
    """A tensor's name with the root that a bare encoder's checkpoint lacks, and with the norms' present-day names."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    return name if not root or name.startswith((root, *HEAD_NAMES)) else root + name


def _labels(values: dict[str, Any], tensors: Tensors) -> tuple[str, ...]:
    """Class names of a classifier; none for regression, which has one output."""
    weight = tensors.get("classifier.weight", tensors.get("head.weight"))
    count = 1 if weight is None else weight.shape[0]
    names = values.get("id2label") or {}
    return () if count == 1 else tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))


def export_model(model: ModelFolder, folder: Path, to: str) -> str:
    """Write a model in another library's layout, and return what that library calls it. `to` is hf or ultrafastbert.

    Raises UserError, saying why, if the layout cannot express the model, and if the disk refuses.
    """
    config, heads = model.config, model.heads
    check_fits(model.tokenizer, config.vocab_size, "this model")
    n_outputs = (max(1, len(model.task.labels)) if model.task else 1) if "classifier" in heads else 0
    reasons = []
    for candidate in FORMATS:
        if (candidate.kinds == ("crammedBERT",)) != (to == "ultrafastbert"):
            continue
        try:
            values = candidate.foreign_config(config, heads, n_outputs)
            if values["model_type"] not in candidate.kinds:
                continue
            different = _differences(config, candidate.model_config(values, heads), heads)
            layout = candidate.layout(config, heads)
            covered = {path for rule in layout.rules for path in rule.paths}
            missing = sorted(covered ^ set(flat_shapes(config, heads, n_outputs)))
        except UserError as error:
            different, missing = [str(error)], []
        if not different and not missing:
            return _write(model, candidate, layout, values, folder)
        reasons.append((len(different) + len(missing), candidate.label, different or missing))
    _, label, why = min(reasons)
    raise UserError(f"{label}, the nearest there is, cannot express this model: {', '.join(why[:8])}.")


UNEXPRESSED = (
    "tree_backend",
    "attention_impl",
    "dtype",
    "dropout",
    "init_std",
    "tree_init",
    "tree_balance",
    "fourier_norm",
)
"""Fields that say how to compute or train, not what is computed; a foreign config may lose them."""
ONLY_FOR = {
    "dense": ("d_hidden", "activation"),
    "glu": ("d_hidden", "activation"),
    "tree": ("n_trees", "tree_depth", "tree_activation"),
    "leaf_tree": ("tree_depth", "activation", "leaf_width", "master_leaf"),
    "switch": ("d_hidden", "activation", "n_experts"),
    "attention": ("n_heads", "qk_norm"),
    "rotary": ("rotary_base",),
    "pre": ("first_norm",),
    "classifier": ("pooling", "pooler", "pooler_width"),
    "pooler": ("pooling", "pooler", "pooler_width"),
    "masked_lm": ("head_transform", "head_bias"),
}
"""Fields that matter only to a model with this part."""


def _differences(ours: ModelConfig, back: ModelConfig, heads: tuple[str, ...]) -> list[str]:
    """Fields that did not survive the way to the foreign config and back, among those that matter to this model."""
    parts = {part for layer in ours.layers for part in layer} | {ours.positions, ours.norm, *heads}
    special = {name for names in ONLY_FOR.values() for name in names}
    relevant = {name for part in parts for name in ONLY_FOR.get(part, ())}
    found = []
    for field in dataclasses.fields(ModelConfig):
        name, before, after = field.name, getattr(ours, field.name), getattr(back, field.name)
        if name in UNEXPRESSED or name.startswith(("leaf_", "router_", "capacity")) or (name in special - relevant):
            continue
        if name in ("mixer", "feedforward", "fixed_len"):
            before, after = (ours.layers, back.layers) if name != "fixed_len" else (ours.only_len, back.only_len)
        if before != after:
            found.append(f"{name}={getattr(ours, name)!r}")
    return found


def _write(model: ModelFolder, found: Format, layout: Layout, values: dict[str, Any], folder: Path) -> str:
    if model.task is not None and model.task.labels:
        values["id2label"] = {str(i): label for i, label in enumerate(model.task.labels)}
        values["label2id"] = {label: i for i, label in enumerate(model.task.labels)}
    elif model.task is not None:
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression"}
    if found.kinds[0] in ("fnet", "modernbert"):  # whose classes assume other ids where none are given
        ids = special_ids(model.tokenizer)
        values |= {"bos_token_id": ids.cls, "eos_token_id": ids.sep, "cls_token_id": ids.cls, "sep_token_id": ids.sep}
    tensors = to_theirs(layout, flatten(model.params))
    if not {"masked_lm", "classifier"} & set(model.heads):  # a bare encoder
        tensors = {name.removeprefix(found.root): array for name, array in tensors.items()}
    files = {"config.json": json.dumps(values, indent=2, sort_keys=True) + "\n"}
    files |= tokenizer_files(model.tokenizer, model.config.only_len or model.config.max_len)
    write_folder(folder, tensors, files)
    return f"{found.label} ({', '.join(values.get('architectures') or values['arch']['architectures'])})"

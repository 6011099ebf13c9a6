"""Checkpoints of other libraries to model folders and back."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.data.tokenizer import check_fits, special_ids
from ufbert.errors import UserError
from ufbert.hub.download import checkpoint_folder, other_place
from ufbert.hub.fields import SIGMOID, Answers, read_answers, unread
from ufbert.hub.folder import (
    SIZES,
    ModelFolder,
    TaskInfo,
    flat_shapes,
    flatten,
    load_model,
    n_outputs,
    save_model,
    unflatten,
)
from ufbert.hub.formats import FORMATS, Format, class_name, configuration, format_of, heads_of
from ufbert.hub.layout import BUFFERS, Layout, Named, Tensors, present_day, to_ours, to_theirs, with_tied
from ufbert.hub.leaf_layer import from_state, is_state, load_layer, save_layer, to_state
from ufbert.hub.onnx_export import export_onnx
from ufbert.hub.tensors import first_few, read_all_tensors, write_folder
from ufbert.hub.vocabulary import find_tokenizer, tokenizer_files
from ufbert.nn.registry import FEEDFORWARDS, MIXERS
from ufbert.options.convert import ExportOptions, ImportOptions
from ufbert.runtime.console import phase
from ufbert.runtime.typed import read_typed


class Weights(NamedTuple):
    """A checkpoint, read: our configuration and parameters."""

    format: Format
    config: ModelConfig
    heads: tuple[str, ...]
    params: dict[str, Any]
    labels: tuple[str, ...]
    """Class names of a classifier; empty for one score."""
    skipped: list[str]
    """Tensors that are not used here, by the names that the file has for them."""
    independent: bool
    """True if each score of a classifier is a probability of its own, by a sigmoid."""
    notes: list[str]
    """Lines for a person to read, a sentence each."""


def read_checkpoint(source: Path, config: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any] | None, Path]:
    """Tensors, `config.json` (None where there is none) and the folder of a checkpoint folder or safetensors file.

    Raises UserError for a missing or damaged file, and for weights that are not safetensors.
    """
    if not source.exists():
        raise UserError(f"There is no checkpoint at {source}{other_place(source)}.")
    tensors, folder = read_all_tensors(source), source if source.is_dir() else source.parent
    path = Path(config) if config else folder / "config.json"
    return tensors, read_typed(path, dict[str, Any]) if config or path.is_file() else None, folder


def import_weights(tensors: Tensors, values: dict[str, Any], where: str, *, fixed_len: int = 0) -> Weights:
    """Make our configuration and parameters of a checkpoint's tensors and its `config.json`.

    The class that `architectures` names decides which heads there are; where it names none, the tensors do. Raises UserError
    for a class or architecture that the encoder does not express, and for fields or tensors that do not fit.
    """
    name = class_name(values, where)
    found = format_of(values, name, tensors, where)
    named = with_tied(present_day(tensors, found.root, found.parts, where), found.tied)
    heads, notes = heads_of(found, name, set(named.tensors), where)
    unused = {
        tensor
        for tensor in named.tensors
        if BUFFERS.fullmatch(tensor)
        or any(tensor.startswith(part) and not set(owners) & set(heads) for part, owners in found.head_parts.items())
    }
    used = {tensor: array for tensor, array in named.tensors.items() if tensor not in unused}
    config = configuration(found, values, heads, where)
    if fixed_len:
        config = replace(config, fixed_len=fixed_len)
    answers = Answers((), False)
    if "classifier" in heads:
        weight = used.get("classifier.weight", used.get("head.weight"))
        answers = read_answers(values, 1 if weight is None or weight.ndim == 0 else weight.shape[0], where)
    shapes = flat_shapes(config, heads, max(1, len(answers.labels)) if "classifier" in heads else 0)
    layout = found.layout(config, heads)
    if any(path not in shapes for rule in layout.rules for path in rule.paths):
        raise UserError(f"The config.json of {where} says type_vocab_size=0, which the encoder does not express.")
    wanted, stored = sum(map(math.prod, shapes.values())), sum(array.size for array in used.values())
    if wanted > 2 * stored + 2**20:  # before arrays of the shapes of the configuration are made
        raise UserError(
            f"The config.json of {where} describes a model of {wanted:,} weights ({_sizes(found, config)}), and its tensors "
            f"are {stored:,}; one of them belongs to another checkpoint."
        )
    _check_vocabulary(layout, used, config, where, named)
    if "masked_lm" in heads and values.get("tie_word_embeddings") is False:
        _check_decoder(layout, used, where)
    says = f"The config.json beside it says {_sizes(found, config)}."
    flat = to_ours(layout, used, shapes, where, says, named.shown)
    bad = [named.shown(tensor) for tensor, array in used.items() if not np.isfinite(array).all()]
    if bad:
        raise UserError(f"{where} has weights that are no finite numbers: {first_few(bad)}. Take another checkpoint.")
    params = unflatten({path: flat[path].astype(np.float32) for path in shapes})
    if "masked_lm" in heads:
        params.setdefault("masked_lm", {})
    if named.wrappers:
        notes.append(f"taken out of the tensors' names: {', '.join(f'{wrapper}.' for wrapper in named.wrappers)}")
    strange = unread(found.by_path(values), found.fields)
    if strange:
        notes.append(f"fields of config.json that no class of this format has, not read: {first_few(strange)}")
    skipped = sorted(named.shown(tensor) for tensor in unused)
    return Weights(found, config, heads, params, answers.labels, skipped, answers.independent, notes)


def _sizes(found: Format, config: ModelConfig) -> str:
    """Say the sizes of a model by the names that its format has for them."""
    sizes = {their: getattr(config, our) for their, our in found.fields.names.items() if our in (*SIZES, "n_layers")}
    return ", ".join(f"{their} {size}" for their, size in sizes.items())


def _check_vocabulary(layout: Layout, used: Tensors, config: ModelConfig, where: str, named: Named) -> None:
    """Raise UserError if the embedding has another number of rows than the vocabulary."""
    words = layout.rules[0].name
    rows = used[words].shape[0] if words in used and used[words].ndim == 2 else config.vocab_size
    if rows != config.vocab_size:
        raise UserError(
            f"{named.shown(words)} of {where} has {rows:,} rows, and vocab_size of its config.json is {config.vocab_size:,}; "
            "one of them belongs to another checkpoint."
        )


def _check_decoder(layout: Layout, used: Tensors, where: str) -> None:
    """Raise UserError if a decoder that is said not to be tied is missing (one that differs is refused as untied)."""
    words = layout.rules[0].name
    if not any(copy in used for copy, source in layout.copies.items() if source == words):
        raise UserError(
            f"The config.json of {where} says tie_word_embeddings=False, and the weights hold only one of embedding and "
            "decoder; mend one of them."
        )


def with_tokenizer(weights: Weights, folder: Path, tokenizer: str = "") -> ModelFolder:
    """Join imported weights and the tokenizer of their folder (or the file given) to a model.

    Raises UserError if there is no tokenizer, or one of its ids lies past the model's embeddings.
    """
    words = find_tokenizer(folder, tokenizer)
    check_fits(words, weights.config.vocab_size, tokenizer or str(folder))
    task = TaskInfo("imported", weights.labels, {}, weights.independent) if "classifier" in weights.heads else None
    return ModelFolder(weights.config, weights.params, words, task)


def export_model(model: ModelFolder, folder: Path, to: str) -> str:
    """Write a model in another library's layout, and return what that library calls it. `to` is hf or ultrafastbert.

    Raises UserError, saying why, if the layout cannot express the model, and if the disk refuses.
    """
    config, heads = model.config, model.heads
    check_fits(model.tokenizer, config.vocab_size, "this model")
    pruned = [name for name in ("head_width", "layer_heads", "layer_hidden") if getattr(config, name)]
    if pruned:
        raise UserError(
            f"No layout of another library holds a model whose heads do not fill its width, or whose layers differ in width "
            f"({', '.join(pruned)}), as pruning leaves it; export it with --to onnx."
        )
    outputs = n_outputs(heads, model.task)
    reasons = []
    for candidate in FORMATS:
        if (candidate.kind == "crammedBERT") != (to == "ultrafastbert"):
            continue
        try:
            values = candidate.foreign_config(config, heads, outputs)
            if values["model_type"] != candidate.kind:
                continue
            different = _differences(config, configuration(candidate, values, heads, "this model"), heads)
            layout = candidate.layout(config, heads)
            covered = {path for rule in layout.rules for path in rule.paths}
            missing = sorted(covered ^ set(flat_shapes(config, heads, outputs)))
        except UserError as error:
            different, missing = [str(error)], []
        if not different and not missing:
            return _write(model, candidate, layout, values, folder)
        reasons.append((len(different) + len(missing), candidate.label, different or missing))
    _, label, why = min(reasons)
    raise UserError(f"{label}, the nearest there is, cannot express this model: {', '.join(why[:8])}.")


UNEXPRESSED = (
    "tree_backend", "attention_impl", "dtype", "dropout", "init_std", "zero_init_out", "final_norm_start", "tree_init",
    "tree_balance", "fourier_norm", "hidden_from",
)  # fmt: skip
"""Fields that say how to compute or train, not what is computed; a foreign config may lose them."""
ONLY_FOR = {
    "rotary": ("rotary_base",),
    "pre": ("first_norm",),
    "classifier": ("pooling", "pooler", "pooler_width"),
    "pooler": ("pooling", "pooler", "pooler_width"),
    "masked_lm": ("head_transform", "head_bias", "tie_head"),
}
"""Fields that matter only to a model with this part; those of mixers and feedforwards are in their entries."""


def _differences(ours: ModelConfig, back: ModelConfig, heads: tuple[str, ...]) -> list[str]:
    """Fields that did not survive the way to the foreign config and back, among those that matter to this model."""
    only_for = {name: layer.fields for name, layer in (MIXERS | FEEDFORWARDS).items()} | ONLY_FOR
    parts = {part for layer in ours.layers for part in layer} | {ours.positions, ours.norm, *heads}
    special = {name for names in only_for.values() for name in names}
    relevant = {name for part in parts for name in only_for.get(part, ())}
    found = []
    for field in dataclasses.fields(ModelConfig):
        name, before, after = field.name, getattr(ours, field.name), getattr(back, field.name)
        if name in UNEXPRESSED or name.startswith(("leaf_", "router_", "capacity")) or (name in special - relevant):
            continue
        if name.startswith("ngram_") and not ours.ngram_rows:
            continue
        if name in ("mixer", "feedforward", "fixed_len"):
            before, after = (ours.layers, back.layers) if name != "fixed_len" else (ours.only_len, back.only_len)
        if before != after:
            found.append(f"{name}={getattr(ours, name)!r}")
    return found


def _write(model: ModelFolder, found: Format, layout: Layout, values: dict[str, Any], folder: Path) -> str:
    """Write the folder of a model that a format expresses, and return what its library calls the model."""
    if model.task is not None:
        labels = model.task.labels or ("LABEL_0",)
        values["id2label"] = {str(i): label for i, label in enumerate(labels)}
        values["label2id"] = {label: i for i, label in enumerate(labels)}
        if model.task.independent and model.task.labels:
            values["problem_type"] = "multi_label_classification"
        elif model.task.independent:
            values["sentence_transformers"] = SIGMOID
        elif not model.task.labels:
            values["problem_type"] = "regression"
    if found.kind in ("fnet", "modernbert"):  # whose classes assume other ids where none are given
        ids = special_ids(model.tokenizer)
        values |= {"bos_token_id": ids.cls, "eos_token_id": ids.sep, "cls_token_id": ids.cls, "sep_token_id": ids.sep}
    tensors = to_theirs(layout, flatten(model.params))
    if not {"masked_lm", "classifier"} & set(model.heads):  # a bare encoder
        tensors = {name.removeprefix(found.root): array for name, array in tensors.items()}
    files = {"config.json": json.dumps(values, indent=2, sort_keys=True) + "\n"}
    files |= tokenizer_files(model.tokenizer, model.config.only_len or model.config.max_len)
    write_folder(folder, tensors, files)
    return f"{found.label} ({', '.join(values['architectures'])})"


@phase("importing the checkpoint", stays=False)
def import_checkpoint(options: ImportOptions) -> None:
    """Write a model folder, or a layer folder, of another library's checkpoint: `ufbert import`.

    Raises UserError for a checkpoint that the encoder does not express, and for an output that exists.
    """
    _refuse_existing(options.out)
    tensors, values, folder = read_checkpoint(checkpoint_folder(options.source), options.config)
    if is_state(set(tensors)):
        layer = from_state(tensors, options.source)
        save_layer(options.out, layer, options.activation)
        leaves, d, w = layer.w_in.shape
        print(f"layer {options.out}: a fast feedforward layer of {leaves} leaves of {w} neurons, {d} inputs")
        return
    if values is None:
        raise UserError(f"{options.source} has no config.json beside it; name one with --config FILE.")
    weights = import_weights(tensors, values, options.source, fixed_len=options.fixed_len)
    save_model(options.out, with_tokenizer(weights, folder, options.tokenizer))
    for note in weights.notes:
        print(note)
    if weights.skipped:
        print(f"not used, since this model has no place for them: {first_few(weights.skipped)}")
    model = weights.config
    print(
        f"model {options.out}: {weights.format.label}, {model.n_layers} layers x {model.d_model}, "
        f"{nn.count_params(model, ()):,} encoder parameters, heads: {', '.join(weights.heads) or 'none'}"
    )


@phase("exporting the model", stays=False)
def export_folder(options: ExportOptions) -> None:
    """Write a model folder in another library's layout: `ufbert export`.

    Raises UserError for a model that the layout does not express, and for an output that exists.
    """
    _refuse_existing(options.out)
    if options.to == "fastfeedforward":
        layer, _ = load_layer(options.folder)
        write_folder(options.out, to_state(layer), {})
        print(f"{options.out}/model.safetensors: a state for fastfeedforward's FFF.load_state_dict")
    elif options.to == "onnx":
        print(f"{options.out}: {export_onnx(load_model(options.folder), Path(options.out))}")
    else:
        print(f"{options.out}: {export_model(load_model(options.folder), Path(options.out), options.to)}")


def _refuse_existing(out: str) -> None:
    if Path(out).exists():
        raise UserError(f"{out} exists already; choose another --out.")

"""The model folder, the unit of exchange: `config.json`, `model.safetensors`, `tokenizer.json`.

Tensors are stored under their path in the parameter tree, joined by dots (`encoder.layer_00.tree.w_in`), in float32, or in a
quantised folder as `quantized.py` says.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.config.checks import check_kinds
from ufbert.data.tokenizer import check_fits
from ufbert.errors import UserError
from ufbert.hub.download import MODEL_FILES, model_folder, other_place
from ufbert.hub.layout import Shapes, check_tensors
from ufbert.hub.quantized import Quantization, from_stored, to_stored
from ufbert.hub.tensors import first_few, read_config, stored_tensors, write_folder
from ufbert.hub.vocabulary import read_tokenizer
from ufbert.runtime.console import phase

GLUE_PAIRS = {"cola": False, "sst2": False} | dict.fromkeys(
    ("mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"), True
)
"""`TaskInfo.pairs` of GLUE's tasks, for folders that were written before it was."""
FORMAT_VERSION = 2
"""Version of `config.json` of a quantised model folder; a folder of a newer format is refused. Others have version 1, so that
earlier versions of this package read them."""


@dataclass(frozen=True)
class TaskInfo:
    """The task of a fine-tuned folder."""

    name: str
    """Task name, for example sst2."""
    labels: tuple[str, ...]
    """Class names in the order of the classifier's scores; empty for regression."""
    metrics: dict[str, float]
    """Dev metrics of the weights in this folder."""
    independent: bool = False
    """True if each score is a probability of its own, by a sigmoid: of labels that do not exclude each other, or one score."""
    pairs: bool | None = None
    """True if the task is on pairs of texts, False if it is on single texts; None if the folder does not say."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "task.")


@dataclass(frozen=True)
class _Stored:
    """`config.json` of a model folder."""

    format: Literal["ufbert"]
    format_version: int
    model: ModelConfig
    heads: tuple[Literal["masked_lm", "pooler", "classifier"], ...] = ()
    task: TaskInfo | None = None
    quantized: Quantization | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A model in memory, as read from or written to a folder."""

    config: ModelConfig
    params: nn.Params
    tokenizer: Tokenizer
    task: TaskInfo | None = None
    quantized: Quantization | None = None
    """How its weights are rounded; then those parameters are `QuantizedTensor`s. None if all are float32."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Parameter groups besides the encoder."""
        return tuple(name for name in self.params if name != "encoder")


def n_outputs(heads: tuple[str, ...], task: TaskInfo | None) -> int:
    """Count the scores of the classifier; 0 without one."""
    if "classifier" not in heads:
        return 0
    return max(1, len(task.labels)) if task is not None else 1


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def flatten(params: nn.Params) -> dict[str, np.ndarray]:
    """Flatten a parameter tree to {"encoder.layer_00.tree.w_in": array, ...} in the tree's order."""
    return {path: np.asarray(value) for path, value in _leaves(params)}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Make a tree of values by path, as `flatten` names them."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def save_model(folder: str | Path, model: ModelFolder) -> None:
    """Write or replace a model folder, whole or not at all. Raises UserError if the disk refuses."""
    version = FORMAT_VERSION if model.quantized else 1
    config = {"format": "ufbert", "format_version": version, "model": asdict(model.config)}
    config["heads"] = list(model.heads)
    if model.task is not None:
        config["task"] = asdict(model.task)
    if model.quantized is not None:
        config["quantized"] = asdict(model.quantized)
    parameters = dict(_leaves(model.params))
    if model.quantized is None:
        parameters = {name: np.asarray(array, dtype=np.float32) for name, array in parameters.items()}
    flat = to_stored(parameters)
    tokenizer = model.tokenizer.to_str(pretty=True)
    write_folder(folder, flat, {"config.json": json.dumps(config, indent=2) + "\n", "tokenizer.json": tokenizer})


@phase("reading the model folder")
def load_model(folder: str | Path, *, lazily: bool = False) -> ModelFolder:
    """Read a model folder, or one of the Hugging Face hub (`hf:OWNER/NAME`), whole or not at all.

    With `lazily`, parameters are read whenever they are asked for their numbers, and not kept: an engine that packs them never
    holds both. Without, those of a quantised folder are made float32, and the model is no longer quantised.

    Raises UserError if the folder is absent, of another kind or damaged, or if its parts do not fit each other.
    """
    folder = model_folder(folder)
    paths = [folder / name for name in MODEL_FILES]
    config_path, weights_path, tokenizer_path = paths
    if not folder.is_dir():
        raise UserError(f"There is no model folder at {folder}{other_place(folder)}.")
    for path in paths:
        if not path.is_file():
            nested = " (its model/ folder is one)" if (folder / "model" / "config.json").is_file() else ""
            raise UserError(f"{folder} is not a model folder: it has no {path.name}{nested}.")
    stored = read_config(config_path, _Stored, "ufbert", FORMAT_VERSION, "a model folder of this package")
    model, heads, task = stored.model, stored.heads, stored.task
    if task is not None and task.pairs is None:
        task = replace(task, pairs=GLUE_PAIRS.get(task.name))
    how = stored.quantized
    if how is not None and stored.format_version == 1:
        names = ", ".join(asdict(how))
        raise UserError(f"{config_path} has format version 1, which has no quantized weights; quantized sets {names}.")
    if how is None and stored.format_version > 1:
        raise UserError(f"{config_path} has format version {stored.format_version}, and its field quantized is absent.")
    tensors: Mapping[str, Any] = stored_tensors(weights_path, with_int8=how is not None)
    if how is not None:
        tensors = from_stored(
            tensors, how, model.n_layers, str(weights_path)
        )  # shapes are compared before numbers are read
    last = f"encoder.layer_{model.n_layers - 1:02d}."
    if not any(name.startswith(last) for name in tensors):
        raise UserError(f"{weights_path} has no {last}*, and {config_path} says model.n_layers={model.n_layers}.")
    expected, shapes = flat_shapes(model, heads, n_outputs(heads, task)), {name: t.shape for name, t in tensors.items()}
    fields = first_few(deciding_fields(model, shapes, expected), 8)
    check_tensors(shapes, expected, str(weights_path), f"{config_path.name} beside it says {fields}.")
    params = unflatten({name: tensors[name] if lazily else jnp.asarray(tensors[name]) for name in expected})
    if "masked_lm" in heads:
        params.setdefault("masked_lm", {})
    if how is not None and not lazily:
        print(f"{folder} is quantised; its int8 weights are made float32", file=sys.stderr)
    tokenizer = read_tokenizer(tokenizer_path)
    check_fits(tokenizer, model.vocab_size, str(folder))
    return ModelFolder(model, params, tokenizer, task, how if lazily else None)


def folder_sha256(folder: Path) -> str:
    """Hash the files of a model folder. Raises UserError if one cannot be read."""
    digests = hashlib.sha256()
    for name in MODEL_FILES:
        try:
            with (folder / name).open("rb") as file:
                digests.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"Cannot read {folder / name}: {error.strerror or error}.") from error
    return digests.hexdigest()


SIZES = (
    "vocab_size", "max_len", "d_model", "d_hidden", "pooler_width", "n_trees", "leaf_width", "master_leaf", "n_experts",
    "n_token_types", "ngram_rows", "ngram_width", "value_embeddings",
)  # fmt: skip
"""Fields of ModelConfig that are lengths of arrays; `tree_depth` decides others."""
SWITCHES = {
    r"masked_lm\.bias": "head_bias", r"masked_lm\.decoder": "tie_head", r".*skip_scales": "unet_skips",
    r".*value_embeddings\.": "value_embeddings", r"masked_lm\.(transform|norm)\.": "head_transform",
    r"(masked_lm|pooler|classifier)\.": "heads", r".*embeddings\.types": "n_token_types",
    r".*ngrams\.projection": "ngram_width", r".*ngrams\.": "ngram_keys",
    r".*embeddings\.position": "positions", r".*embeddings\.projection": "embedding_projection",
    r".*norm\.bias": "norm_bias", r".*embeddings\.norm": "embedding_norm", r".*(query|key)_norm\.": "qk_norm",
    r".*final_norm\.": "final_norm", r".*mixer_norm\.": "first_norm", r".*leaf_tree\.master": "master_leaf",
    r".*routed_tree\.(leaf|shared).*bias": "leaf_bias", r".*routed_tree\.shared": "master_leaf",
    r".*routed_tree\.above": "leaf_ancestors", r".*routed_tree\.node": "tree_router",
    r".*layer_\d+\..*\.bias": "use_bias", r".*layer_\d+\.(attention|fourier)\.": "mixer", r".*layer_\d+\.": "feedforward",
}  # fmt: skip
"""Beginnings of parameters' paths, and the field that decides whether there are such parameters; the first counts."""


def deciding_fields(model: ModelConfig, stored: Shapes, expected: Shapes) -> list[str]:
    """List the fields of a `config.json`, with their values, that say otherwise than the stored tensors."""
    fields = []
    depth = {2**model.tree_depth, 2**model.tree_depth - 1, model.nodes_per_tree}
    has_tables = any(".ngrams." in path for path in stored)
    for path, shape in {**expected, **stored}.items():
        if path not in stored or path not in expected:
            field = next((field for start, field in SWITCHES.items() if re.match(start, path)), "feedforward")
            fields += ["ngram_rows" if field.startswith("ngram_") and not (model.ngram_rows and has_tables) else field]
        elif path.startswith("classifier.out.") and shape[-1] != expected[path][-1]:
            fields += ["task"]
        for wanted, size in zip(expected.get(path, ()), stored.get(path, ()), strict=False):
            if size != wanted:
                fields += [field for field in SIZES if getattr(model, field) == wanted]
                fields += ["tree_depth"] if wanted in depth and "tree." in path else []
                fields += ["layer_hidden"] if wanted in model.layer_hidden else []
                is_heads = ".attention." in path and wanted != model.d_model
                fields += ["head_width", "layer_heads" if model.layer_heads else "n_heads"] if is_heads else []
    known = {field: f"model.{field}={getattr(model, field)}" for field in vars(model)}
    return [known.get(field, field) for field in dict.fromkeys(fields)]


def flat_shapes(model: ModelConfig, heads: tuple[str, ...], outputs: int) -> dict[str, tuple[int, ...]]:
    """Find path and shape of every parameter; `outputs` are the classifier's scores, 0 without one.

    Raises UserError for an array of more than 2^31 entries in one direction.
    """
    inits = tuple(head for head in heads if head != "classifier")
    try:
        tree = nn.shapes(model, inits, outputs)
    except OverflowError as error:  # a length that jax cannot count
        raise UserError(f"The configuration has a larger array than there can be: {error}.") from error
    return {path: tuple(value.shape) for path, value in _leaves(tree)}


def with_task(model: ModelFolder, classifier: nn.Params, task: TaskInfo) -> ModelFolder:
    """Put the encoder of `model` under a classifier for `task`."""
    return replace(model, params={"encoder": model.params["encoder"], "classifier": classifier}, task=task)

"""The model folder, the unit of exchange: `config.json`, `model.safetensors`, `tokenizer.json`.

Tensors are stored under their path in the parameter tree, joined by dots (`encoder.layer_00.tree.w_in`), in float32.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.config.checks import check_kinds
from ufbert.config.stored import FORMAT_VERSION, from_json, to_json
from ufbert.data.tokenizer import check_fits
from ufbert.errors import UserError
from ufbert.hub.layout import check_floats, check_tensors
from ufbert.hub.tensors import read_json, read_tensors, stored_tensors, write_folder
from ufbert.hub.vocabulary import read_tokenizer

HEADS = ("masked_lm", "pooler", "classifier")
"""Parameter groups that a model may have besides the encoder."""


@dataclass(frozen=True)
class TaskInfo:
    """What a fine-tuned folder was fine-tuned for."""

    name: str
    """Task name, for example sst2."""
    labels: tuple[str, ...]
    """Class names in the order of the classifier's scores; empty for regression."""
    metrics: dict[str, float]
    """Dev metrics of the weights in this folder."""
    independent: bool = False
    """Whether each score is a probability of its own, by a sigmoid: labels that do not exclude each other, or one score between
    0 and 1 instead of a value."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "task.")


@dataclass(frozen=True)
class ModelFolder:
    """A model in memory, as read from or written to a folder."""

    config: ModelConfig
    params: nn.Params
    tokenizer: Tokenizer
    task: TaskInfo | None = None

    @property
    def heads(self) -> tuple[str, ...]:
        """Parameter groups besides the encoder."""
        return tuple(name for name in self.params if name != "encoder")


def flatten(params: nn.Params) -> dict[str, np.ndarray]:
    """{"encoder.layer_00.tree.w_in": array, ...} in the tree's order."""
    flat: dict[str, np.ndarray] = {}
    for name, value in params.items():
        if hasattr(value, "items"):
            flat.update({f"{name}.{rest}": array for rest, array in flatten(value).items()})
        else:
            flat[name] = np.asarray(value)
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def save_model(folder: str | Path, model: ModelFolder) -> None:
    """Write a model folder, whole or not at all; an existing folder at that path is replaced once the new one is ready.

    Raises UserError if the disk refuses.
    """
    config = {"format": "ufbert", "format_version": FORMAT_VERSION, "model": to_json(model.config)}
    config["heads"] = list(model.heads)
    if model.task is not None:
        config["task"] = to_json(model.task)
    flat = {name: np.asarray(array, dtype=np.float32) for name, array in flatten(model.params).items()}
    tokenizer = model.tokenizer.to_str(pretty=True)
    write_folder(folder, flat, {"config.json": json.dumps(config, indent=2) + "\n", "tokenizer.json": tokenizer})


def load_model(folder: str | Path, *, lazily: bool = False) -> ModelFolder:
    """Read a model folder; `lazily`, parameters are left in the file until they are asked for their numbers, and are not kept,
    so that an engine that packs them never holds both.

    Raises UserError, in one sentence, if it is absent, of another kind, incomplete, truncated, or if a tensor or the
    tokenizer does not fit the configuration; nothing is loaded partly.
    """
    folder = Path(folder)
    config_path, weights_path, tokenizer_path = (
        folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")
    )
    if not folder.is_dir():
        raise UserError(f"There is no model folder at {folder}.")
    for path in (config_path, weights_path, tokenizer_path):
        if not path.is_file():
            nested = " (its model/ folder is one)" if (folder / "model" / "config.json").is_file() else ""
            raise UserError(f"{folder} is not a model folder: it has no {path.name}{nested}.")
    config = _read_config(config_path)
    model = from_json(ModelConfig, config["model"], str(config_path))
    task = from_json(TaskInfo, config["task"], str(config_path)) if config.get("task") else None
    heads = tuple(config.get("heads", ()))
    odd = [name for name in heads if name not in HEADS]
    if odd:
        raise UserError(f"{config_path} names heads that this version does not know: {', '.join(map(repr, odd))}.")
    n_outputs = 0
    if "classifier" in heads:
        n_outputs = max(1, len(task.labels)) if task is not None else 1
    expected = flat_shapes(model, heads, n_outputs)
    tensors: Mapping[str, Any] = stored_tensors(weights_path) if lazily else read_tensors(weights_path)
    check_tensors({name: array.shape for name, array in tensors.items()}, expected, str(weights_path))
    check_floats(tensors, str(weights_path))
    params = unflatten({name: tensors[name] if lazily else jnp.asarray(tensors[name]) for name in expected})
    if "masked_lm" in heads:
        params.setdefault("masked_lm", {})
    tokenizer = read_tokenizer(tokenizer_path)
    check_fits(tokenizer, model.vocab_size, str(folder))
    return ModelFolder(model, params, tokenizer, task)


def flat_shapes(model: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter; `n_outputs` is the classifier's, 0 without one."""
    inits = tuple(head for head in heads if head != "classifier")
    tree = nn.shapes(model, inits, n_outputs)
    flat: dict[str, tuple[int, ...]] = {}

    def walk(prefix: str, node: Any) -> None:
        for name, value in node.items():
            if hasattr(value, "items"):
                walk(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = tuple(value.shape)

    walk("", tree)
    return flat


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("format") != "ufbert" or "model" not in config:
        kind = config.get("model_type")
        other = f"a {kind} model of another library" if kind else "not a model folder of this package"
        raise UserError(f"{path.parent} holds {other}; `ufbert import` reads those of other libraries.")
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise UserError(f"{path} has format version {version!r}; this ufbert reads up to {FORMAT_VERSION}. Upgrade it.")
    unknown = sorted(set(config) - {"format", "format_version", "model", "heads", "task"})
    if unknown:
        raise UserError(f"{path} has a setting this version does not know: {', '.join(unknown)}.")
    if not isinstance(config.get("heads", []), list):
        raise UserError(f"{path} says heads={config['heads']!r}, where a list of names belongs.")
    return config


def with_task(model: ModelFolder, classifier: nn.Params, task: TaskInfo) -> ModelFolder:
    """`model` with its encoder under a classifier for `task`."""
    return replace(model, params={"encoder": model.params["encoder"], "classifier": classifier}, task=task)

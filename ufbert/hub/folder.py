"""The model folder, the unit of exchange: `config.json`, `model.safetensors`, `tokenizer.json`.

Tensors are stored under their path in the parameter tree, joined by dots (`encoder.layer_00.tree.w_in`), in float32.
"""

import json
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
from ufbert.hub.layout import check_tensors
from ufbert.hub.tensors import read_config, stored_tensors, write_folder
from ufbert.hub.vocabulary import read_tokenizer

FORMAT_VERSION = 1
"""Version of `config.json` of a model folder; a folder of a newer format is refused."""


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
class _Stored:
    """`config.json` of a model folder."""

    format: Literal["ufbert"]
    format_version: int
    model: ModelConfig
    heads: tuple[Literal["masked_lm", "pooler", "classifier"], ...] = ()
    task: TaskInfo | None = None


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
    config = {"format": "ufbert", "format_version": FORMAT_VERSION, "model": asdict(model.config)}
    config["heads"] = list(model.heads)
    if model.task is not None:
        config["task"] = asdict(model.task)
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
    stored = read_config(config_path, _Stored, "ufbert", FORMAT_VERSION, "a model folder of this package")
    model, heads, task = stored.model, stored.heads, stored.task
    n_outputs = 0
    if "classifier" in heads:
        n_outputs = max(1, len(task.labels)) if task is not None else 1
    tensors = stored_tensors(weights_path)  # shapes are compared before numbers are read
    last = f"encoder.layer_{model.n_layers - 1:02d}."
    if not any(name.startswith(last) for name in tensors):
        raise UserError(f"{weights_path} has no {last}*, and {config_path} says model.n_layers={model.n_layers}.")
    expected = flat_shapes(model, heads, n_outputs)
    check_tensors({name: array.shape for name, array in tensors.items()}, expected, str(weights_path))
    params = unflatten({name: tensors[name] if lazily else jnp.asarray(tensors[name]) for name in expected})
    if "masked_lm" in heads:
        params.setdefault("masked_lm", {})
    tokenizer = read_tokenizer(tokenizer_path)
    check_fits(tokenizer, model.vocab_size, str(folder))
    return ModelFolder(model, params, tokenizer, task)


def flat_shapes(model: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter; `n_outputs` is the classifier's, 0 without one.

    Raises UserError for an array of more than 2^31 entries in one direction.
    """
    inits = tuple(head for head in heads if head != "classifier")
    try:
        tree = nn.shapes(model, inits, n_outputs)
    except OverflowError as error:  # a length that jax cannot count
        raise UserError(f"The configuration has a larger array than there can be: {error}.") from error
    flat: dict[str, tuple[int, ...]] = {}

    def walk(prefix: str, node: Any) -> None:
        for name, value in node.items():
            if hasattr(value, "items"):
                walk(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = tuple(value.shape)

    walk("", tree)
    return flat


def with_task(model: ModelFolder, classifier: nn.Params, task: TaskInfo) -> ModelFolder:
    """`model` with its encoder under a classifier for `task`."""
    return replace(model, params={"encoder": model.params["encoder"], "classifier": classifier}, task=task)

"""The model folder, the unit of exchange: `config.json`, `model.safetensors`, `tokenizer.json`.

Tensors are stored under their path in the parameter tree, joined by dots (`encoder.layer_00.tree.w_in`), in float32.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from ufbert import nn
from ufbert.config import FORMAT_VERSION, ModelConfig, from_json, to_json
from ufbert.errors import UserError


@dataclass(frozen=True)
class TaskInfo:
    """What a fine-tuned folder was fine-tuned for."""

    name: str
    """Task name, for example sst2."""
    labels: tuple[str, ...]
    """Class names in the order of the classifier's scores; empty for regression."""
    metrics: dict[str, float]
    """Dev metrics of the weights in this folder."""


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


def check_tensors(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise UserError naming each missing, unexpected or misshapen tensor."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise UserError(f"{where} does not fit its configuration: {'; '.join(problems)}.")


def save_model(folder: str | Path, model: ModelFolder) -> None:
    """Write a model folder, whole or not at all; an existing folder at that path is replaced once the new one is ready.

    Raises UserError if the disk refuses.
    """
    folder = Path(folder)
    config = {"format": "ufbert", "format_version": FORMAT_VERSION, "model": to_json(model.config)}
    config["heads"] = list(model.heads)
    if model.task is not None:
        config["task"] = to_json(model.task)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"Cannot write a model folder at {folder}: {error.strerror}.") from error
    try:
        scratch.chmod(0o755)
        flat = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in flatten(model.params).items()}
        save_file(flat, scratch / "model.safetensors", metadata={"format": "ufbert"})
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        model.tokenizer.save(str(scratch / "tokenizer.json"))
        _swap_in(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write a model folder at {folder}: {error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap_in(scratch: Path, folder: Path) -> None:
    """Put `scratch` in the place of `folder`."""
    if not folder.exists():
        os.rename(scratch, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, old / "old")
    os.rename(scratch, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_model(folder: str | Path) -> ModelFolder:
    """Read a model folder.

    Raises UserError, in one sentence, if it is absent, of another kind, incomplete, truncated, or if a tensor does not
    fit the configuration; nothing is loaded partly.
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
    n_outputs = 0
    if "classifier" in heads:
        n_outputs = max(1, len(task.labels)) if task is not None else 1
    expected = {name: leaf.shape for name, leaf in _flat_shapes(model, heads, n_outputs).items()}
    try:
        with safe_open(weights_path, framework="numpy") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_tensors(found, expected, str(weights_path))
            flat = {name: jnp.asarray(file.get_tensor(name)) for name in expected}
    except SafetensorError as error:
        raise UserError(f"{weights_path} is damaged or cut short: {error}.") from error
    params = unflatten(flat)
    if "masked_lm" in heads:
        params.setdefault("masked_lm", {})
    return ModelFolder(model, params, read_tokenizer(tokenizer_path), task)


def _flat_shapes(model: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, Any]:
    tree = nn.shapes(model, heads, n_outputs)
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        for name, value in node.items():
            if hasattr(value, "items"):
                walk(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    walk("", tree)
    return flat


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("format") != "ufbert" or "model" not in config:
        kind = config.get("model_type") if isinstance(config, dict) else None
        other = f"a {kind} model of another library" if kind else "not a model folder of this package"
        raise UserError(f"{path.parent} holds {other}; only folders written by ufbert can be loaded.")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this ufbert reads up to {FORMAT_VERSION}. Upgrade it.")
    return config


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A `tokenizer.json`. Raises UserError if it cannot be parsed."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a readable tokenizer: {error}.") from error


def with_task(model: ModelFolder, classifier: nn.Params, task: TaskInfo) -> ModelFolder:
    """`model` with its encoder under a classifier for `task`."""
    return replace(model, params={"encoder": model.params["encoder"], "classifier": classifier}, task=task)

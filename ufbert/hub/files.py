"""Folders and tensor files, read and written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ufbert.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is absent, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file; bfloat16 and float16 become float32. Raises UserError if it is damaged."""
    if not path.is_file():
        raise UserError(f"There is no tensor file {path}.")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short: {error}.") from error
    halves = ("float16", "bfloat16")
    return {name: array.astype(np.float32) if array.dtype.name in halves else array for name, array in tensors.items()}


def write_folder(
    folder: str | Path, tensors: Mapping[str, np.ndarray] | None, files: Mapping[str, str | bytes]
) -> None:
    """Write `model.safetensors` (of `tensors`) and other files into a folder, whole or not at all; an existing folder at that
    path is replaced once the new one is ready.

    Raises UserError if the disk refuses.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"Cannot write a model folder at {folder}: {error.strerror}.") from error
    try:
        scratch.chmod(0o755)
        if tensors is not None:
            arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
            save_file(arrays, scratch / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (scratch / name).write_bytes(content.encode() if isinstance(content, str) else content)
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

"""Folders and tensor files, read and written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ufbert.errors import UserError
from ufbert.ops.native import aligned


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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, read (as float32) whenever it is asked for its numbers, and not kept."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        stored = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        found = aligned(4 * stored.size, np.dtype(np.float32)).reshape(self.shape)  # jax takes that without a copy
        found[...] = stored
        return found if dtype is None else found.astype(dtype, copy=False)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, none of them read. Raises UserError if it is damaged."""
    try:
        with safe_open(path, framework="numpy"):
            pass  # it has looked whether all is there
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
        return {
            name: StoredTensor(
                path, np.dtype(kinds[one["dtype"]]), tuple(one["shape"]), 8 + length + one["data_offsets"][0]
            )
            for name, one in header.items()
            if name != "__metadata__"
        }
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}.") from error


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

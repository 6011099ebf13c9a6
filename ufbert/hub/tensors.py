"""Folders and tensor files, read and written whole or not at all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ufbert.errors import UserError
from ufbert.runtime.files import private_folder, publish
from ufbert.runtime.memory import aligned

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins."""
MAX_HEADER = 100_000_000
"""Longest header, in bytes, that the safetensors library reads."""
KINDS: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_, "I8": np.int8,
    "I16": np.int16, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
}  # fmt: skip
"""Types of numbers in a safetensors file that NumPy has, too."""


def first_few(names: Sequence[str], count: int = 6) -> str:
    """Names for a sentence: all of them, or the first few and how many more there are."""
    more = len(names) - count
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:count])} and {more} more"


def refuse_pointer(path: Path) -> None:
    """Raise UserError if a file holds a Git LFS pointer instead of what it is named for."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself: a clone without git-lfs leaves such pointers. Fetch the "
                "files with `git lfs pull`, or download them again."
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is absent, unreadable or something else."""
    try:
        refuse_pointer(path)
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a mark
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        raise UserError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length in bytes and content, by tensor, of the header of a safetensors file.

    Raises UserError if it is absent, a Git LFS pointer or damaged, or if it names a type of numbers that is not read.
    """
    if not path.is_file():
        raise UserError(f"There is no tensor file {path}.")
    try:
        refuse_pointer(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, MAX_HEADER))
        header = json.loads(text)
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        odd = {name: tensor["dtype"] for name, tensor in tensors.items() if tensor["dtype"] not in KINDS}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or cut short: it has no readable header.") from error
    if odd:
        names = first_few([f"{name} ({kind})" for name, kind in odd.items()])
        raise UserError(
            f"{path} holds tensors of a type that is not read: {names}. Convert them to F32, F16 or BF16 with the library that "
            "wrote them."
        )
    return length, tensors


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file; bfloat16 and float16 become float32. Raises UserError if it is damaged, or holds a
    type of numbers that is not read."""
    read_header(path)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short: {error}.") from error
    halves = ("float16", "bfloat16")
    return {name: array.astype(np.float32) if array.dtype.name in halves else array for name, array in tensors.items()}


def read_all_tensors(source: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, or of a folder: its `model.safetensors`, the files that its
    `model.safetensors.index.json` names, or all of its safetensors files.

    Raises UserError if there is none, if one is missing or damaged, and if two hold a tensor of the same name.
    """
    index, adapter = source / "model.safetensors.index.json", source / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path", "another model")
        raise UserError(
            f"{source} is an adapter of {base}, not a model; merge it into that with the library that made it."
        )
    wanted: dict[str, Any] = {}
    if not source.is_dir():
        files = [source]
    elif (source / "model.safetensors").is_file():
        files = [source / "model.safetensors"]
    elif index.is_file():
        wanted = read_json(index).get("weight_map") or {}
        if not isinstance(wanted, dict) or not all(isinstance(name, str) for name in wanted.values()):
            raise UserError(f"{index} has no weight_map from tensors to files.")
        files = [source / name for name in sorted(set(wanted.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise UserError(
                f"{source} lacks {len(missing)} of the {len(files)} files that {index.name} names: {first_few(missing)}. "
                "Download them into that folder."
            )
    else:
        files = sorted(source.glob("*.safetensors"))
    if not files or any(path.suffix != ".safetensors" for path in files):
        raise UserError(f"{source} has no .safetensors file. {_instead(source)}")
    tensors: dict[str, np.ndarray] = {}
    homes: dict[str, Path] = {}
    for path in files:
        for name, array in read_tensors(path).items():
            if name in tensors:
                raise UserError(
                    f"{homes[name].name} and {path.name} in {source} both hold {name}; name the file to read instead of the "
                    "folder."
                )
            tensors[name], homes[name] = array, path
    astray = [name for name, file in wanted.items() if name not in tensors or homes[name].name != file]
    if astray:
        raise UserError(f"The files of {source} do not hold what {index.name} says: {first_few(astray)}.")
    return tensors


def _instead(source: Path) -> str:
    """What to do about a folder or file without safetensors, by what else is in it."""
    names = sorted(path.name for path in source.iterdir()) if source.is_dir() else [source.name]
    within = sorted(path.parent for path in source.glob("**/*.safetensors")) if source.is_dir() else []
    if within:
        return f"There is one in {within[0]}; name that folder."
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        return (
            "PyTorch's own files are not read, for they can run code; load the model with the library that wrote it and call "
            "save_pretrained, which writes safetensors."
        )
    if any(name.endswith((".onnx", ".h5", ".msgpack", ".gguf")) for name in names):
        return "ONNX, HDF5, msgpack and GGUF files are not read; get the model's safetensors."
    return "Name a folder that has config.json and model.safetensors."


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
    """Every tensor of a safetensors file, none of them read. Raises UserError if it is damaged, or holds anything but floating
    point numbers."""
    length, header = read_header(path)
    try:
        with safe_open(path, framework="numpy"):
            pass  # it has looked whether all is there
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short: {error}.") from error
    return {
        name: StoredTensor(
            path, np.dtype(KINDS[tensor["dtype"]]), tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0]
        )
        for name, tensor in header.items()
    }


def write_folder(
    folder: str | Path, tensors: Mapping[str, np.ndarray] | None, files: Mapping[str, str | bytes]
) -> None:
    """Write a folder of `model.safetensors` (from `tensors`) and other files, whole or not at all.

    An existing folder at that path is replaced. Raises UserError if the disk refuses.
    """
    folder = Path(folder)
    try:
        with private_folder(folder.parent) as scratch:
            if tensors is not None:
                arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
                save_file(arrays, scratch / "model.safetensors", metadata={"format": "pt"})
            for name, content in files.items():
                (scratch / name).write_bytes(content.encode() if isinstance(content, str) else content)
            publish(scratch, folder, replace=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write a model folder at {folder}: {error}.") from error

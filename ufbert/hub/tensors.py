"""Folders and tensor files, read and written whole or not at all."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.runtime.files import private_folder, publish
from ufbert.runtime.memory import aligned
from ufbert.runtime.typed import Count, decode, read_typed, read_whole

MAX_HEADER = 100_000_000
"""Longest header, in bytes, that the safetensors library reads."""
KINDS: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_, "I8": np.int8,
    "I16": np.int16, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
}  # fmt: skip
"""Types of numbers in a safetensors file that NumPy has, too."""


def first_few(names: Iterable[str], count: int = 6) -> str:
    """Names for a sentence: all of them, or the first few and how many more there are; each is cut at 100 characters."""
    cut = [name if len(name) <= 100 else name[:97] + "..." for name in names]
    more = len(cut) - count
    return ", ".join(cut) if more <= 0 else f"{', '.join(cut[:count])} and {more} more"


@dataclass(frozen=True)
class _Stamp:
    """The fields that tell the `config.json` of one of our folders from others."""

    format: Any = None
    format_version: Any = None
    model_type: Any = None
    """Of other libraries' models."""


def read_config[T](path: Path, kind: type[T], mark: str, newest: int, noun: str) -> T:
    """Read the `config.json` of one of our folders, whose `format` is `mark`.

    Raises UserError if the folder is no `noun`, if its format is newer than `newest`, or, naming the field, if it is damaged.
    """
    data = read_whole(path)
    stamp = decode(data, _Stamp, str(path))
    if stamp.format != mark:
        theirs = f", but a {shown(stamp.model_type)} model of another library, which `ufbert import` reads"
        raise UserError(f"{path.parent} does not hold {noun}{theirs if stamp.model_type else ''}.")
    if type(stamp.format_version) is not int or not 1 <= stamp.format_version <= newest:
        version = shown(stamp.format_version)
        raise UserError(f"{path} has format version {version}; this ufbert reads up to {newest}. Upgrade it.")
    return decode(data, kind, str(path), exact=True)


@dataclass(frozen=True)
class _Entry:
    """An entry of a safetensors header."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


def _read_header(path: Path) -> tuple[int, dict[str, _Entry]]:
    """Read length in bytes and entries of the header of a safetensors file.

    Raises UserError if the file is absent, a Git LFS pointer, damaged or cut short, or if it holds a type that is not read.
    """
    if not path.is_file():
        raise UserError(f"There is no tensor file {path}.")
    try:
        if path.stat().st_size < 1024:
            read_whole(path)  # says so if it is a Git LFS pointer
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, MAX_HEADER))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        header = decode(text, dict[str, msgspec.Raw], "its header")
        header.pop("__metadata__", None)
        tensors = {name: decode(bytes(entry), _Entry, f"its header: {name[:100]}") for name, entry in header.items()}
    except UserError as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from error
    odd = [f"{name} ({entry.dtype[:100]})" for name, entry in tensors.items() if entry.dtype not in KINDS]
    if odd:
        raise UserError(
            f"{path} holds tensors of a dtype that is not read: {first_few(odd)}. Convert them to F32, F16 or BF16 with the "
            "library that wrote them."
        )
    try:
        with safe_open(path, framework="numpy"):
            pass  # it has looked whether all is there
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short: {str(error)[:200]} (data_offsets, shape).") from error
    return length, tensors


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a safetensors file; bfloat16 and float16 become float32. Raises UserError as for its header."""
    _, header = _read_header(path)
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in header}
    halves = ("float16", "bfloat16")
    return {name: array.astype(np.float32) if array.dtype.name in halves else array for name, array in tensors.items()}


@dataclass(frozen=True)
class _Adapter:
    base_model_name_or_path: str = "another model"


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]
    """The file of each tensor."""


def read_all_tensors(source: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a safetensors file, or of a folder: its `model.safetensors`, the files that its
    `model.safetensors.index.json` names, or all of its safetensors files.

    Raises UserError if there is none, if one is missing or damaged, and if two hold a tensor of the same name.
    """
    index, adapter = source / "model.safetensors.index.json", source / "adapter_config.json"
    if adapter.is_file():
        base = first_few([read_typed(adapter, _Adapter).base_model_name_or_path])
        raise UserError(f"{source} is an adapter of {base}, not a model; merge it into that by its library.")
    wanted: dict[str, str] = {}
    if not source.is_dir():
        files = [source]
    elif (source / "model.safetensors").is_file():
        files = [source / "model.safetensors"]
    elif index.is_file():
        wanted, present = read_typed(index, _Index).weight_map, {path.name for path in source.iterdir()}
        files = [source / name for name in sorted(set(wanted.values()))]
        missing = [name for name in sorted(set(wanted.values())) if name not in present]
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
    """Say how to get safetensors, by the other files of a folder."""
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
    stored: np.dtype
    shape: tuple[int, ...]
    offset: int
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)
    """Type of the numbers it gives; jax takes an array's word for it."""

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        stored = np.memmap(self.path, self.stored, "r", self.offset, self.shape)
        array = aligned(4 * stored.size, self.dtype).reshape(self.shape)  # jax takes that without a copy
        array[...] = stored
        return array if dtype is None else array.astype(dtype, copy=False)

    def as_stored(self) -> np.ndarray:
        """Read the numbers in the type that the file has."""
        return np.array(np.memmap(self.path, self.stored, "r", self.offset, self.shape))


def stored_tensors(path: Path, *, with_int8: bool = False) -> dict[str, StoredTensor]:
    """Find every tensor of a safetensors file and read none.

    Raises UserError if the file is damaged, or holds anything but floating point numbers; int8 is let through `with_int8`.
    """
    length, header = _read_header(path)
    tensors = {
        name: StoredTensor(path, np.dtype(KINDS[entry.dtype]), entry.shape, 8 + length + entry.data_offsets[0])
        for name, entry in header.items()
    }
    types = {name: tensor.stored for name, tensor in tensors.items()}
    check_floats({name: kind for name, kind in types.items() if not (with_int8 and kind == np.int8)}, str(path))
    return tensors


def check_floats(types: Mapping[str, np.dtype], where: str, shown: Callable[[str], str] = lambda name: name) -> None:
    """Raise UserError naming the first few tensors that hold whole numbers or truth values instead of weights."""
    odd = [f"{shown(name)} ({dtype.name})" for name, dtype in types.items() if dtype.kind in "biu"]
    if odd:
        raise UserError(
            f"{where} holds weights that are no floating point numbers: {first_few(odd)}. Quantised weights of other libraries "
            "are not read; take the checkpoint they were made of."
        )


def write_folder(
    folder: str | Path, tensors: Mapping[str, np.ndarray] | None, files: Mapping[str, str | bytes]
) -> None:
    """Write or replace a folder of tensors and other files, whole or not at all. Raises UserError if the disk refuses."""
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

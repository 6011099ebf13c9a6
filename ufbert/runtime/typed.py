"""The one reader of JSON: text from anywhere becomes a value of the type that was asked for, or a sentence.

Types are dataclasses (objects), NamedTuples (arrays) and what msgspec knows besides. An integer is no text, true is no
integer, and a number is finite; `float | None` allows null. A dataclass checks ranges in its `__post_init__`; elsewhere
`Count` is the type of a number of things.
"""

import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from ufbert.config.checks import shown, words
from ufbert.errors import UserError

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""A number of things, or an index."""
MIB = 2**20
POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of what a clone without git-lfs has instead of a large file."""
_NAN = re.compile(rb"([:\[,]\s?)-?(?:NaN|Infinity)\b")
"""Of lines that early versions wrote."""
MAX_LINE = MIB
"""Longest line of a JSONL file in bytes; a longer one is damage."""


@dataclass(frozen=True)
class Header:
    """What tells one JSON file of this project from another."""

    format: str = ""
    format_version: int | None = None


def read_typed[T](path: Path, kind: type[T] | GenericAlias, *, exact: bool = False, most: int = 16 * MIB) -> T:
    """Read a JSON file as a `kind`.

    Raises UserError, naming the file and the field, if the file is absent, larger than `most` bytes, damaged, or if it holds
    something else. `exact` also refuses fields that the dataclasses of `kind` do not have.
    """
    return decode(read_whole(path, most), kind, str(path), exact=exact)


def read_whole(path: Path, most: int = 16 * MIB) -> bytes:
    """Read a file of at most `most` bytes. Raises UserError if it is absent, larger, or no regular file."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for, a device never ends
            raise UserError(f"{path} is not a file.")
        if about.st_size > most:
            raise UserError(f"{path} has {about.st_size:,} bytes; such a file has at most {most:,}.")
        with path.open("rb") as file:
            data = file.read(most)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL in the path
        raise UserError(f"Cannot read {str(path)!r}: {error}.") from error
    if data.startswith(POINTER):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself: a clone without git-lfs leaves such pointers. Fetch the "
            "files with `git lfs pull`, or download them again."
        )
    return data


def decode[T](text: bytes | str, kind: type[T] | GenericAlias, where: str, *, exact: bool = False) -> T:
    """Decode JSON as a `kind`. Raises UserError, naming `where` and the field, as `read_typed`."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    data = data.removeprefix(b"\xef\xbb\xbf")  # some editors begin a file with a mark
    return _typed(lambda: msgspec.json.decode(data, type=kind), data, kind, where, exact)


def convert[T](values: Any, kind: type[T] | GenericAlias, where: str, *, exact: bool = False) -> T:
    """Turn JSON's Python values (dict, list, str, ...) into a `kind`. Raises UserError as `decode`."""
    return _typed(lambda: msgspec.convert(values, kind), values, kind, where, exact)


def read_lines[T](path: Path, kind: type[T] | GenericAlias, most: int = 256 * MIB) -> Iterator[T]:
    """Read a JSONL file, a `kind` a line; none if the file is absent. A line that holds something else is left out: a kill
    leaves a part of one.

    Raises UserError if the file is larger than `most` bytes or cannot be read.
    """
    if not path.exists():
        return
    decoder = msgspec.json.Decoder(kind)
    for line in _lines(path, most):
        for text in (line, _NAN.sub(rb"\1null", line)):
            try:
                yield decoder.decode(text)
                break
            except (ValueError, RecursionError, UserError):
                continue


def _lines(path: Path, most: int) -> Iterator[bytes]:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > most:
            raise UserError(f"{path} is not a file of at most {most:,} bytes.")
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                yield line
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error


def _typed(make: Callable[[], Any], source: Any, kind: Any, where: str, exact: bool) -> Any:
    """Return what `make()` decodes of `source`. Raises UserError for every failure."""
    try:
        value, unknown = make(), sorted(_unknown(source, kind, "")) if exact else []
    except msgspec.ValidationError as error:
        try:
            sentence = _wrong(source, kind, where, str(error))
        except (ValueError, RecursionError) as later:  # what follows the wrong value is no JSON
            sentence = _unreadable(source, where, later)
        raise UserError(sentence) from error
    except UserError as error:  # of a dataclass's own checks
        raise UserError(f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(_unreadable(source, where, error)) from error
    if unknown:
        names = ", ".join(name if name.replace(".", "").isidentifier() else shown(name) for name in unknown[:6])
        raise UserError(f"{where} has a setting this version does not know: {names}.")
    return value


def _unreadable(data: Any, where: str, error: Exception) -> str:
    """Write a sentence about text that is no JSON: `... invalid character in line 3, at '"peak_lr": NaN'`."""
    position = re.search(r"\(byte (\d+)\)", str(error))
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    elif isinstance(error, UnicodeError):  # on decoding, or of half a surrogate pair
        reason = "it is not UTF-8 text"
    elif not data.strip():
        reason = "it is empty"
    elif position is None:  # "Input data was truncated"
        reason = "it is cut short"
    else:
        at, what = int(position[1]), str(error).removeprefix("JSON is malformed: ").partition(" (byte")[0]
        near = data[max(0, at - 40) : at + 12].decode(errors="replace").splitlines()[-1].strip()
        reason = f"{what} in line {data.count(b'\n', 0, at) + 1}, at {shown(near)}"
    return f"{where} is not readable JSON: {reason}."


def _wrong(source: Any, kind: Any, where: str, message: str) -> str:
    """Write a sentence about a value that is not of its type. `message` is msgspec's, such as "Expected `int`, got `str` - at
    `$.train.mask_rate[0]`"."""
    reason, _, path = message.partition(" - at `")
    steps = [int(s) if s.isdecimal() else s for s in re.findall(r"[^.\[\]`]+|\.\.\.", path.partition("$")[2])]
    name, value, wanted = _follow(source, kind, steps)
    if missing := re.search(r"missing required field `(.+)`", reason):
        return f"{where}: {f'{name}.{missing[1]}'.lstrip('.')} is missing."
    if not name:
        return f"{where} holds {value} where {words(wanted)} belongs."
    if not reason.startswith(("Expected", "Invalid", "Number", "Integer")):  # of a __post_init__
        return f"{where}: {name}: {reason}."
    return f"{where}: {name} is {value}; it must be {words(wanted)}."


def _follow(source: Any, kind: Any, steps: list[int | str]) -> tuple[str, str, Any]:
    """Return the name of a path, the value there, cut for a sentence, and the type that it should have."""
    name = ""
    for step in steps:
        kind = next(filter(None, (_inner_kind(part, step) for part in _parts(kind))), Any)
        inner = _level(source, type(step))
        if step == "...":  # in an object whose names are free, msgspec does not say which
            step = next((name for name, value in inner.items() if not _fits(value, kind)), step)
        source = inner.get(step) if isinstance(step, str) else inner[step]
        name += f"[{step}]" if isinstance(step, int) else f".{step}"
    if isinstance(source, bytes | msgspec.Raw):
        text = bytes(source).decode(errors="replace").strip()
        return name.lstrip("."), text if len(text) <= 60 else text[:57] + "...", kind
    return name.lstrip("."), shown(source), kind


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.json.decode(value, type=kind) if isinstance(value, msgspec.Raw) else msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError, UserError):
        return False
    return True


def _level(source: Any, step: type) -> Any:
    """Decode one level of an object or array, and not the values in it."""
    if not isinstance(source, bytes | msgspec.Raw):
        return source
    return msgspec.json.decode(source, type=dict[str, msgspec.Raw] if step is str else list[msgspec.Raw])


_hints = cache(lambda kind: get_type_hints(kind, include_extras=True))


def _parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _inner_kind(kind: Any, step: int | str) -> Any:
    """Return the type of a field, of an array's entry, or of the values of an object; None if `kind` has none."""
    if get_origin(kind) is tuple and get_args(kind)[-1] is not ... and isinstance(step, int):
        return get_args(kind)[step]
    if get_origin(kind) in (tuple, list, dict):
        return get_args(kind)[1 if get_origin(kind) is dict else 0]
    if isinstance(kind, type) and (is_dataclass(kind) or hasattr(kind, "_fields")):
        return list(_hints(kind).values())[step] if isinstance(step, int) else _hints(kind).get(step)
    return None


def _unknown(source: Any, kind: Any, before: str) -> Iterator[str]:
    """Yield the names of fields that the dataclass `kind`, or one within it, does not have."""
    for part in _parts(kind):
        origin, entry = get_origin(part), _inner_kind(part, 0)
        if is_dataclass(part):
            for name, value in _fields_of(source, str).items():
                if name in _hints(part):
                    yield from _unknown(value, _hints(part)[name], f"{before}{name}.")
                else:
                    yield f"{before}{name}"
        elif origin in (list, tuple) and is_dataclass(entry):
            for value in _fields_of(source, int):
                yield from _unknown(value, entry, before)


def _fields_of(source: Any, step: type) -> Any:
    """One level of a value that may be of another kind, such as null, and has no fields then."""
    try:
        level = _level(source, step)
    except msgspec.ValidationError:
        return {}
    return level if isinstance(level, dict if step is str else list | tuple) else {}

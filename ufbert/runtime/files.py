"""Files: where the cache is, and writing that leaves a whole file or none."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ufbert.errors import UserError


def to_json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which knows no NaN and no infinity: such a number becomes null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its final name only when it is whole. Raises UserError if the disk refuses."""
    write_text(path, to_json_text(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under its final name only when it is whole, with its line ends as they are.

    Makes the folder where it is missing. Raises UserError if the disk refuses.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8", newline="")
        os.replace(scratch, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error


def user_cache() -> Path:
    """$UFBERT_CACHE, or ufbert/ in the user's cache folder: prepared text and compiled steps."""
    own = os.environ.get("UFBERT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ufbert"


def expand_home(option: str) -> str:
    """An option with the user's home folder for every `~` that begins a path in it, as in `--out=~/run` or
    `text:~/a.txt,~/b.txt`: a shell does that for none but a whole word."""
    return re.sub(r"(^|[=:,])~(?=/|$)", lambda start: start[1] + os.path.expanduser("~"), option)


_SUFFIX = ".partial"


@contextlib.contextmanager
def private_folder(root: Path) -> Generator[Path]:
    """A new folder under `root` that no other process touches; gone at the end, unless `publish` has renamed it.

    Its owner holds a lock on it that the system gives up when the process dies, however it dies. What dead processes left
    is removed first. Raises OSError if the disk refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)  # until the new folder has its own lock, nobody may take it for a dead one's
        _remove_the_dead(root)
        scratch = Path(tempfile.mkdtemp(prefix=f".{os.getpid()}-", suffix=_SUFFIX, dir=root))
        scratch.chmod(0o755)
        descriptor = os.open(scratch, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


def _remove_the_dead(root: Path) -> None:
    for folder in root.glob(f".*{_SUFFIX}"):
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:
            continue  # its owner has just removed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue  # its owner is alive
        finally:
            os.close(descriptor)


def publish(scratch: Path, final: Path) -> None:
    """Put a finished folder on the disk and rename it to `final`, so that not even a power cut leaves a part of it there.

    If another process was first, its folder stays and `scratch` is left as it is.
    """
    for path in (*scratch.iterdir(), scratch):
        _sync(path)
    try:
        os.rename(scratch, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

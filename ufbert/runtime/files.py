"""Files: where the cache is, and writing that leaves a whole file or none."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
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
    """Write a value as JSON, whole or not at all. Raises UserError if the disk refuses."""
    write_text(path, to_json_text(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all, with its line ends as they are. A missing folder is made.

    Raises UserError if the disk refuses.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8", newline="")
        os.replace(scratch, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error


def user_cache() -> Path:
    """Return the folder of prepared text and compiled programs: $UFBERT_CACHE, or ufbert/ in the user's cache folder."""
    cache = os.environ.get("UFBERT_CACHE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ufbert"


def expand_home(option: str) -> str:
    """Replace every `~` that begins a path in an option by the user's home folder, as in `text:~/a.txt,~/b.txt`.

    A shell does so only for a whole word.
    """
    return re.sub(r"(^|[=:,])~(?=/|$)", lambda start: start[1] + os.path.expanduser("~"), option)


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""


@contextlib.contextmanager
def private_folder(root: Path) -> Generator[Path]:
    """Make a folder under `root` that no other process touches, and remove it at the end unless `publish` has renamed it.

    What killed processes left there is removed first. Raises OSError if the disk refuses.
    """
    root.mkdir(parents=True, exist_ok=True)
    # A living owner holds a lock on its folder, which the system releases when the process dies, however it dies. The lock on
    # `root` bridges the moment between making the folder and locking it. Folders of other machines, whose locks are not seen
    # over a network file system, are left alone.
    prefix = f".{socket.gethostname()}-"
    gate = os.open(root, os.O_RDONLY)
    try:
        _lock(gate)
        for folder in root.glob(f"{prefix}*.partial"):
            _remove_if_unlocked(folder)
        scratch = root / f"{prefix}{secrets.token_hex(8)}.partial"
        scratch.mkdir()  # as the umask says; a folder of `tempfile` would be closed to others
        descriptor = os.open(scratch, os.O_RDONLY)
        _lock(descriptor)
    finally:
        os.close(gate)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


def _remove_if_unlocked(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # its owner has just removed it
    if _lock(descriptor, fcntl.LOCK_NB):  # else its owner is alive
        shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def _lock(descriptor: int, options: int = 0) -> bool:
    """Lock an open folder. Returns false if another process holds the lock, or if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | options)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def publish(scratch: Path, final: Path, replace: bool = False) -> None:
    """Rename a finished private folder to `final`, so that not even a power cut leaves a part of it there.

    Its files become readable as the umask says, whatever the library that wrote them makes of that. An existing folder at
    `final` is replaced if `replace` says so. Otherwise it stays, as another process was first.
    """
    asked = scratch.stat().st_mode & 0o666  # `private_folder` made it under the umask
    for path in scratch.iterdir():
        mode = path.stat().st_mode
        if asked & ~mode:
            path.chmod(stat.S_IMODE(mode) | asked)
        _sync(path)
    _sync(scratch)
    old = None
    if replace and final.exists():
        # If the process is killed between these two renames, the old folder is still on the disk.
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
        os.rename(final, old / "old")
    try:
        os.rename(scratch, final)
    except OSError as error:
        if replace or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)

"""A folder that one process writes at a time: a run's, or a sweep's.

Its owner holds a lock that the system gives up when the process dies, however it dies. Over a network file system that holds
between machines, too, unless it is mounted with locks of its own machine only (`nolock`, `local_lock=flock`).
"""

import contextlib
import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from ufbert.errors import UserError
from ufbert.runtime.typed import read_typed

LOCK = "in_use.lock"
"""The locked file of a folder that is being written; it says who writes."""
_PATIENCE = 1.0
"""Seconds, in which whoever has just taken a lock has said who it is."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def claimed(folder: Path) -> Generator[None]:
    """Keeps other processes from claiming a folder, which is made where it is missing and is gone at the end if it is empty.

    Raises UserError, with the process and machine of its owner, if another process has it; also if it cannot be written.
    """
    lock = _taken_lock(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if lock is not None:
                (folder / LOCK).unlink()  # while it is held: whoever has it open already finds that it is gone
            folder.rmdir()
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def claimed_new(folder: Path) -> Generator[None]:
    """Claims a folder that must be empty, but for what a kill leaves of a beginning. Raises UserError as `claimed` does."""
    if not (folder / LOCK).exists():
        refuse_taken(folder)  # nothing is written into a stranger's folder
    with claimed(folder):
        refuse_taken(folder)
        yield


def new_folder(root: Path, stem: str) -> Path:
    """Make and return the first of root/STEM, root/STEM-2, root/STEM-3, ... that is not there yet."""
    for number in count(1):
        folder = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _cannot_make(folder, error) from error
        return folder
    raise AssertionError("there are more numbers")


def refuse_taken(folder: Path) -> None:
    """Raises UserError if something stands where a run folder is to be, other than what a kill leaves of its beginning."""
    if folder.is_dir():
        if all(path.name == LOCK or path.name.endswith(".partial") for path in folder.iterdir()):
            return
    elif not os.path.lexists(folder):
        return
    raise UserError(f"{folder} exists already; pass --resume to go on with it, or name another folder with --out.")


def refuse_links(folder: Path) -> None:
    """Raises UserError for a link to a file in a folder that may come from anywhere: what is written there lands elsewhere."""
    for path in folder.iterdir():
        if path.is_symlink() and not path.is_dir():
            raise UserError(f"{path} is a link, to {os.readlink(path)}; put a file in its place, or delete it.")


def discard(folder: Path) -> None:
    """Remove what is in a claimed folder, but for the lock, which goes when the claim ends."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _taken_lock(folder: Path) -> FileLock | None:
    """The lock of a folder, held; None where the file system has no locks. Raises UserError if another process holds it."""
    lock = FileLock(folder / LOCK, fallback_to_soft=False)
    for attempt in range(3):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_make(folder, error) from error
        try:
            lock.acquire(timeout=_PATIENCE, poll_interval=0.05)
            break
        except Timeout:
            raise UserError(
                f"{folder} is in use by {_owner(folder)}; wait until that has ended, or name another folder with --out."
            ) from None
        except FileNotFoundError as error:
            if attempt == 2:  # until then: another process has just removed the empty folder
                raise _cannot_make(folder, error) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"Cannot write in {folder}: {error.strerror}.") from error
            print(f"note: the file system of {folder} has no locks; see that no other process writes there", flush=True)
            return None
    owner = _Owner(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
    with contextlib.suppress(OSError):  # a full disk stops what follows with a sentence of its own
        (folder / LOCK).write_text(json.dumps(asdict(owner)) + "\n", encoding="utf-8")
    return lock


@dataclass(frozen=True)
class _Owner:
    """Who holds the lock of a folder, as the lock file says."""

    process: int
    host: str
    since: str


def _owner(folder: Path) -> str:
    """Who says to hold a folder's lock. A dead owner's words are gone as soon as the next one holds it."""
    try:
        owner = read_typed(folder / LOCK, _Owner)
    except UserError:
        return "another process"
    return f"process {owner.process} on {owner.host}, since {owner.since}"


def _cannot_make(folder: Path, error: OSError) -> UserError:
    return UserError(f"Cannot make the run folder {folder}: {error.strerror}.")

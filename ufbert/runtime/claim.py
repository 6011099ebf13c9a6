"""Claim a folder (a run's, or a sweep's), so that one process writes there at a time.

The owner holds a lock that the system releases when the process dies, however it dies. Over a network file system this works
between machines, too, unless it is mounted with locks of its own machine only (`nolock`, `local_lock=flock`).
"""

import contextlib
import fcntl
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
from ufbert.runtime.files import NO_LOCKS
from ufbert.runtime.typed import read_typed

LOCK = "in_use.lock"
"""The locked file of a folder that is being written; it names the process that writes."""
_PATIENCE = 1.0
"""Seconds to wait for a lock. In this time a new owner has written its name."""


@contextlib.contextmanager
def claimed(folder: Path) -> Generator[None]:
    """Claim a folder while entered. It is made if it is missing, and removed at the end if it is empty.

    Raises UserError if the folder cannot be written, or if another process has claimed it (with the owner's process number
    and machine).
    """
    lock = _acquire(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if lock is not None:
                # Unlinked while it is held: a process that has opened it already notices, and opens the next one.
                (folder / LOCK).unlink()
            folder.rmdir()
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def claimed_new(folder: Path) -> Generator[None]:
    """Claim a folder that holds nothing yet. Raises UserError as `claimed` and `refuse_taken` do."""
    if not (folder / LOCK).exists():
        refuse_taken(folder)  # before the lock is written: nothing is written into a stranger's folder
    with claimed(folder):
        refuse_taken(folder)
        yield


def is_claimed(folder: Path) -> bool:
    """Tell if a living process has claimed a folder. On a file system without locks, one that was killed seems alive."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:  # held, or there are no locks
        return True
    finally:
        os.close(descriptor)


def new_folder(root: Path, stem: str) -> Path:
    """Make and return the first of root/STEM, root/STEM-2, root/STEM-3, ... that does not exist yet."""
    for number in count(1):
        folder = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _cannot_make(folder, error) from error
        return folder
    raise AssertionError("count() does not end")


def refuse_taken(folder: Path) -> None:
    """Raise UserError if a new run must not use a folder: something stands there that a killed start does not leave behind."""
    if folder.is_dir():
        if all(path.name == LOCK or path.name.endswith(".partial") for path in folder.iterdir()):
            return
    elif not os.path.lexists(folder):
        return
    raise UserError(f"{folder} exists already; pass --resume to go on with it, or name another folder with --out.")


def refuse_links(folder: Path) -> None:
    """Raise UserError if a folder holds a link to a file: what is written through it would land elsewhere."""
    for path in folder.iterdir():
        if path.is_symlink() and not path.is_dir():
            raise UserError(f"{path} is a link, to {os.readlink(path)}; put a file in its place, or delete it.")


def discard(folder: Path) -> None:
    """Empty a claimed folder, except for its lock, which goes when the claim ends."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _acquire(folder: Path) -> FileLock | None:
    """Acquire the lock of a folder; None if the file system has no locks. Raises UserError if another process holds it."""
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
            if (
                attempt == 2
            ):  # the first times: another process has just removed the empty folder at the end of its claim
                raise _cannot_make(folder, error) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"Cannot write in {folder}: {error.strerror}.") from error
            print(f"note: the file system of {folder} has no locks; let no other process write there", flush=True)
            return None
    owner = _Owner(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))
    with contextlib.suppress(OSError):  # if the disk is full, the first real write says so
        (folder / LOCK).write_text(json.dumps(asdict(owner)) + "\n", encoding="utf-8")
    return lock


@dataclass(frozen=True)
class _Owner:
    """The holder of a folder's lock, as the lock file says."""

    process: int
    host: str
    since: str


def _owner(folder: Path) -> str:
    """Describe the process that holds a folder's lock, as it wrote itself down."""
    try:
        owner = read_typed(folder / LOCK, _Owner)
    except UserError:
        return "another process"
    return f"process {owner.process} on {owner.host}, since {owner.since}"


def _cannot_make(folder: Path, error: OSError) -> UserError:
    return UserError(f"Cannot make the run folder {folder}: {error.strerror}.")

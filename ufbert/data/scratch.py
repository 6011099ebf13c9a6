"""Folders that appear under their final name whole or not at all, whoever is killed and whoever else writes the same one."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

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

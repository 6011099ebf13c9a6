"""Find the compiled kernels: in the package, in the user's cache, or compiled now into that."""

import ctypes
import fcntl
import os
import stat
import sys
from pathlib import Path

from ufbert.ops.native.compiler import (
    CPU_SECONDS,
    SOURCES,
    CannotBuild,
    checksum,
    compile_to,
    compiler,
    cores,
    source_key,
)
from ufbert.runtime.console import phase, show
from ufbert.runtime.files import private_folder, user_cache

SHIPPED = SOURCES
"""Folder in which a wheel brings compiled kernels."""


def library() -> Path:
    """Return the shared library of the kernels: the package's, the cache's, or one that is compiled now. Raises CannotBuild.

    Compiled kernels are code, so they are loaded from the cache only if folder and file belong to this user or to root and
    nobody else may write them. If the folder `native` of the cache is another user's, this user gets one of their own next to
    it. A library's name is a hash of all that decides what it does, and its checksum. Processes that need the kernels at the
    same time wait for the first to compile them.
    """
    if sys.platform == "win32":
        raise CannotBuild("they have not been tried on Windows")
    key = source_key()
    if path := _shipped(key):
        return path
    reasons = []
    for folder in (user_cache() / "native", user_cache() / f"native-{os.getuid()}"):
        try:
            if not folder.exists():
                compiler()  # if there is none, no folder is made
            if _is_ours(folder):
                return _undamaged(folder, key + _system()) or _make(folder, key + _system())
            reasons.append(f"{folder} is another user's, or others may write there ($UFBERT_CACHE names another cache)")
        except OSError as error:
            reasons.append(f"{folder} cannot be written ({error.strerror})")
    raise CannotBuild(reasons[0])


def _shipped(key: str) -> Path | None:
    """Find the kernels that a wheel brought, if they are of this source, undamaged, and not for a newer system than this."""
    for path in SHIPPED.glob(f"kernels-{key}-*.so"):
        try:
            with path.open("rb") as file:
                if not path.stem.endswith(f"-{checksum(file)}"):
                    raise OSError("it is not as it was made")
            ctypes.CDLL(str(path))
            return path
        except OSError as error:
            print(f"{path} is not used: {error}", file=sys.stderr, flush=True)
    return None


def _system() -> str:
    """Return the version of the C library, of which compiled kernels need at least that for which they were compiled."""
    try:
        return f"-{os.confstr('CS_GNU_LIBC_VERSION')}".replace(" ", "")
    except (ValueError, OSError):  # another C library
        return ""


def _is_ours(folder: Path) -> bool:
    """Make a folder in which only this user and root may write. Returns false if others may, and that cannot be changed."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid == os.getuid() and status.st_mode & 0o022:  # the default where every user has a group of their own
        folder.chmod(status.st_mode & 0o755)
        status = folder.stat()
    owners = {status.st_uid, folder.lstat().st_uid}
    return owners <= {0, os.getuid()} and not status.st_mode & 0o022


def _undamaged(folder: Path, key: str) -> Path | None:
    return next((path for path in sorted(folder.glob(f"{key}-*.so")) if not _flaw(path)), None)


def _flaw(path: Path) -> str:
    """Return why compiled kernels must not be loaded, or an empty string."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return f"cannot be opened as a file ({error.strerror})"
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "is not a file"
        if status.st_uid not in (0, os.getuid()):
            return "belongs to another user"
        if status.st_mode & 0o022:
            return "may be written by other users"
        return "" if path.stem.endswith(f"-{checksum(file)}") else "is not as it was made"


def _make(folder: Path, key: str) -> Path:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with phase("waiting for another process that compiles the CPU kernels"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        if path := _undamaged(folder, key):  # compiled by another process while this one waited for the lock
            return path
        damaged = sorted(folder.glob(f"{key}-*.so"))
        try:
            command = compiler()
        except CannotBuild as error:
            raise CannotBuild("".join(f"{path} {_flaw(path)}, and " for path in damaged) + str(error)) from error
        for path in damaged:
            print(f"{path} {_flaw(path)}; deleting it and compiling the kernels again", file=sys.stderr, flush=True)
            path.unlink()
        with private_folder(folder) as scratch:
            fresh = scratch / "kernels.so"
            _compile_visibly(fresh, command)
            fresh.chmod(fresh.stat().st_mode & 0o755)  # others may not write it, whatever the umask lets them
            with fresh.open("rb") as file:
                name = f"{key}-{checksum(file)}.so"
            return fresh.rename(folder / name)


def _compile_visibly(target: Path, command: str) -> None:
    """Compile the kernels, and show how far that is."""
    least = max(1, round(CPU_SECONDS / min(cores(), 4)))
    with phase("compiling the CPU kernels, once on this machine"):
        told = f"compiling the CPU kernels, once on this machine ({least} s or more)"
        compile_to(target, command, progress=lambda done, parts: show(f"{told}: {done} of {parts} parts"))


def load() -> ctypes.CDLL:
    """Load the kernels. Raises CannotBuild, also if $UFBERT_ISA names an instruction set that this processor lacks."""
    path = library()
    try:
        kernels = ctypes.CDLL(str(path))
        kernels.ufbert_isa.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise CannotBuild(f"{path} cannot be loaded: {error}") from error
    if not kernels.ufbert_isa():
        raise CannotBuild(
            f"UFBERT_ISA is {os.environ['UFBERT_ISA']!r}, which this processor or this build does not support"
        )
    return kernels

"""Compile the C++ kernels on first use, with the system's compiler, into the user's cache."""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from ufbert.runtime.files import private_folder, user_cache

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-semantic-interposition", "-fno-math-errno")
AVX512 = ("-DUFBERT_LANES=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"plain": ("-DUFBERT_LANES=4",)}
"""The compiler's flags for each instruction set; which one runs is decided at run time. UFBERT_TREES names the set whose tree
kernels to reuse."""
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {
        "avx2": ("-DUFBERT_LANES=8", "-mavx2", "-mfma"),
        "avx512": AVX512,
        "avx512bf16": (*AVX512, "-mavx512bf16", "-mavx512vnni", "-DUFBERT_TREES=avx512"),
    }


class CannotBuild(Exception):
    """The reason why there are no native kernels, as a clause without a full stop."""


def compiler() -> str:
    """Return $CXX, or the first of c++, g++ and clang++ that is installed. Raises CannotBuild if there is none."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise CannotBuild("there is no C++ compiler (c++, g++ or clang++; $CXX names another)")


def library() -> Path:
    """Return the shared library of the kernels, compiled now unless the cache holds it undamaged. Raises CannotBuild.

    The library is code, so it is loaded only from a folder and a file that belong to this user or to root and that nobody
    else may write. If the folder `native` of the cache is another user's, this user gets one of their own next to it. The
    name of the file is a hash of all that decides its content, and ends in its checksum. Processes that need the kernels at
    the same time wait for the first to compile them.
    """
    if sys.platform == "win32":
        raise CannotBuild("they have not been tried on Windows")
    command = compiler()
    version = _output([command, "--version"])
    texts = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")) if path.suffix in (".cpp", ".h")]
    inputs = repr((texts, version, FLAGS, INSTRUCTION_SETS, jax.lib.__version__, platform.machine()))
    key = hashlib.sha256(inputs.encode()).hexdigest()[:20]
    reasons = []
    for folder in (user_cache() / "native", user_cache() / f"native-{os.getuid()}"):
        try:
            if _is_ours(folder):
                return _undamaged(folder, key) or _make(folder, key, command)
            reasons.append(f"{folder} is another user's, or others may write there ($UFBERT_CACHE names another cache)")
        except OSError as error:
            reasons.append(f"{folder} cannot be written ({error.strerror})")
    raise CannotBuild(reasons[0])


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
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if path.stem.endswith(f"-{digest[:32]}") else "is not as it was made"


def _make(folder: Path, key: str, command: str) -> Path:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path := _undamaged(folder, key):  # compiled by another process while this one waited for the lock
            return path
        print("compiling the native tree kernels, once (some seconds)", file=sys.stderr, flush=True)
        for path in folder.glob(f"{key}-*.so"):
            print(f"{path} {_flaw(path)}; deleting it and compiling the kernels again", file=sys.stderr, flush=True)
            path.unlink()
        with private_folder(folder) as scratch:
            fresh = scratch / "kernels.so"
            compile_to(fresh, command)
            fresh.chmod(0o755)
            digest = hashlib.sha256(fresh.read_bytes()).hexdigest()
            return fresh.rename(folder / f"{key}-{digest[:32]}.so")


def compile_to(target: Path, command: str, extra: tuple[str, ...] = (), xla: bool = True) -> None:
    """Compile the kernels for every instruction set, and their bindings, into a shared library. Raises CannotBuild."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        jobs = {
            f"{name}-{file}": ["-c", str(SOURCES / file), f"-DUFBERT_ISA={name}", *flags]
            for name, flags in INSTRUCTION_SETS.items()
            for file in ("trees.cpp", "encoder.cpp")
            if file == "encoder.cpp" or "UFBERT_TREES" not in " ".join(flags)
        }
        where = ["-isystem", jax.ffi.include_dir()] if xla else ["-DUFBERT_WITHOUT_XLA"]
        jobs["bindings"] = ["-c", str(SOURCES / "bindings.cpp"), *where]
        running = {
            name: subprocess.Popen(
                [command, *FLAGS, *extra, *job, "-o", f"{scratch}/{name}.o"], stderr=subprocess.PIPE, text=True
            )
            for name, job in jobs.items()
        }
        errors = {name: process.communicate()[1] for name, process in running.items()}
        for name, process in running.items():
            if process.returncode:
                raise CannotBuild(f"{command} does not compile {name}: {_first_error(errors[name])}")
        objects = [f"{scratch}/{name}.o" for name in jobs]
        _output([command, *extra, "-shared", "-pthread", *objects, "-o", str(target)])


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


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["it gave no reason"]
    return lines[0].strip()

"""The C++ kernels, compiled when they are first used by the compiler of the system, into the user's cache."""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from ufbert.places import user_cache

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-semantic-interposition", "-fno-math-errno")
AVX512 = ("-DUFBERT_LANES=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"plain": ("-DUFBERT_LANES=4",)}
"""Names, and the flags of the kernels compiled for each; which one runs is decided at run time. One may take another's
kernels of the trees (UFBERT_TREES)."""
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {
        "avx2": ("-DUFBERT_LANES=8", "-mavx2", "-mfma"),
        "avx512": AVX512,
        "avx512bf16": (*AVX512, "-mavx512bf16", "-mavx512vnni", "-DUFBERT_TREES=avx512"),
    }


class CannotBuild(Exception):
    """Why there are no native kernels, as a clause without a full stop."""


def compiler() -> str:
    """$CXX, or the first of c++, g++ and clang++. Raises CannotBuild if there is none."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise CannotBuild("there is no C++ compiler (c++, g++ or clang++; $CXX names another)")


def library() -> Path:
    """The compiled kernels, made now unless the cache has them.

    The name in the cache depends on the sources, the compiler, its flags, jax's headers and the kind of processor.
    Processes that need it at once wait for the first; none ever sees half a file. Raises CannotBuild.
    """
    if sys.platform == "win32":
        raise CannotBuild("they have not been tried on Windows")
    command = compiler()
    version = _said([command, "--version"])
    texts = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")) if path.suffix in (".cpp", ".h")]
    what = repr((texts, version, FLAGS, INSTRUCTION_SETS, jax.lib.__version__, platform.machine()))
    folder = user_cache() / "native"
    wanted = folder / f"{hashlib.sha256(what.encode()).hexdigest()[:20]}.so"
    if wanted.is_file():
        return wanted
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not wanted.is_file():
                print("compiling the native tree kernels, once (some seconds)", file=sys.stderr, flush=True)
                compile_to(wanted, command)
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be written ({error.strerror})") from error
    return wanted


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
        _said([command, *extra, "-shared", "-pthread", *objects, "-o", f"{scratch}/made.so"])
        os.replace(f"{scratch}/made.so", target)


def load() -> ctypes.CDLL:
    """The compiled kernels in this process. Raises CannotBuild, also if $UFBERT_ISA names what this processor lacks."""
    path = library()
    if not _is_whole(path):
        raise CannotBuild(f"{path} is cut short (delete it, and it will be made again)")
    try:
        found = ctypes.CDLL(str(path))
        found.ufbert_isa.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise CannotBuild(f"{path} cannot be loaded: {error}") from error
    if not found.ufbert_isa():
        raise CannotBuild(f"UFBERT_ISA is {os.environ['UFBERT_ISA']!r}, which this processor or this build has not got")
    return found


def _is_whole(path: Path) -> bool:
    """Whether an ELF library reaches to the end of its section table, its last part. Half of one kills who loads it."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return True  # not for us to say; the loader says what is wrong
    (table,), (size, count) = struct.unpack_from("=Q", header, 40), struct.unpack_from("=HH", header, 58)
    return path.stat().st_size >= table + size * count


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuild(f"{command[0]} failed: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["it gave no reason"]
    return lines[0].strip()

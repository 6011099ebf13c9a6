"""From the C++ of the kernels to a shared library.

A wheel is built by this file alone (`hatch_build.py`), so it uses nothing but Python's own library.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-semantic-interposition", "-fno-math-errno")
AVX512 = ("-DUFBERT_LANES=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"plain": ("-DUFBERT_LANES=4",)}
"""The compiler's flags for each instruction set, the smallest first. A library holds them all and takes the best one when it
runs, so that it serves every processor of its kind. UFBERT_TREES names the set whose tree kernels to reuse."""
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {
        "avx2": ("-DUFBERT_LANES=8", "-mavx2", "-mfma"),
        "avx512": AVX512,
        "avx512bf16": (*AVX512, "-mavx512bf16", "-mavx512vnni", "-DUFBERT_TREES=avx512"),
    }
STAND_ALONE = ("-static-libstdc++", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", "-s")
"""Flags for linking a library for other machines, which may have an older C++ library than this compiler's."""
CPU_SECONDS = 27
"""Time of one core of an AMD EPYC (Zen 5) for the whole library, by GCC 12."""


class CannotBuild(Exception):
    """The reason why there are no native kernels, as a clause without a full stop."""


def compiler() -> str:
    """Return $CXX, or the first of c++, g++ and clang++ that is installed. Raises CannotBuild if there is none."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise CannotBuild("there is no C++ compiler (c++, g++ or clang++; $CXX names another)")


def cores() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def headers() -> Path:
    """Return the folder of jaxlib's headers, by which XLA and the kernels call each other. Imports no jaxlib."""
    found = importlib.util.find_spec("jaxlib")
    places = found.submodule_search_locations if found else None
    if not places:
        raise CannotBuild("jaxlib, whose headers they need, is not installed")
    return Path(next(iter(places))) / "include"


def source_key() -> str:
    """Hash all that decides what the kernels do: their text, jaxlib's headers, the flags and the kind of machine.

    The compiler is not a part of it: a machine without one takes what another has made.
    """
    paths = [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    texts = [path.read_bytes() for path in (*paths, *sorted(headers().rglob("*.h")))]
    inputs = repr((texts, FLAGS, INSTRUCTION_SETS, platform.machine(), sys.platform))
    return hashlib.sha256(inputs.encode()).hexdigest()[:20]


def checksum(library: BufferedReader) -> str:
    """Hash the bytes of a library, for its name."""
    return hashlib.file_digest(library, "sha256").hexdigest()[:32]


def compile_to(
    target: Path,
    command: str,
    extra: tuple[str, ...] = (),
    xla: bool = True,
    progress: Callable[[int, int], None] = lambda done, parts: None,
) -> None:
    """Compile the kernels for every instruction set, and their bindings, into a shared library.

    `extra` flags go to each call of the compiler. `progress` gets the number of parts that are compiled, and of all parts.
    Raises CannotBuild.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        where = ["-isystem", str(headers())] if xla else ["-DUFBERT_WITHOUT_XLA"]
        # The linker keeps the first of several copies of a function of the C++ library. In this order that copy never has
        # instructions which a later part's processor may lack.
        jobs = {"bindings": ["-c", str(SOURCES / "bindings.cpp"), *where]} | {
            f"{name}-{file}": ["-c", str(SOURCES / file), f"-DUFBERT_ISA={name}", *flags]
            for name, flags in INSTRUCTION_SETS.items()
            for file in ("trees.cpp", "leaves.cpp", "encoder.cpp", "attention.cpp")
            if file in ("encoder.cpp", "attention.cpp") or "UFBERT_TREES" not in " ".join(flags)
        }

        def compile_part(name: str) -> str:
            path = f"{scratch}/{name}.o"
            run([command, *FLAGS, *extra, *jobs[name], "-o", path], f"{command} does not compile {name}")
            return path

        objects = []
        with ThreadPoolExecutor(min(cores(), len(jobs))) as pool:
            for path in pool.map(compile_part, jobs):
                objects.append(path)
                progress(len(objects), len(jobs))
        link = [command, *extra, "-shared", "-pthread", *objects, "-o", str(target)]
        run(link, f"{command} does not link them")


def run(command: list[str], failure: str) -> None:
    """Run a compiler. Raises CannotBuild with `failure` and the first line that names an error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise CannotBuild(f"{failure}: {lines[0].strip() if lines else 'it gave no reason'}")

"""Where the native kernels come from (a wheel, the cache, the compiler), and what may be wrong with each."""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from zipfile import ZipFile

import jax
import jax.numpy as jnp
import pytest
from hatchling.builders.wheel import WheelBuilder

from ufbert.ops import native
from ufbert.ops.native import build, compiler

try:
    COMPILER = build.compiler()
except build.CannotBuild as error:
    pytest.skip(f"{error}; trees are gathered then, which test_fff.py holds to a loop", allow_module_level=True)

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def made() -> Path:
    """The kernels, compiled and known to XLA before a test spoils the environment."""
    assert not native.unavailable(), native.unavailable()
    return build.library()


def reason() -> str:
    """Why this process, as its environment is now, has no kernels."""
    return native.unavailable.__wrapped__()


# ---- compilers ----


def test_an_unknown_instruction_set_is_a_reason(monkeypatch):
    monkeypatch.setenv("UFBERT_ISA", "avx1024")
    assert "'avx1024'" in reason()
    script = "from ufbert.ops import native; print(native.unavailable())"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("UFBERT_ISA is 'avx1024'"), done.stderr
    weights = jnp.ones((1, 3, 4)), jnp.ones((1, 3)), jnp.ones((1, 3, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="lacks the instruction set that UFBERT_ISA names"):
        jax.block_until_ready(native.tree_forward(jnp.ones((2, 4)), *weights))


def test_no_compiler_is_a_reason(monkeypatch, tmp_path):
    without_compiler(monkeypatch)
    monkeypatch.setenv("UFBERT_CACHE", str(tmp_path))
    assert "no C++ compiler" in reason()
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_is_a_reason(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho "error: no" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("UFBERT_CACHE", str(tmp_path / "cache"))
    assert reason().startswith(f"{broken} does not compile ")
    assert [p.name for p in (tmp_path / "cache" / "native").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UFBERT_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in reason()


@pytest.mark.long
def test_two_processes_build_one_library(tmp_path):
    logging, log = tmp_path / "logging", tmp_path / "log"
    logging.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {COMPILER} "$@" -O0\n')
    logging.chmod(0o755)
    cache = tmp_path / "cache"
    script = (
        "import jax.numpy as jnp; from ufbert.ops import native; one = jnp.ones((1, 1, 4)); "
        "print(native.tree_forward(one[0], one, one[0, :, :1], one, activation='relu')[0, 0])"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO), "CXX": str(logging), "UFBERT_CACHE": str(cache)}
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in "ab"]
    said = [process.communicate() for process in both]
    assert [out.split() for out, _ in said] == [["5.0"], ["5.0"]], said
    assert sorted(p.suffix for p in (cache / "native").iterdir()) == ["", ".so"]
    assert log.read_text().count("encoder.cpp -DUFBERT_ISA") == len(compiler.INSTRUCTION_SETS)


def test_parts_are_linked_from_the_smallest_instruction_set_up(tmp_path):
    # The linker keeps the first copy of what several parts have: it must run where the later ones do not.
    (tmp_path / "log").write_text("")
    (tmp_path / "compiler").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\n')
    (tmp_path / "compiler").chmod(0o755)
    build.compile_to(tmp_path / "kernels.so", str(tmp_path / "compiler"))
    *_, link = (tmp_path / "log").read_text().splitlines()
    parts = [Path(word).stem.split("-")[0] for word in link.split() if word.endswith(".o")]
    assert list(dict.fromkeys(parts)) == ["bindings", *compiler.INSTRUCTION_SETS]


# ---- the cache ----


def without_compiler(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "nonexistent")


class Copier:
    """A compiler that makes every library a copy of the one there is, and counts them."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.cache, self.log, self.path = folder / "cache", folder / "log", folder / "copier"
        self.log.write_text("")
        self.path.write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo copier 1.0 && exit\n'
            'for word; do [ "$last" = -o ] && out=$word; [ "$word" = -shared ] && shared=1; last=$word; done\n'
            f'if [ -n "$shared" ]; then cp {library} "$out"; echo >> {self.log}; else : > "$out"; fi\n'
        )
        self.path.chmod(0o755)

    def count(self) -> int:
        return len(self.log.read_text())


@pytest.fixture
def copier(monkeypatch, tmp_path, made) -> Copier:
    """In use for the test, with an empty cache of its own."""
    copier = Copier(tmp_path, made)
    monkeypatch.setenv("CXX", str(copier.path))
    monkeypatch.setenv("UFBERT_CACHE", str(copier.cache))
    return copier


def flip(path: Path) -> None:
    """Change one byte in the middle, where code is."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def link_elsewhere(path: Path) -> None:
    """Put a symbolic link to a whole library in a library's place."""
    path.rename(path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


SPOILT = {
    "a flipped byte": (flip, "is not as it was made"),
    "half of it": (lambda path: os.truncate(path, path.stat().st_size // 2), "is not as it was made"),
    "nothing": (lambda path: os.truncate(path, 0), "is not as it was made"),
    "another library": (lambda path: shutil.copy(sys.modules["_ctypes"].__file__, path), "is not as it was made"),
    "open to the group": (lambda path: path.chmod(0o775), "may be written by other users"),
    "open to all": (lambda path: path.chmod(0o757), "may be written by other users"),
    "a link": (link_elsewhere, "cannot be opened as a file"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_kernels_that_are_not_as_they_were_made_are_compiled_again(what, copier, made, capfd):
    spoil, sentence = SPOILT[what]
    path = build.library()
    assert build.library() == path
    assert copier.count() == 1
    spoil(path)
    capfd.readouterr()
    assert build.library() == path
    assert f"{path} {sentence}" in capfd.readouterr().err
    assert not path.is_symlink()
    assert path.read_bytes() == made.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o755
    assert build.load().ufbert_isa()
    assert copier.count() == 2


def test_kernels_that_four_threads_find_spoilt_are_compiled_once(copier):
    flip(build.library())
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.library(), range(4)))
    assert len(paths) == 1
    assert copier.count() == 2


@pytest.mark.parametrize(("mask", "mode"), [(0o000, 0o755), (0o022, 0o755), (0o027, 0o750)])
def test_kernels_have_the_mode_of_the_mask_but_are_written_by_nobody_else(mask, mode, copier):
    before = os.umask(mask)
    try:
        path = build.library()
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [mode, mode]
    path.parent.chmod(0o777)
    assert build.library() == path
    assert path.parent.stat().st_mode & 0o777 == 0o755
    assert copier.count() == 1


def test_a_link_to_a_folder_of_one_s_own_is_followed(copier, tmp_path):
    copier.cache.mkdir()
    (tmp_path / "large").mkdir()
    (copier.cache / "native").symlink_to(tmp_path / "large")
    assert build.library().resolve().parent == (tmp_path / "large").resolve()
    assert build.library().parent == copier.cache / "native"
    assert copier.count() == 1


def foreign(status: os.stat_result) -> os.stat_result:
    """The same, of a user who is neither this one nor root."""
    return os.stat_result((*status[:4], os.getuid() + 12345, *status[5:]))


def test_another_user_s_kernels_are_compiled_again(copier, monkeypatch, capfd):
    path, fstat = build.library(), os.fstat
    monkeypatch.setattr(build.os, "fstat", lambda descriptor: foreign(fstat(descriptor)))
    build.library()
    assert f"{path} belongs to another user" in capfd.readouterr().err
    assert copier.count() == 2


def test_a_folder_of_another_user_is_left_for_one_beside_it(copier, monkeypatch):
    before, stat = build.library(), Path.stat
    theirs = [before.parent]

    def stat_with_others(path, **options):
        return foreign(stat(path, **options)) if path in theirs else stat(path, **options)

    monkeypatch.setattr(Path, "stat", stat_with_others)
    path = build.library()
    assert path == copier.cache / f"native-{os.getuid()}" / before.name
    assert before.is_file()
    theirs.append(path.parent)
    assert reason().startswith(f"{before.parent} is another user's, or others may write there")


def test_kernels_in_the_cache_need_no_compiler(copier, monkeypatch, capfd):
    path = build.library()
    without_compiler(monkeypatch)
    capfd.readouterr()
    assert build.library() == path
    assert build.load().ufbert_isa()
    assert capfd.readouterr().err == ""


def test_spoilt_kernels_without_a_compiler_are_a_reason(copier, monkeypatch):
    path = build.library()
    flip(path)
    without_compiler(monkeypatch)
    assert reason().startswith(f"{path} is not as it was made, and there is no C++ compiler (")
    assert path.exists()


def test_kernels_of_another_source_or_c_library_are_not_taken(copier, monkeypatch):
    paths = [build.library()]
    monkeypatch.setattr(build.os, "confstr", lambda name: "glibc 2.99")
    paths.append(build.library())
    monkeypatch.setattr(compiler, "FLAGS", ("-O1",))
    paths.append(build.library())
    assert len(set(paths)) == copier.count() == 3


def test_compiling_says_how_far_it_is_in_a_line_of_a_terminal(copier, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(build, "show", lines.append)
    build.library()
    parts = 1 + sum(2 if "-DUFBERT_TREES=avx512" in flags else 4 for flags in compiler.INSTRUCTION_SETS.values())
    begin = r"compiling the CPU kernels, once on this machine \(\d+ s or more\)"
    assert [re.sub(begin, "", line) for line in lines] == [f": {n} of {parts} parts" for n in range(1, parts + 1)]
    assert max(map(len, lines)) < 80


def test_a_process_that_waits_for_another_says_so(copier, monkeypatch):
    path, waits = build.library(), Event()
    flip(path)

    @contextmanager
    def phase(name: str):
        if name == "waiting for another process that compiles the CPU kernels":
            waits.set()
        yield

    monkeypatch.setattr(build, "phase", phase)
    with (path.parent / ".lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = pool.submit(build.library)
        while not waits.wait(0.01) and not waiting.done():
            pass
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result() == path
    assert waits.is_set()


# ---- a wheel ----


def wheel(folder: Path) -> Path:
    """A wheel of this checkout, built by its own hook with the compiler that the environment names."""
    return Path(next(WheelBuilder(str(REPO)).build(directory=str(folder), versions=["standard"])))


def shipped(path: Path, folder: Path) -> list[Path]:
    """The compiled kernels in a wheel, unpacked."""
    with ZipFile(path) as archive:
        archive.extractall(folder)
    return list(folder.rglob("*.so"))


SHIPS = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="wheels carry kernels for Linux on x86-64 only"
)


@SHIPS
def test_a_wheel_brings_kernels_that_need_no_compiler(copier, made, monkeypatch, tmp_path):
    path = wheel(tmp_path / "dist")
    assert re.search(r"-py3-none-manylinux_2_\d+_x86_64\.whl$", path.name)
    [library] = shipped(path, tmp_path / "site")
    assert library.read_bytes() == made.read_bytes()
    monkeypatch.setattr(build, "SHIPPED", library.parent)
    without_compiler(monkeypatch)
    assert build.library() == library
    assert build.load().ufbert_isa()
    assert not copier.cache.exists()


@SHIPS
def test_a_wheel_s_kernels_that_are_spoilt_or_of_another_source_are_left(copier, monkeypatch, tmp_path, capfd):
    [library] = shipped(wheel(tmp_path / "dist"), tmp_path / "site")
    monkeypatch.setattr(build, "SHIPPED", library.parent)
    library.rename(library.with_name(library.name.replace(build.source_key(), "0" * 20)))
    assert build.library().parent == copier.cache / "native"
    broken = library.with_name(f"kernels-{build.source_key()}-0.so")
    broken.write_text("no library")
    assert build.library().parent == copier.cache / "native"
    assert f"{broken} is not used: it is not as it was made\n" in capfd.readouterr().err


@pytest.mark.parametrize("without", ["a compiler", "one that works", "wanting them"])
def test_a_wheel_without_compiled_kernels_is_for_every_platform(without, copier, monkeypatch, tmp_path):
    if without == "a compiler":
        without_compiler(monkeypatch)
    elif without == "one that works":
        copier.path.write_text("#!/bin/sh\nexit 1\n")
    else:
        monkeypatch.setenv("UFBERT_WHEEL_KERNELS", "0")
    path = wheel(tmp_path / "dist")
    assert path.name.endswith("-py3-none-any.whl")
    assert shipped(path, tmp_path / "site") == []
    assert sum(file.suffix == ".cpp" for file in (tmp_path / "site").rglob("*")) == 5


def test_an_editable_install_compiles_nothing(copier, tmp_path):
    data = {}
    WheelBuilder(str(REPO)).get_build_hooks(str(tmp_path))["custom"].initialize("editable", data)
    assert data == {}
    assert copier.count() == 0

"""Compiling the native kernels, and what may be wrong with the compiler, the environment, and those in the cache."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ufbert.ops import native
from ufbert.ops.native import build

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
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "nonexistent")
    monkeypatch.setenv("UFBERT_CACHE", str(tmp_path))
    assert "no C++ compiler" in reason()
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_is_a_reason(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho "error: no" >&2; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("UFBERT_CACHE", str(tmp_path / "cache"))
    assert reason().startswith(f"{compiler} does not compile ")
    assert [p.name for p in (tmp_path / "cache" / "native").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UFBERT_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in reason()


def test_two_processes_build_one_library(tmp_path):
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {COMPILER} "$@" -O0\n')
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    script = (
        "import jax.numpy as jnp; from ufbert.ops import native; one = jnp.ones((1, 1, 4)); "
        "print(native.tree_forward(one[0], one, one[0, :, :1], one, activation='relu')[0, 0])"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO), "CXX": str(compiler), "UFBERT_CACHE": str(cache)}
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in "ab"]
    said = [process.communicate() for process in both]
    assert [out.split() for out, _ in said] == [["5.0"], ["5.0"]], said
    assert sorted(p.suffix for p in (cache / "native").iterdir()) == ["", ".so"]
    assert log.read_text().count("encoder.cpp -DUFBERT_ISA") == len(build.INSTRUCTION_SETS)


# ---- the cache ----


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


def test_a_folder_made_under_a_loose_mask_is_closed_to_others(copier):
    before = os.umask(0o000)
    try:
        path = build.library()
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [0o755, 0o755]
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

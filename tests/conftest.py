"""Run-time shape checks on every function of the package, strict JAX, and small shared fixtures."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "1")  # one XLA thread per pytest worker
if "UFBERT_CACHE" not in os.environ:  # shared by the workers, which inherit it
    os.environ["UFBERT_CACHE"] = tempfile.mkdtemp(prefix="ufbert-tests-")
    atexit.register(shutil.rmtree, os.environ["UFBERT_CACHE"], ignore_errors=True)

from jaxtyping import install_import_hook

install_import_hook("ufbert", "beartype.beartype")

import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

REPO = Path(__file__).parents[1]
SMALL = [
    "--config=tiny", "--scale=base", "--model.vocab-size=300", "--model.d-model=32", "--model.n-heads=2",
    "--model.tree-depth=3", "--model.pooler-width=16", "--model.max-len=64", "--data.seq-len=32", "--data.eval-rows=16",
    "--train.batch-rows=8", "--train.micro-rows=8", "--device=cpu",
]  # fmt: skip
"""Options of a pretraining run that takes seconds."""


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    """Text with structure: 400 short documents of a toy grammar."""
    rng = random.Random(0)
    nouns, verbs = ["cat", "dog", "king", "river", "house", "bird"], ["sees", "likes", "follows", "finds"]
    places = ["london", "paris", "rome", "the garden", "the old castle"]
    documents = []
    for _ in range(400):
        noun = rng.choice(nouns)
        lines = [f"The {noun} {rng.choice(verbs)} the {rng.choice(nouns)} in {rng.choice(places)}." for _ in range(6)]
        documents.append("\n".join(lines))
    path = tmp_path_factory.mktemp("corpus") / "toy.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture
def command():
    """Run `python -m ufbert ARGS` in a fresh process."""

    def call(*args: str, script: str = "", **kwargs) -> subprocess.CompletedProcess[str]:
        start = [str(REPO / script)] if script else ["-m", "ufbert"]
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        return subprocess.run(
            [sys.executable, *start, *map(str, args)], capture_output=True, text=True, env=environment, **kwargs
        )

    return call


@pytest.fixture(scope="session")
def run_folder(corpus_file, tmp_path_factory) -> Path:
    """A finished small pretraining run."""
    from ufbert.pretrain.run import pretrain_command

    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain_command(["--budget=80steps", f"--corpus=text:{corpus_file}", f"--out={folder}", *SMALL], 0.0)
    return folder


def gradients_close(found, wanted, zero: float = 0.0) -> None:
    """Flat gradients, each within 1e-4 of its own largest absolute value.

    A key bias has none but for rounding, since softmax does not see what all keys have in common: both sides must stay
    below `zero` there.
    """
    assert found.keys() == wanted.keys()
    for path, gradient in wanted.items():
        scale = np.abs(gradient).max()
        if path.endswith("key.bias"):
            assert max(scale, np.abs(found[path]).max()) < zero
        else:
            np.testing.assert_allclose(found[path], gradient, atol=1e-4 * scale, rtol=0, err_msg=path)

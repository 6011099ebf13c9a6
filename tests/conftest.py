"""Run-time shape checks on every function of the package, strict JAX, and small shared fixtures."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if (
    os.environ["JAX_PLATFORMS"] != "cpu"
):  # else an accelerator rounds what it multiplies, and float32 agrees to three digits
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("UFBERT_NO_NET", "1")  # an error that nobody foresaw shows its traceback
os.environ.setdefault("NPROC", "1")  # one XLA thread per pytest worker
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of what the tests do
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # where each operation comes from, which nobody reads
if not os.environ.get("UFBERT_CACHE"):  # shared by the workers, which inherit it
    os.environ["UFBERT_CACHE"] = tempfile.mkdtemp(prefix="ufbert-tests-")
    atexit.register(shutil.rmtree, os.environ["UFBERT_CACHE"], ignore_errors=True)
os.environ["TRACKIO_DIR"] = os.path.join(os.environ["UFBERT_CACHE"], "trackio")
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # the many processes of the tests compile their modules once
    os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(os.environ["UFBERT_CACHE"], "bytecode")

from jaxtyping import install_import_hook

install_import_hook("ufbert", "beartype.beartype")

import dataclasses
import functools
import gc
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

gc.freeze()
gc.set_threshold(100_000, 20, 50)  # what jax has traced stays, and looking through it takes a twentieth of the time
jax.config.update("jax_numpy_rank_promotion", "raise")
# Much of what the tests compile is the same.
jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["UFBERT_CACHE"], "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

REPO = Path(__file__).parents[1]
SMALL = [
    "--config=tiny", "--scale=base", "--model.vocab-size=300", "--model.d-model=32", "--model.n-layers=1",
    "--model.n-heads=2", "--model.tree-depth=3", "--model.pooler-width=16", "--model.max-len=64", "--data.seq-len=32",
    "--data.eval-rows=16", "--train.batch-rows=8", "--train.micro-rows=8", "--train.n-evals=5", "--train.n-checkpoints=2",
    "--device=cpu",
]  # fmt: skip
"""Options of a pretraining run that takes seconds."""
RUN = ["--budget=80steps", *SMALL, "--model.n-layers=2"]
"""Those of the run that `run_folder` holds, which must learn something."""


class Notebooks:
    """They compute more than they compile, so that the optimizations which the other tests leave out pay."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        with pytest.MonkeyPatch.context() as patch:
            if item.path.suffix == ".ipynb":
                patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
            return (yield)


def pytest_configure(config):
    config.pluginmanager.register(Notebooks())


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
            [sys.executable, *start, *(a if isinstance(a, bytes) else str(a) for a in args)],
            capture_output=True,
            text=True,
            env=environment,
            **kwargs,
        )

    return call


@pytest.fixture(scope="session")
def finished_run(corpus_file, tmp_path_factory) -> tuple[Path, str]:
    """A finished small pretraining run, and what it has written to a terminal."""
    from terminal import terminal

    from ufbert.cli import call

    folder = tmp_path_factory.mktemp("run") / "run"
    with terminal() as written:
        call("train", [*RUN, f"--corpus=text:{corpus_file}", f"--out={folder}"])
        return folder, written()


@pytest.fixture(scope="session")
def run_folder(finished_run) -> Path:
    """A finished small pretraining run."""
    return finished_run[0]


FAMILIES = {
    "crammed": {},
    "bert": {
        "feedforward": ("dense",), "norm": "post", "positions": "learned", "n_token_types": 2, "use_bias": True,
        "final_norm": False, "head_transform": True, "head_bias": True,
    },
    "tree": {"feedforward": ("tree",)},
    "trees": {"feedforward": ("tree",), "n_trees": 3, "tree_depth": 2, "tree_activation": "symmetric_gelu"},
    "leaf tree": {
        "feedforward": ("leaf_tree",), "tree_depth": 2, "leaf_width": 4, "master_leaf": 3, "activation": "relu",
    },
    "routed trees": {
        "feedforward": ("routed_tree",), "n_trees": 2, "tree_depth": 2, "leaf_width": 4, "master_leaf": 3,
        "leaf_ancestors": "levels", "leaf_bias": True,
    },
    "hashed leaves": {"feedforward": ("routed_tree",), "tree_depth": 3, "leaf_width": 4, "tree_router": "token"},
    "switch": {"feedforward": ("switch",), "n_experts": 3, "activation": "gelu_tanh"},
    "rotary": {"positions": "rotary", "qk_norm": True, "first_norm": False, "norm_bias": False},
    "fourier": {"mixer": ("fourier",), "norm": "post", "fixed_len": 40, "feedforward": ("tree",)},
    "ngrams": {"ngram_rows": 61},
    "narrow ngrams": {"ngram_rows": 61, "ngram_keys": ("trigram", "after"), "ngram_width": 8, "ngram_layer": 1},
    "hybrid": {"mixer": ("fourier", "attention"), "fixed_len": 40, "embedding_projection": True},
    "skips": {"n_layers": 3, "unet_skips": True, "value_embeddings": 2, "tie_head": False},
}  # fmt: skip
"""Fields of small models that have every kind of part between them."""


def small_model(tokenizer, name: str, *heads: str, **changes):
    """Return a model folder of a family, with its heads and changed fields, that reads 48 word pieces of a tokenizer; its
    weights are random."""
    from ufbert import nn
    from ufbert.config import ModelConfig
    from ufbert.hub.folder import ModelFolder, TaskInfo
    from ufbert.nn.ngrams import split_tables

    base = ModelConfig(
        max_len=48, d_model=32, n_layers=2, n_heads=2, d_hidden=24, pooler_width=16, init_std=0.2, tree_depth=5,
        vocab_size=tokenizer.get_vocab_size(),
    )  # fmt: skip
    config = dataclasses.replace(base, **{**FAMILIES[name], **changes})
    params = nn.init(config, jax.random.key(0), ("masked_lm",) if "masked_lm" in heads else ())
    for i, table in enumerate(split_tables(params)[1]):  # they start at zero
        shape = params["encoder"]["ngrams"][table].shape
        params["encoder"]["ngrams"][table] = 0.2 * jax.random.normal(jax.random.key(2 + i), shape)
    for i in range(config.n_layers if config.leaf_bias else 0):  # those start at zero, too
        layer, key = params["encoder"][f"layer_{i:02d}"]["routed_tree"], jax.random.key(10 + i)
        layer["shared_in"]["bias"] = jax.random.normal(key, layer["shared_in"]["bias"].shape)
        layer |= {part: jax.random.normal(key, layer[part].shape) for part in ("leaf_in_bias", "leaf_out_bias")}
    if "decoder" in params.get("masked_lm", {}):  # it starts at zero
        params["masked_lm"]["decoder"] = params["encoder"]["embeddings"]["tokens"][::-1]
    task = TaskInfo("toy", ("no", "yes"), {}) if "classifier" in heads else None
    if task:
        params["classifier"] = nn.init_classifier(config, jax.random.key(1), 2)
    return ModelFolder(config, params, tokenizer, task)


@pytest.fixture(scope="session")
def family(run_folder):
    """(name of a family, its heads, changed fields) -> a small model of random weights that reads 48 word pieces."""
    from ufbert.hub.folder import load_model

    tokenizer = load_model(run_folder / "model").tokenizer
    return functools.partial(small_model, tokenizer)


@pytest.fixture(scope="session")
def numbered():
    """(name of a family, its heads, changed fields) -> the same, whose words are word0, word1, ...; no run is needed for it."""
    from tokenizers import pre_tokenizers

    from ufbert.bench.encoder_job import numbered_words

    tokenizer = numbered_words(60)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return functools.partial(small_model, tokenizer)


@pytest.fixture(scope="session")
def toy_task(tmp_path_factory) -> list[str]:
    """Options of a task on such words that word7 decides."""
    folder, rng = tmp_path_factory.mktemp("toy"), random.Random(0)

    def row() -> str:
        words = [f"word{rng.randint(10, 30)}" for _ in range(rng.randint(2, 9))]
        has_it = rng.random() < 0.5
        return f"{' '.join([*words, 'word7'] if has_it else words)}\t{'yes' if has_it else 'no'}\n"

    for split, n in (("train", 96), ("dev", 64)):
        (folder / f"{split}.tsv").write_text("text\tlabel\n" + "".join(row() for _ in range(n)))
    return [f"--train={folder / 'train.tsv'}", f"--dev={folder / 'dev.tsv'}", "--text=text", "--label=label"]


@pytest.fixture(scope="session")
def tuned_folder(numbered, tmp_path_factory) -> Path:
    """A model folder with a classifier of random weights, for the labels of that task."""
    from ufbert.hub.folder import save_model

    folder = tmp_path_factory.mktemp("tuned") / "model"
    save_model(folder, numbered("bert", "classifier"))
    return folder


COMPRESS = [
    "--device=cpu",
    "--types",
    "float32",
    "--blocks=2",
    "--shape=1x16",
    "--batch-rows=8",
    "--lr=1e-3",
    "--max-len=32",
]
"""Options of a compression that takes seconds."""


def gradients_close(found, wanted, zero: float = 0.0) -> None:
    """Flat gradients, each within 1e-4 of its own largest absolute value.

    A key bias has none but for rounding, since softmax does not see what all keys have in common: both sides must stay
    below `zero` there. The gradient of a scalar is one sum over all that it multiplies, whose terms cancel, so that it is known
    to a millionth of the largest gradient only: the order of the sum is the processor's.
    """
    assert found.keys() == wanted.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for path, gradient in wanted.items():
        scale = np.abs(gradient).max()
        if np.size(gradient) == 1:
            scale = max(scale, 1e-2 * largest)
        if path.endswith("key.bias"):
            assert max(scale, np.abs(found[path]).max()) < zero
        else:
            np.testing.assert_allclose(found[path], gradient, atol=1e-4 * scale, rtol=0, err_msg=path)


def write_sweep(folder: Path, tasks=("rte", "stsb"), seeds=(0, 1, 2), skill=0.7, predictions=True, **changes) -> Path:
    """What a sweep leaves in a folder: 277 rows of each task, of which a model of that skill gets about that share right.

    Rows and labels depend on the task alone, predictions on the skill and the seed, too. `changes` replace parts of
    `glue.json`.
    """
    from ufbert.glue.metrics import score
    from ufbert.glue.predictions import write_predictions
    from ufbert.glue.results import GlueResults, ProtocolResult, TaskResult
    from ufbert.glue.scores import averages, decide, dev_result
    from ufbert.glue.tasks import TASKS, Examples, cut_of
    from ufbert.runtime.files import write_json

    results = {}
    for name in tasks:
        task = cut_of(name) or TASKS[name]
        rng = np.random.default_rng(277)
        labels = rng.integers(task.n_outputs if not task.is_regression else 6, size=277).astype(float)
        rows = Examples([f'a "text" {i}' for i in range(277)], [f"pair\t{i}" for i in range(277)], labels.tolist())
        scores, metrics = {}, {}
        for seed in seeds:
            draw = np.random.default_rng([seed, round(1000 * skill)])
            if task.is_regression:
                scores[seed] = (labels + draw.normal(size=277) / skill)[:, None]
            else:
                right = np.where(draw.random(277) < skill, labels, (labels + 1) % task.n_outputs).astype(int)
                scores[seed] = 2.0 * np.eye(task.n_outputs)[right]
            metrics[seed] = score(task.metrics, decide(task, scores[seed]), labels)
        results[task.name] = TaskResult(
            folder=task.folder, cut_of=task.cut_of, metrics=task.metrics, label_names=task.label_names, train_rows=277,
            skipped_rows=0, truncated_rows=5, starts_from="model", lr=4e-5, seconds=12.3, saved_seed=seeds[0],
            dev={split: dev_result(task, split, rows, rows, metrics, scores) for split in task.dev},
            curves={
                seed: [{"epoch": i, "loss": 0.7 / i, task.metrics[0]: 0.5 + i / 20} for i in range(1, 6)]
                for seed in seeds
            },
        )  # fmt: skip
        for split in task.dev if predictions else ():
            write_predictions(folder, task, split, rows, scores)
    found = GlueResults(
        model=f"runs/{folder.name}/model", source="dir:glue",
        protocol=ProtocolResult("crammed", "5 epochs, batch 16", "fine-tuned"),
        options={"seeds": "0,1,2", "tune": {"epochs": 5}}, environment={"jax": "0.12", "device": "cpu <1>"},
        tasks=results, averages=averages(results),
    )  # fmt: skip
    write_json(folder / "glue.json", {**found.to_json(), **changes})
    return folder


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512bf16"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each instruction set that this processor has; native kernels use it during the test."""
    from ufbert.ops import native

    assert not native.unavailable(), native.unavailable()  # in the environment as it was, and known to XLA from here on
    monkeypatch.setenv("UFBERT_ISA", request.param)
    if not native.instruction_set():
        pytest.skip(
            f"this processor lacks {request.param}; the same text, compiled for those it has, fails in its stead"
        )
    return request.param

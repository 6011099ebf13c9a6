"""How many times as fast do we pretrain on this CPU as PyTorch trains the same model?

Every process starts from the same parameters and gets the same masked rows. The losses of the first steps must agree
with ours to 1e-4, or nothing is timed: equal losses after several steps mean equal gradients and an equal optimizer.
Then blocks of steps alternate. How to read the answer: "ufbert trains 1.69 times as fast as torch" is the median of the
ratios of neighbouring blocks. `--beside` adds variants of ours, whose ratio says what a way to compute trees is worth.
"another model" marks the variant whose losses cannot agree.

`python -m ufbert.bench.train FOLDER NAME THREADS` is a process of ours, which trains on request.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ufbert import nn
from ufbert.bench.harness import Entry, alternate, machine_facts, our_program, paired_ratio, start_processes
from ufbert.bench.report import check_folders, machine_lines
from ufbert.bench.worker import Answers, serve, step_answers
from ufbert.config import RunConfig
from ufbert.data.tokenizer import SpecialIds
from ufbert.errors import UserError
from ufbert.hub.folder import flatten, unflatten
from ufbert.options.bench import BenchTrainOptions, Variant
from ufbert.options.given import Given
from ufbert.options.train import with_run
from ufbert.pretrain.budget import Budget
from ufbert.pretrain.resolve import local_platform, resolve
from ufbert.pretrain.step import StepInputs, build_steps, mask_rows, state_of
from ufbert.runtime.console import phase
from ufbert.runtime.device import usable_threads, use_device
from ufbert.runtime.files import write_json
from ufbert.runtime.typed import convert

PEER_SCRIPT = Path(__file__).parent / "train_torch_peer.py"
SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
"""Ids of the special tokens in the benchmark's rows."""
TOLERANCE = 1e-4
"""Largest relative difference of a peer's losses from ours with which it is timed."""
LR_SHARE = 0.25
"""Constant learning rate of every process over the recipe's peak: where crammed BERT's schedule begins."""
DOCUMENT_LEN = 32
"""Mean length of the random documents, in tokens."""
PEER_MODEL: dict[str, Any] = {
    "mixer": ("attention",), "feedforward": ("glu",), "activation": "gelu", "norm": "pre", "first_norm": True,
    "norm_bias": True, "positions": "scaled_sinusoid", "qk_norm": False, "n_token_types": 0, "ngram_rows": 0, "use_bias": False,
    "embedding_norm": True, "embedding_projection": False, "final_norm": True, "head_transform": False, "head_bias": False,
    "tie_head": True, "unet_skips": False, "value_embeddings": 0,
}  # fmt: skip
"""The model that the PyTorch peer knows besides its feedforwards `dense` and `tree`; sizes are free."""


def run_train(options: BenchTrainOptions, given: Given) -> None:
    """Print speeds and ratios, and write them as JSON if asked. Raises UserError if a peer fails or trains another model."""
    platform = local_platform(use_device("cpu"))
    options = with_run(options, resolve(options, given, Budget(steps=1), platform).run)
    check_options(options)
    check_folders(options.json)
    report = measure(options)
    print(text(report))
    if options.json:
        write_json(Path(options.json), report)


def check_options(options: BenchTrainOptions) -> None:
    """Raise UserError if there is nothing to compare with, or if the peer cannot train the model."""
    if not options.peer_python and not options.beside:
        raise UserError("Name an interpreter that has torch, with --peer-python PATH, or a way of ours, with --beside.")
    if options.peer_python:
        check_peer_is_equal(options)
    trees = sorted({"masked", "gather", "native"} & set(options.beside))
    if trees and "tree" not in options.model.feedforward:
        raise UserError(f"--beside {trees[0]} is another way to compute trees, and {options.config} has none.")


def check_peer_is_equal(options: BenchTrainOptions) -> None:
    """Raise UserError unless this is a crammed BERT or an UltraFastBERT with AdamW, which is all that the peer knows."""
    kind = options.model.feedforward[0]
    tree = {"tree_activation": "gelu", "tree_balance": 0.0}
    model = PEER_MODEL | ({"feedforward": (kind,), **tree} if kind in ("dense", "tree") else {})
    recipe = {
        "optimizer": "adamw",
        "average_width": 0.0,
        "cautious_decay": False,
        "mask_rate": options.train.mask_rate[:1],
    }
    parts: dict[str, dict[str, Any]] = {"model": model, "train": recipe}
    for part, wanted in parts.items():
        for name, value in wanted.items():
            actual = getattr(getattr(options, part), name)
            kinds = name in ("mixer", "feedforward")  # one entry a layer, in whatever order
            if (set(actual) != set(value)) if kinds else actual != value:
                raise UserError(
                    f"The peer is a crammed BERT or UltraFastBERT trained with AdamW: it has {part}.{name} {value!r}, not "
                    f"{actual!r}."
                )


def variant_of(run: RunConfig, variant: Variant) -> RunConfig:
    """Return `run` with its trees computed in that way, or with dense layers for its feedforward."""
    if variant == "dense":
        return replace(run, model=replace(run.model, feedforward=("dense",), d_hidden=4 * run.model.d_model))
    return replace(run, model=replace(run.model, tree_backend=variant))


def measure(options: BenchTrainOptions) -> dict[str, Any]:
    """Train here and in each peer, in turns; return the report.

    Raises UserError, before any timing, if a peer fails or trains another model. `--beside dense` alone is not checked.
    """
    machine, threads = machine_facts(), usable_threads(0)
    run = RunConfig(replace(options.model, dtype="float32"), options.train, options.data)
    runs = {f"our {variant}": variant_of(run, variant) for variant in options.beside}
    peers = ["torch", "torch-compile"] if options.peer == "both" else [options.peer]
    script = options.peer_script or str(PEER_SCRIPT)
    programs: dict[str, Sequence[str]] = {"ufbert": our_program("train")}
    if options.peer_python:
        programs |= dict.fromkeys(peers, (options.peer_python, script))
    programs |= dict.fromkeys(runs, our_program("train"))
    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as name, ExitStack() as running:
        folder = Path(name)
        write_job(folder, run, options)
        for name, variant in runs.items():
            (folder / name).mkdir()
            write_job(folder / name, variant, options)
        processes, missing = start_processes(programs, folder, threads, running)
        if missing:
            raise UserError(f"{next(iter(missing.values()))}.")
        entries, losses = [Entry(process, name) for name, process in processes.items()], {}
        for process, name in entries:
            with phase(f"checking the first losses of {name}"):
                first = process.ask("time", "losses", name=name, work="step", first=0, calls=options.checked)
            losses[name] = first["losses"]
        same = {name for name in programs if name not in runs or runs[name].model.feedforward == run.model.feedforward}
        differences = {
            name: check_losses(name, losses[name], losses["ufbert"]) if name in same else None
            for name in programs if name != "ufbert"
        }  # fmt: skip
        calls = {name: {"step": options.updates} for name in processes}
        with phase(f"timing {options.blocks} blocks of {options.updates} updates"):
            times = alternate(entries, calls, options.blocks, start=options.checked)
    seconds = {name: [options.updates * call for call in works["step"]] for name, works in times.items()}
    tokens = options.updates * options.rows * run.data.seq_len
    job = {name: getattr(options, name) for name in ("rows", "checked", "updates", "blocks", "seed")}
    return {
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "job": job | {"run": asdict(run)},
        "contestants": [
            {
                "name": name, "facts": process.facts, "block_seconds": seconds[name], "first_losses": losses[name],
                "tokens_per_second": tokens / statistics.median(seconds[name]),
            }
            for name, process in processes.items()
        ],
        "ratios": {
            name: paired_ratio(seconds["ufbert"], seconds[name])._asdict() | {"loss_difference": difference}
            for name, difference in differences.items()
        },
    }  # fmt: skip


def check_losses(name: str, theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the largest relative difference. Raises UserError if one is above TOLERANCE or not a number."""
    if len(theirs) != len(ours):
        raise UserError(f"{name} answered {len(theirs)} losses for {len(ours)} steps. Nothing was timed.")
    differences = [abs(their - our) / abs(our) for their, our in zip(theirs, ours, strict=True)]
    for i, difference in enumerate(differences):
        if not difference <= TOLERANCE:
            losses = f"its loss after {i} steps is {theirs[i]:.6f}, ours {ours[i]:.6f}"
            raise UserError(f"{name} does not train the same model: {losses}. Nothing was timed.")
    return max(differences)


def random_rows(run: RunConfig, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw packed rows of random documents: each begins with [CLS] and ends at random; token frequencies fall as 1 / rank."""
    ordinary = np.arange(max(SPECIAL) + 1, run.model.vocab_size)
    weight = 1.0 / np.arange(1, len(ordinary) + 1)
    rows = rng.choice(ordinary, size=shape, p=weight / weight.sum()).astype(np.int32)
    rows[rng.random(shape) < 1.0 / DOCUMENT_LEN] = SPECIAL.cls
    rows[..., 0] = SPECIAL.cls
    return rows


def masking_key(seed: int, i: int) -> jax.Array:
    """Return the key of batch i's masking."""
    return jax.random.fold_in(jax.random.key(seed), i)


def write_job(folder: Path, run: RunConfig, options: BenchTrainOptions) -> None:
    """Write the start of every process: `job.json`, `params.npz` and `batches.npz`, one batch a step.

    `batches.npz` holds `rows` as our step takes them, and for the peers the same rows as our step masks them: `ids`,
    `segments` (the documents of a row, numbered from 1), and `positions` and `labels` of the masked tokens.
    """
    shape = (options.checked + options.updates * options.blocks, options.rows, run.data.seq_len)
    rows = random_rows(run, np.random.default_rng(options.seed), shape)
    mask = jax.jit(lambda batch, key: mask_rows(run, SPECIAL, batch, key, run.train.mask_rate[0]))
    masked = [mask(batch, masking_key(options.seed, i)) for i, batch in enumerate(rows)]
    assert all((batch.weights == 1).all() for batch in masked)  # so that a peer may take the plain mean
    batches: dict[str, Any] = {
        name: np.stack([getattr(batch, name) for batch in masked]).astype(np.int64)
        for name in ("ids", "positions", "labels")
    }
    batches |= {"rows": rows, "segments": 1 + np.cumsum(rows == SPECIAL.cls, axis=-1)}
    params: dict[str, Any] = flatten(nn.init(run.model, jax.random.key(options.seed)))
    np.savez(folder / "batches.npz", **batches)
    np.savez(folder / "params.npz", **params)
    job = {"run": asdict(run), "lr": LR_SHARE * run.train.peak_lr, "seed": options.seed}
    write_json(folder / "job.json", job)


def make_step(folder: Path) -> Callable[[int], jax.Array]:
    """Return a training step on the job in `folder`: number of a batch to its mean loss. The state stays inside."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    run = convert(job["run"], RunConfig, "job.json")
    flat, rows = np.load(folder / "params.npz"), np.load(folder / "batches.npz")["rows"]
    params = {"masked_lm": {}} | unflatten({name: jnp.asarray(flat[name]) for name in flat.files})
    state, steps = state_of(run, params), build_steps(run, SPECIAL)

    def step(i: int) -> jax.Array:
        nonlocal state
        rate, taken = jnp.float32(run.train.mask_rate[0]), jnp.int32(len(rows[i]))
        inputs = StepInputs(jnp.float32(job["lr"]), jnp.float32(0.0), rate, taken)
        state, (sums, _, _) = steps.train_step(state, rows[i], masking_key(job["seed"], i), inputs)
        return sums.loss / sums.count

    return step


def text(report: dict[str, Any]) -> str:
    """Return speeds and ratios."""
    lines = machine_lines(report["machine"])
    for process in report["contestants"]:
        lines.append(f"{process['name']:<14} {process['tokens_per_second']:>10,.0f} tokens/s  ({process['facts']})")
    for name, ratio in report["ratios"].items():
        loss = "another model" if ratio["loss_difference"] is None else f"losses within {ratio['loss_difference']:.0e}"
        lines.append(
            f"ufbert trains {ratio['median']:.2f} times as fast as {name}: median of {ratio['pairs']} pairs of blocks, "
            f"quartiles {ratio['low']:.2f} and {ratio['high']:.2f}, fastest blocks {ratio['fastest']:.2f}; {loss}"
        )
    return "\n".join(lines)


def start(folder: Path, _name: str, threads: int) -> tuple[str, Answers]:
    """Get ready to train: facts, and the answers of this process."""
    use_device("cpu")
    return f"jax {jax.__version__}", step_answers(make_step(folder))


if __name__ == "__main__":
    serve(start)

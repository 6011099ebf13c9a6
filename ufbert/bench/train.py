"""Training speed on this CPU against peers that train the same model: what they get, the check, and the report."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ufbert import nn
from ufbert.bench.contest import Race, compete
from ufbert.bench.worker import SPECIAL, masking_key
from ufbert.config import RunConfig
from ufbert.config.stored import to_json
from ufbert.hub.folder import flatten
from ufbert.pretrain.step import mask_rows

LR_SHARE = 0.25
"""Constant learning rate of every contestant over the recipe's peak: where crammed BERT's schedule begins."""
DOCUMENT_LEN = 32
"""Mean length of the random documents, in tokens."""


OURS = (sys.executable, "-m", "ufbert.bench.worker")


def race(
    folder: Path,
    run: RunConfig,
    peers: Mapping[str, Sequence[str]],
    size: Race,
    beside: Mapping[str, RunConfig] | None = None,
) -> dict[str, Any]:
    """Train `run` here and in each peer, in turns, and report speeds and ratios.

    `peers` maps a name to the command that starts it, in which `{folder}` stands for the job folder; `beside` a name to
    something else that we train. Raises UserError if a peer fails, or if its losses say that it does not train the same
    model; then nothing has been timed. (What is `beside` may have another feedforward, and only then is not checked.)
    """
    write_job(folder, run, size)
    beside = beside or {}
    for name, other in beside.items():
        (folder / name).mkdir()
        write_job(folder / name, other, size)
    ours = {name: (*OURS, str(folder / name)) for name in beside}
    unchecked = [name for name, other in beside.items() if other.model.feedforward != run.model.feedforward]
    report = compete(folder, (*OURS, "{folder}"), {**peers, **ours}, size, unchecked=unchecked)
    report["job"]["run"] = to_json(run)
    tokens = size.updates * size.rows * run.data.seq_len
    for one in report["contestants"]:
        one["tokens_per_second"] = tokens / statistics.median(one["block_seconds"])
    return report


def random_rows(run: RunConfig, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Packed rows of random documents: each begins with [CLS] and ends at random; token frequencies fall as 1 / rank."""
    ordinary = np.arange(max(SPECIAL) + 1, run.model.vocab_size)
    weight = 1.0 / np.arange(1, len(ordinary) + 1)
    rows = rng.choice(ordinary, size=shape, p=weight / weight.sum()).astype(np.int32)
    rows[rng.random(shape) < 1.0 / DOCUMENT_LEN] = SPECIAL.cls
    rows[..., 0] = SPECIAL.cls
    return rows


def write_job(folder: Path, run: RunConfig, size: Race) -> None:
    """Write what every contestant starts from: `job.json`, `params.npz` and `batches.npz`, one batch an update.

    `batches.npz` holds `rows` as our step takes them, and for the peers the same rows as our step masks them: `ids`,
    `segments` (the documents of a row, numbered from 1), and `positions` and `labels` of the hidden tokens.
    """
    shape = (size.checked + size.updates * size.blocks, size.rows, run.data.seq_len)
    rows = random_rows(run, np.random.default_rng(size.seed), shape)
    mask = jax.jit(lambda batch, key: mask_rows(run, SPECIAL, batch, key, run.train.mask_rate[0]))
    masked = [mask(batch, masking_key(size.seed, i)) for i, batch in enumerate(rows)]
    assert all((one.weights == 1).all() for one in masked)  # so that a peer may take the plain mean
    batches: dict[str, Any] = {
        name: np.stack([getattr(one, name) for one in masked]).astype(np.int64)
        for name in ("ids", "positions", "labels")
    }
    batches |= {"rows": rows, "segments": 1 + np.cumsum(rows == SPECIAL.cls, axis=-1)}
    params: dict[str, Any] = flatten(nn.init(run.model, jax.random.key(size.seed)))
    np.savez(folder / "batches.npz", **batches)
    np.savez(folder / "params.npz", **params)
    job = {"run": to_json(run), "lr": LR_SHARE * run.train.peak_lr, "seed": size.seed}
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")

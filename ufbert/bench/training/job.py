"""The job that every process of `ufbert bench train` starts from: a configuration, parameters and masked rows, in a folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.data.tokenizer import SpecialIds
from ufbert.hub.folder import flatten
from ufbert.options.bench import BenchTrainOptions
from ufbert.pretrain.step import mask_rows
from ufbert.runtime.files import write_json

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
"""Ids of the special tokens in the benchmark's rows."""
LR_SHARE = 0.25
"""Constant learning rate of every process over the recipe's peak: where crammed BERT's schedule begins."""
DOCUMENT_LEN = 32
"""Mean length of the random documents, in tokens."""


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


def n_batches(options: BenchTrainOptions) -> int:
    """Count the batches of a job: those that are checked, those of every block, and those of the profile."""
    return options.checked + options.updates * (options.blocks + options.profile)


def write_job(folder: Path, run: RunConfig, options: BenchTrainOptions) -> None:
    """Write the start of every process: `job.json`, `params.npz` and `batches.npz`, one batch a step.

    `batches.npz` holds `rows` as our step takes them, and for the peers the same rows as our step masks them: `ids`,
    `segments` (the documents of a row, numbered from 1), and `positions` and `labels` of the masked tokens.
    """
    folder.mkdir()
    shape = (n_batches(options), options.rows, run.data.seq_len)
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
    job = {
        "run": asdict(run), "lr": LR_SHARE * run.train.peak_lr, "seed": options.seed, "device": options.device,
    }  # fmt: skip
    write_json(folder / "job.json", job)

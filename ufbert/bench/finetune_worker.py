"""Our side of `ufbert bench finetune`: `python -m ufbert.bench.finetune_worker FOLDER ORDER`.

Speaks the protocol of `ufbert.bench.worker`; `ufbert.bench.finetune.write_job` says what is in the job folder. ORDER is that of
the batches. The first `checked` updates have no dropout.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.bench.worker import serve
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.config.stored import from_json
from ufbert.runtime.device import use_device


def make_update(config: ModelConfig, tune: FinetuneConfig, params: Any, seed: int) -> Callable[..., Any]:
    """(i, inputs, labels, dropout) -> mean loss of a training update, on the device; the state stays inside.

    `inputs` are a `Batch` and `labels` its class numbers, `dropout` is whether there is any. The one place of the benchmark
    that knows fine-tuning's own functions, which train several runs at once: here, one.
    """
    import jax
    import jax.numpy as jnp

    from ufbert.glue.finetune import Batches, Setting, start_state, steps_of

    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
    state = start_state(stacked, tune)
    keys, lr = jax.random.split(jax.random.key(seed), 1), np.array([tune.lr], np.float32)
    without, with_dropout = (
        steps_of(Setting(replace(config, dropout=rate), replace(tune, dropout=rate), False, False, False))
        for rate in (0.0, tune.dropout)
    )

    def update(i: int, inputs: Any, labels: np.ndarray, dropout: bool) -> Any:
        nonlocal state
        one = type(inputs)(*(array[None] for array in inputs))
        batch = Batches(one, labels[None], np.ones((1, len(labels)), np.float32), None)
        state, loss = (with_dropout if dropout else without).update(state, batch, keys, np.int32(i), lr)
        return loss

    return update


def answer(folder: Path, order: str) -> Callable[[int, int], list[float]]:
    """(first, updates) -> losses: a run on the job in `folder`, that each call trains on."""
    use_device("cpu")
    from ufbert.data.encode import Encoded
    from ufbert.hub.folder import unflatten

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = replace(from_json(ModelConfig, job["model"], "job.json"), dtype="float32")
    tune = from_json(FinetuneConfig, job["tune"], "job.json")
    flat, found = np.load(folder / "params.npz"), dict(np.load(folder / "batches.npz"))
    ids = [row[:n].tolist() for row, n in zip(found["ids"], found["tokens"], strict=True)]
    rows = Encoded(ids, [[0] * len(row) for row in ids], job["max_len"], config.only_len, config.pad_id, 0)
    labels, picks, lengths = found["labels"].astype(np.float32), found[f"{order}_picks"], found[f"{order}_lengths"]
    update = make_update(config, tune, unflatten({name: flat[name] for name in flat.files}), job["seed"])

    def train(first: int, updates: int) -> list[float]:
        losses = [
            update(i, rows.pad(picks[i], int(lengths[i])), labels[picks[i]], i >= job["checked"])
            for i in range(first, first + updates)
        ]
        return [float(loss[0]) for loss in losses]

    return train


if __name__ == "__main__":
    serve(answer(Path(sys.argv[1]), sys.argv[2]))

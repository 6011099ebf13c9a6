"""Our side of `ufbert bench train`: `python -m ufbert.bench.worker FOLDER`, a process that trains on request.

The protocol, the same for every peer: the process gets a job folder, prints `{"ready": WHAT IT IS}` when it has loaded it,
and answers each line `{"first": i, "updates": n}` with `{"losses": [...]}`, the mean losses of updates from the batches
i, i + 1, ..., i + n - 1, when they are done; or `{"error": SENTENCE}`. All are single lines of JSON.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.config import RunConfig
from ufbert.config.stored import from_json
from ufbert.data.tokenizer import SpecialIds
from ufbert.runtime.device import use_device

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)
"""Ids of the special tokens in the benchmark's rows."""


def masking_key(seed: int, i: int) -> Any:
    """The key of batch i's masking."""
    import jax

    return jax.random.fold_in(jax.random.key(seed), i)


def make_update(run: RunConfig, params: Any, lr: float, seed: int) -> Callable[[int, np.ndarray], Any]:
    """(i, rows) -> mean loss of a training update, on the device; the state stays inside.

    The one place of the benchmark that knows the signatures of the step functions.
    """
    import jax.numpy as jnp

    from ufbert.pretrain.step import StepInputs, build_steps, state_of

    state, steps = state_of(run, params), build_steps(run, SPECIAL)

    def update(i: int, rows: np.ndarray) -> Any:
        nonlocal state
        rate, taken = jnp.float32(run.train.mask_rate[0]), jnp.int32(len(rows))
        inputs = StepInputs(jnp.float32(lr), jnp.float32(0.0), rate, taken)
        state, (sums, _, _) = steps.train_step(state, rows, masking_key(seed, i), inputs)
        return sums.loss / sums.count

    return update


def answer(folder: Path) -> Callable[[int, int], list[float]]:
    """(first, updates) -> losses: a run on the job in `folder`, that each call trains on."""
    use_device("cpu")
    import jax.numpy as jnp

    from ufbert.hub.folder import unflatten

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    run = from_json(RunConfig, job["run"], "job.json")
    flat = np.load(folder / "params.npz")
    params = {"masked_lm": {}} | unflatten({name: jnp.asarray(flat[name]) for name in flat.files})
    rows = np.load(folder / "batches.npz")["rows"]
    update = make_update(run, params, job["lr"], job["seed"])

    def train(first: int, updates: int) -> list[float]:
        losses = [update(i, rows[i]) for i in range(first, first + updates)]
        return [float(loss) for loss in losses]

    return train


def serve(train: Callable[[int, int], list[float]]) -> None:
    """Answer requests until the input ends."""
    print(json.dumps({"ready": f"jax {importlib.metadata.version('jax')}"}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"losses": train(asked["first"], asked["updates"])}), flush=True)


if __name__ == "__main__":
    serve(answer(Path(sys.argv[1])))

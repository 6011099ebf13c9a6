"""Our side of `ufbert bench train`: `python -m ufbert.bench.training.ours FOLDER NAME THREADS` trains on request.

Its name begins with `ufbert`, or with `float32` for the reference: the same model in float32, with exact products.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ufbert.bench.training.job import SPECIAL, masking_key
from ufbert.bench.training.kernels import profile_report, read_trace
from ufbert.bench.worker import Answers, serve, step_answers
from ufbert.config import RunConfig
from ufbert.hub.folder import unflatten
from ufbert.pretrain.step import StepInputs, build_steps, state_of
from ufbert.runtime.device import use_device
from ufbert.runtime.typed import convert

REFERENCE = "float32"
"""Begins the name of a process whose losses the others are compared with."""


class Trainer:
    """A compiled training step on the job in a folder, and the state that it updates."""

    def __init__(self, folder: Path, dtype: str = "") -> None:
        """Read the job and compile its step, for another compute type if `dtype` names one."""
        began = time.perf_counter()
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        run = convert(job["run"], RunConfig, "job.json")
        if dtype:
            run = replace(run, model=replace(run.model, dtype=dtype))
        flat = np.load(folder / "params.npz")
        self.rows, self.seed = np.load(folder / "batches.npz")["rows"], job["seed"]
        params = {"masked_lm": {}} | unflatten({name: jnp.asarray(flat[name]) for name in flat.files})
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.state = state_of(run, params)
        rate, taken = jnp.float32(run.train.mask_rate[0]), jnp.int32(len(self.rows[0]))
        self.inputs = StepInputs(jnp.float32(job["lr"]), jnp.float32(0.0), rate, taken)
        steps: Any = build_steps(run, SPECIAL)
        key = masking_key(self.seed, 0)
        self.program = steps.train_step.lower(self.state, self.rows[0], key, self.inputs).compile()
        self.start_seconds = time.perf_counter() - began

    def step(self, i: int) -> jax.Array:
        """Train on batch i and return its mean loss before that, perhaps still computing."""
        key = masking_key(self.seed, i)
        self.state, (sums, _, _) = self.program(self.state, self.rows[i], key, self.inputs)
        return sums.loss / sums.count

    def describe(self) -> dict[str, Any]:
        """Return the number of parameters, the seconds that the start took, and what is known of a graphics card."""
        device, memory, card = jax.devices()[0], None, None
        if device.platform != "cpu":
            memory, card = (device.memory_stats() or {}).get("peak_bytes_in_use"), device.device_kind
        return {"parameters": self.parameters, "start_seconds": self.start_seconds, "memory": memory, "card": card}

    def profile(self, first: int, calls: int) -> dict[str, Any]:
        """Trace the steps from batch `first` on, and return their seconds by kind of kernel."""
        jax.block_until_ready(self.step(first))
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with tempfile.TemporaryDirectory(prefix="ufbert-trace-") as name:
            with jax.profiler.trace(name, profiler_options=options):
                jax.block_until_ready([self.step(i) for i in range(first + 1, first + calls)])
            [trace] = Path(name).rglob("*.xplane.pb")
            events = read_trace(trace.read_bytes())
        return profile_report(events, self.program.as_text() or "", calls - 1)


def start(folder: Path, name: str, _threads: int) -> tuple[str, Answers]:
    """Get ready to train: facts, and the answers of this process."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    use_device(job["device"])
    if name.startswith(REFERENCE):
        jax.config.update("jax_default_matmul_precision", "highest")
    trainer = Trainer(folder, "float32" if name.startswith(REFERENCE) else "")
    return f"jax {jax.__version__}", {**step_answers(trainer.step, trainer.describe), "profile": trainer.profile}


if __name__ == "__main__":
    serve(start)

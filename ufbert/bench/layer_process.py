"""A process of `ufbert bench layer`: `python -m ufbert.bench.layer_process FOLDER KIND THREADS [PATH ...]`.

KIND is `ufbert` (ours, with the paths named behind it), `jax`, `jax-bf16` or `numpy`; `ufbert.bench.layer_worker` describes
what it answers.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.bench.layer_worker import Runner, Worker, jax_runner


def make(folder: Path, kind: str, threads: int, paths: list[str]) -> tuple[str, Worker]:
    """What the process is, and what answers for it."""
    arrays = dict(np.load(folder / "weights.npz"))
    if kind == "numpy":
        from ufbert.bench.layer_numpy import NumpyDense

        dense = NumpyDense(arrays, threads)
        built = np.show_config("dicts")["Build Dependencies"]["blas"]
        facts = f"numpy {np.__version__}, {built['name']} {built['version']}"
        runners = {"numpy": Runner(dense.chain, dense.layer)}
        return facts, Worker(folder, runners, lambda x: x, len(arrays["dense_in"]))
    from ufbert.runtime.device import use_device

    use_device("cpu")
    import jax.numpy as jnp

    from ufbert.bench import layer_paths

    facts = f"jax {importlib.metadata.version('jax')}"
    if kind == "ufbert":
        from ufbert.bench.layer_ours import make_ours

        return make_ours(folder, arrays, paths, threads, facts)
    dtype = "bfloat16" if kind == "jax-bf16" else "float32"
    runner = jax_runner(layer_paths.dense_layer(dtype), layer_paths.dense_layers(arrays, dtype))
    return facts, Worker(folder, {kind: runner}, jnp.asarray, len(arrays["dense_in"]))


def serve(ready: str, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer messages until the input ends."""
    print(json.dumps({"ready": ready}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    ready, worker = make(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    serve(f"{ready}, {sys.argv[3]} threads", worker.answer)

"""How a process of `ufbert bench layer` answers.

The protocol, the same for every peer: one JSON line a message. A process is started as `... FOLDER KIND THREADS`, where KIND
is its name and `ufbert.bench.layer_job` says what is in the folder. It prints `{"ready": WHAT IT IS}`, or
`{"missing": WHAT IT LACKS}` and ends; then it answers each of

- `{"do": "load", "rows": b}`: get ready for batches of b rows, namely inputs[0:b], inputs[b:2b], ...; answers their number;
- `{"do": "check", "name": n, "batches": k, "sample": [i, ...]}`: `{"file": F}`, where those rows of the first k batches are
  after the whole chain;
- `{"do": "time", "name": n, "what": "chain" or "layer", "first": i, "calls": c}`: `{"seconds": s}` of c calls on batches i,
  i + 1, ..., each done before the next begins; a call is the whole chain, or one layer, another one at every call;

by `{"error": SENTENCE}` if it fails. n is the name of a path, and KIND for a peer. Ours answers more; see `layer_ours`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_BATCHES = 4096
"""More different batches of few rows would not make the caches any colder."""


class Runner(NamedTuple):
    """Something to time. Both functions return when the answer is there."""

    chain: Callable[[Any], Any]
    """Rows through all layers."""
    layer: Callable[[int, Any], Any]
    """Rows through one layer."""


class Worker:
    """Answers the messages that are for every contestant."""

    def __init__(
        self, folder: Path, runners: dict[str, Runner], place: Callable[[np.ndarray], Any], layers: int
    ) -> None:
        """`place` puts a batch where the runners take it from."""
        self.folder, self.runners, self.place, self.layers = folder, runners, place, layers
        self.inputs = np.load(folder / "inputs.npy", mmap_mode="r")
        self.batches: list[Any] = []

    def load(self, rows: int) -> dict[str, Any]:
        """Have batches of this many rows."""
        self.batches = []  # the old ones go before the new ones come
        count = min(len(self.inputs) // rows, MOST_BATCHES)
        self.batches = [self.place(np.array(self.inputs[i * rows : (i + 1) * rows])) for i in range(count)]
        return {"batches": count}

    def check(self, name: str, batches: int, sample: list[int]) -> dict[str, Any]:
        """Write what becomes of some rows of the first batches."""
        y = np.concatenate([np.asarray(self.runners[name].chain(batch)) for batch in self.batches[:batches]])
        np.save(self.folder / f"{name}-found.npy", y[sample])
        return {"file": f"{name}-found.npy"}

    def time(self, name: str, what: str, first: int, calls: int) -> dict[str, Any]:
        """Time calls, each on another batch than the one before."""
        runner, batches, layers = self.runners[name], self.batches, self.layers
        n = len(batches)
        start = time.perf_counter()
        if what == "chain":
            for i in range(first, first + calls):
                runner.chain(batches[i % n])
        else:
            for i in range(first, first + calls):
                runner.layer(i % layers, batches[i % n])
        return {"seconds": time.perf_counter() - start}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message."""
        arguments = {key: value for key, value in message.items() if key != "do"}
        return {"load": self.load, "check": self.check, "time": self.time}[message["do"]](**arguments)


def jax_runner(layer: Callable[..., Any], weights: list[Any]) -> Runner:
    """A jax layer with its weights, compiled."""
    import jax

    from ufbert.bench.layer_paths import chain

    whole, single = chain(layer), jax.jit(layer)
    return Runner(
        lambda x: whole(x, weights).block_until_ready(), lambda i, x: single(x, weights[i]).block_until_ready()
    )

"""The milliseconds of models that take turns in one process, by the engine behind `Predictor`."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ufbert.bench.harness import quartiles
from ufbert.config import ModelConfig
from ufbert.data.encode import Encoded
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder
from ufbert.inference.engine import Dtype, Engine
from ufbert.runtime.console import phase, show

BATCHES = 8
"""Different batches: a call has other ids than the one before."""
SECONDS = 0.3
"""Length of a block, about."""


def parse_shape(text: str, config: ModelConfig) -> tuple[int, int]:
    """Read BATCHxTOKENS. Raises UserError for another text, and for rows that the model does not read."""
    batch, _, tokens = text.partition("x")
    if not (batch.isdecimal() and tokens.isdecimal() and 0 < int(batch) <= 4096 and 0 < int(tokens) <= 2**20):
        raise UserError(f"--shape {text[:40]!r} is not a shape; 1x128 is one.")
    if int(tokens) > config.max_len or config.only_len not in (0, int(tokens)):
        raise UserError(
            f"--shape {text} has rows of {tokens} tokens; the model reads {config.only_len or config.max_len}."
        )
    return int(batch), int(tokens)


def random_rows(config: ModelConfig, batch: int, tokens: int, seed: int = 0) -> list[Encoded]:
    """Draw batches of rows of random ids."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (BATCHES, batch, tokens))
    types = [[0] * tokens] * batch
    return [Encoded(rows.tolist(), types, config.max_len, config.only_len, config.pad_id, 0) for rows in ids]


def timed(calls: Mapping[str, Callable[[int], Any]], blocks: int) -> dict[str, Float[np.ndarray, " blocks"]]:
    """Time functions of a batch's number in blocks that take turns; return the seconds of a call in each block.

    The first calls compile, and say how many make a block.
    """
    counts = {}
    for name, call in calls.items():
        call(0)
        began, n = time.perf_counter(), 0
        while n < 3 or time.perf_counter() - began < SECONDS:
            call(n)
            n += 1
        counts[name] = max(1, round(n * SECONDS / max(time.perf_counter() - began, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for block in range(blocks):
        turn = block % len(names)
        for name in (*names[turn:], *names[:turn]):
            began = time.perf_counter()
            for i in range(counts[name]):
                calls[name](block * counts[name] + i)
            times[name].append((time.perf_counter() - began) / counts[name])
        show(f"block {block + 1}/{blocks}")
    return {name: np.array(seconds) for name, seconds in times.items()}


def time_models(
    models: Mapping[str, tuple[ModelFolder, Dtype]], shape: str, blocks: int, seed: int = 0
) -> dict[str, Float[np.ndarray, " blocks"]]:
    """Time models at a shape, from ids to hidden states, in one run; return the seconds of a call in each block."""
    calls: dict[str, Callable[[int], Any]] = {}
    with phase("packing the weights", stays=False):
        for name, (model, dtype) in models.items():
            rows, engine = random_rows(model.config, *parse_shape(shape, model.config), seed), Engine(model, dtype)
            calls[name] = lambda i, engine=engine, rows=rows: engine.hidden(rows[i % BATCHES])
    if not calls:
        return {}
    with phase(f"timing {shape}"):
        return timed(calls, blocks)


def milliseconds(seconds: Float[np.ndarray, " blocks"]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile in milliseconds."""
    low, median, high = quartiles([1e3 * float(value) for value in seconds])
    return low, median, high

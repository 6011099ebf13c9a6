"""The gates of `ufbert bench layer`: right answers, right routing decisions, and rows that spread over the leaves.

Everything is compared with the float64 evaluation of `layer_job`, of the weights as each path stores them. A gate that
fails ends the benchmark with a sentence and no time. How to read the errors: each is the length of the difference over
the length of what the chain adds to a row; float32 rounding leaves 1e-7 to 1e-6, a bfloat16 or int8 peer a few percent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.bench.harness import Entry, load
from ufbert.bench.layer_job import RightAnswers, dense_chain, samples, tree_chain, tree_layer
from ufbert.bench.layer_ours import as_stored, tree_layers
from ufbert.bench.report import type_of
from ufbert.errors import UserError
from ufbert.options.bench import BenchLayerOptions
from ufbert.runtime.console import phase

MARGIN = 1e-5
"""A logit nearer to zero than this may turn either way in float32."""
TREE_TOLERANCE = 1e-4
"""Largest relative error of our answers: float32 rounding, also with narrow weights, as the right answer uses those."""
DENSE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "int8": 0.1}
"""Largest relative error of a peer, by its type; a bfloat16 or int8 peer rounds, and its error is printed. torch's dynamic
int8 layers, which round rows too, are off by 4 to 5 %."""
LEAVES = 0.5
"""Share of a tree's leaves that rows must end in."""


@phase("checking that all compute the same")
def check_everything(
    folder: Path, options: BenchLayerOptions, ours: Sequence[Entry], peers: Sequence[Entry]
) -> dict[str, Any]:
    """Return the largest `errors` by name at any number of rows, and `changed` and `leaves` of `OurLayers.routes`.

    Raises UserError if an entry is wrong, or if rows take few routes; then nothing has been timed.
    """
    arrays, inputs = dict(np.load(folder / "weights.npz")), np.load(folder / "inputs.npy", mmap_mode="r")
    stored = {
        name: [(as_stored(a), np.asarray(bias), as_stored(b)) for a, bias, b in tree_layers(arrays, name)]
        for _, name in ours
    }
    routes = check_routes(folder, ours, stored, max(*options.rows, 2 ** (options.tree_depth + 1), 64))
    errors: dict[str, float] = {name: 0.0 for _, name in (*ours, *peers)}
    for b in options.rows:
        batches = -(-16 // b)
        sample = samples(b * batches)
        x = np.array(inputs[sample])
        dense = dense_chain(x, arrays)
        load((*ours, *peers), "inputs.npy", b)
        for process, name in (*ours, *peers):
            answer = process.ask("check", "file", name=name, work="chain", batches=batches, sample=sample)
            wanted = tree_chain(x, stored[name]) if name in stored else dense
            tolerance = TREE_TOLERANCE if name in stored else DENSE_TOLERANCE[type_of(name)]
            error = check_answers(name, b, np.load(folder / answer["file"]), x, wanted, tolerance)
            errors[name] = max(errors[name], error)
    return {"errors": errors, "changed": routes["changed"], "leaves": routes["leaves"]}


def check_answers(name: str, rows: int, y: np.ndarray, x: np.ndarray, wanted: RightAnswers, tolerance: float) -> float:
    """Return the largest error of a row over the length of what the chain should add to it, without rows that nearly turn.

    Raises UserError if it is above `tolerance` or no number, or if less than half the rows can be compared.
    """
    sure = wanted.margin > MARGIN
    if 2 * sure.sum() < len(sure):
        raise UserError(f"Of {len(sure)} sampled rows only {sure.sum()} are clear of a turn. Nothing was timed.")
    added = np.linalg.norm(wanted.y - x, axis=1)
    error = float((np.linalg.norm(y - wanted.y, axis=1) / added)[sure].max()) if y.shape == wanted.y.shape else np.nan
    if not error <= tolerance:
        off = f"off by {error:.1e} of what the layers add (at most {tolerance:.0e} is allowed)"
        raise UserError(f"{name} computes something else: with {rows} rows its answers are {off}. Nothing was timed.")
    return error


def check_routes(folder: Path, ours: Sequence[Entry], stored: Mapping[str, list[Any]], rows: int) -> dict[str, Any]:
    """Return our process's answer about routes. Raises UserError if a turn is wrong, or if too few leaves are reached."""
    answer = ours[0].process.ask("routes", "file", rows=rows, sample=samples(rows))
    kept = np.load(folder / answer["file"])
    for name, layers in stored.items():
        for i, weights in enumerate(layers):
            _, wanted, margin = tree_layer(kept["x"][i], *weights)
            sure = margin > MARGIN
            if not np.array_equal(kept[name][i][sure], wanted[sure]):
                raise UserError(f"{name} takes wrong turns in layer {i}. Nothing was timed.")
    if answer["leaves"] < LEAVES:
        share = f"{answer['leaves']:.0%} of a tree's leaves"
        raise UserError(f"{rows} rows end in only {share}; that would time a cache. Nothing was timed.")
    return answer

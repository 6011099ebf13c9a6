"""What must hold before `ufbert bench layer` times anything: right answers, right routes, and rows that spread out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ufbert.bench.contest import Contestant
from ufbert.bench.layer_job import Answers, Layers, dense_chain, samples, tree_chain, tree_layer
from ufbert.bench.layer_paths import as_stored, tree_layers
from ufbert.errors import UserError

MARGIN = 1e-5
"""A logit nearer to zero than this may turn either way in float32."""

TREE_TOLERANCE = 1e-4
"""Largest relative error of our answers: float32 rounding, also with narrow weights, as the right answer uses those."""

DENSE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "int8": 0.1}
"""Largest relative error of a peer, by its type; a bfloat16 or int8 peer rounds, and its error is printed. torch's dynamic
int8 layers, which round rows too, are off by 4 to 5 %."""

LEAVES = 0.5
"""Share of a tree's leaves that rows must end in."""

Ask = tuple[Contestant, str]
"""A process and the name of one of its contestants."""


def type_of(name: str) -> Literal["float32", "bfloat16", "int8"]:
    """float32, bfloat16 or int8: the type of a contestant's weights (the narrower, if it has two)."""
    return "bfloat16" if "bf16" in name or "bfloat16" in name else "int8" if "int8" in name else "float32"


def check_everything(
    folder: Path, shape: Layers, rows: Sequence[int], ours: Sequence[Ask], peers: Sequence[Ask]
) -> dict[str, Any]:
    """What was found: `errors` by name, the largest at any number of rows; `changed` and `leaves`, see `OurWorker.routes`.

    Raises UserError if a contestant is wrong, or if rows take few routes; then nothing has been timed.
    """
    arrays, inputs = dict(np.load(folder / "weights.npz")), np.load(folder / "inputs.npy", mmap_mode="r")
    stored = {
        name: [(as_stored(a), np.asarray(bias), as_stored(b)) for a, bias, b in tree_layers(arrays, name)]
        for _, name in ours
    }
    found = check_routes(folder, ours, stored, max(*rows, 2 ** (shape.depth + 1), 64))
    errors: dict[str, float] = {name: 0.0 for _, name in (*ours, *peers)}
    for b in rows:
        batches = -(-16 // b)
        sample = samples(b * batches)
        x = np.array(inputs[sample])
        dense = dense_chain(x, arrays) if peers else None
        for contestant in {id(one): one for one, _ in (*ours, *peers)}.values():
            contestant.ask({"do": "load", "rows": b}, "batches")
        for contestant, name in (*ours, *peers):
            asked = {"do": "check", "name": name, "batches": batches, "sample": sample}
            y = np.load(folder / contestant.ask(asked, "file")["file"])
            wanted = tree_chain(x, stored[name]) if name in stored else dense
            assert wanted is not None
            tolerance = TREE_TOLERANCE if name in stored else DENSE_TOLERANCE[type_of(name)]
            errors[name] = max(errors[name], check_answers(name, b, y, x, wanted, tolerance))
    return {"errors": errors, "changed": found["changed"], "leaves": found["leaves"]}


def check_answers(name: str, rows: int, y: np.ndarray, x: np.ndarray, wanted: Answers, tolerance: float) -> float:
    """The largest error of a row over the length of what the chain should add to it. Rows that nearly turn are left out.

    Raises UserError if it is above `tolerance` or no number, or if less than half the rows can be compared.
    """
    sure = wanted.margin > MARGIN
    if 2 * sure.sum() < len(sure):
        raise UserError(f"Of {len(sure)} sampled rows only {sure.sum()} are clear of a turn. Nothing was timed.")
    added = np.linalg.norm(wanted.y - x, axis=1)
    error = float((np.linalg.norm(y - wanted.y, axis=1) / added)[sure].max()) if y.shape == wanted.y.shape else np.nan
    if not error <= tolerance:
        raise UserError(
            f"{name} computes something else: with {rows} rows its answers are off by {error:.1e} of what the layers add "
            f"(at most {tolerance:.0e} is allowed). Nothing was timed."
        )
    return error


def check_routes(folder: Path, ours: Sequence[Ask], stored: Mapping[str, list[Any]], rows: int) -> dict[str, Any]:
    """Our process's answer about routes. Raises UserError if one is wrong, or if too few leaves are reached."""
    sample = samples(rows)
    found = ours[0][0].ask({"do": "routes", "rows": rows, "sample": sample}, "file")
    kept = np.load(folder / found["file"])
    for name, layers in stored.items():
        for i, weights in enumerate(layers):
            _, wanted, margin = tree_layer(kept["x"][i], *weights)
            sure = margin > MARGIN
            if not np.array_equal(kept[name][i][sure], wanted[sure]):
                raise UserError(f"{name} takes wrong turns in layer {i}. Nothing was timed.")
    if found["leaves"] < LEAVES:
        raise UserError(
            f"{rows} rows end in only {found['leaves']:.0%} of a tree's leaves; that would time a cache. Nothing was timed."
        )
    return found

"""The page of several runs over each other: their losses against tokens and against time, and both in tables."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from ufbert.errors import UserError
from ufbert.report.charts import Line, LineChart, Point
from ufbert.report.page import Bullets, Page, Section, Table
from ufbert.report.run_records import RunRecords
from ufbert.report.run_report import duration, loss_top, run_facts, time_unit
from ufbert.runtime.machine import PROVENANCE
from ufbert.runtime.metrics import EvaluationRecord

MARKS = 5
"""Numbers of tokens, or times, at which losses are compared."""


def overlay_page(runs: Sequence[RunRecords]) -> Page:
    """Return the page of several runs. Raises UserError if one has no evaluation yet."""
    for run in runs:
        if not run.evaluations:
            raise UserError(f"The run in {run.folder} has no held-out evaluation yet, so there is no curve to compare.")
    names = _names(runs)
    unit, factor = time_unit(max(run.spent for run in runs))
    ranked = sorted(range(len(runs)), key=lambda i: runs[i].heldout_loss or math.inf)
    by_tokens = [_curve(run, lambda e: float(e.tokens)) for run in runs]
    by_time = [_curve(run, lambda e: e.spent) for run in runs]
    return Page(
        title=f"{len(runs)} runs: {', '.join(names)}",
        verdict=" ".join(_verdict(runs, names, ranked)),
        sections=[
            Section("The runs", [_table(runs, names, ranked[0])]),
            Section(
                "Loss against tokens",
                [
                    _chart("tokens", "M tokens", 1e6, runs, names, by_tokens),
                    *_at_marks(names, by_tokens, 2.5e6, lambda mark: f"{mark / 1e6:g} M tokens"),
                ],
            ),
            Section(
                "Loss against time",
                [
                    _chart("time", f"{unit} of the budget", factor, runs, names, by_time),
                    *_at_marks(names, by_time, 60.0, duration),
                    *([Bullets(cautions)] if (cautions := _cautions(runs, names)) else []),
                ],
            ),
            Section("What each run is", [_origins(runs, names)]),
        ],
        facts=_facts(runs, names),
    )


def interpolated(curve: Sequence[Point], x: float) -> float | None:
    """Interpolate a curve at `x`, linearly in the logarithm of x; None outside what was evaluated."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if 0 < x0 <= x <= x1 and x1 > x0:
            return y0 + math.log(x / x0) / math.log(x1 / x0) * (y1 - y0)
    return None


def marks(most: float, step: float) -> list[float]:
    """Return up to five numbers up to `most` at which curves are compared: `step` and its doubles, or its halves."""
    return [mark for k in range(-16, 20) if (mark := step * 2.0**k) <= 1.0001 * most][-MARKS:]


def _names(runs: Sequence[RunRecords]) -> list[str]:
    """Name each run by its folder, or by its whole path where two folders have one name."""
    short = [run.folder.resolve().name for run in runs]
    counts = Counter(short)
    return [name if counts[name] == 1 else str(run.folder) for name, run in zip(short, runs, strict=True)]


def _curve(run: RunRecords, place: Callable[[EvaluationRecord], float]) -> list[Point]:
    """Return a run's held-out losses in order; of repeated evaluations, after a resume, the last counts."""
    by_tokens = {e.tokens: e for e in run.evaluations}
    return [(place(e), e.heldout_loss) for _, e in sorted(by_tokens.items())]


def _verdict(runs: Sequence[RunRecords], names: Sequence[str], ranked: Sequence[int]) -> list[str]:
    """Say which run is ahead, by how much, and why that may mean nothing."""
    best, next_best = ranked[0], ranked[1]
    loss, other = (runs[i].heldout_loss or math.nan for i in (best, next_best))
    texts = [] if _same_text(runs) else ["The runs have not read the same text, so that their losses do not compare."]
    texts += [
        f"{names[best]} has the lowest held-out loss, {loss:.3f} nats a masked token, {other - loss:.3f} below "
        f"{names[next_best]}."
    ]
    tokens, seconds = [run.tokens for run in runs], [run.spent for run in runs]
    unequal = [
        name for name, values in (("tokens", tokens), ("time", seconds)) if max(values) > 1.05 * max(min(values), 1e-9)
    ]
    if unequal:
        texts.append(f"The runs have not had equal {' or equal '.join(unequal)}, so read the curves at one place.")
    texts += [f"{name} is still running." for name, run in zip(names, runs, strict=True) if run.state == "running"]
    dead = [name for name, run in zip(names, runs, strict=True) if run.state in ("stopped", "ended")]
    if dead:
        texts.append(f"Without an end: {', '.join(dead)}.")
    return texts


def _same_text(runs: Sequence[RunRecords]) -> bool:
    used = {run.config.prepared_data.fingerprint if run.config.prepared_data else "" for run in runs}
    return len(used) == 1


def _table(runs: Sequence[RunRecords], names: Sequence[str], best: int) -> Table:
    rows = []
    for run, name in zip(runs, names, strict=True):
        loss, summary = run.heldout_loss, run.summary
        rows.append(
            [
                name,
                "-" if loss is None else f"{loss:.4f}",
                f"{run.evaluations[-1].heldout_accuracy:.1%}",
                f"{run.tokens / 1e6:,.2f}",
                duration(run.spent),
                f"{summary.parameters:,}" if summary else "-",
                f"{summary.flops_per_token / 1e6:,.2f}" if summary else "-",
                run.state if run.state == "finished" else f"{run.state}, {run.fraction:.0%}",
            ]
        )
    head = ["run", "loss, nats", "accuracy", "M tokens", "time", "parameters", "MFLOP per token", "state"]
    return Table(head, rows, numbers=range(1, 7), strong_rows=[best])


def _chart(
    against: str, x: str, factor: float, runs: Sequence[RunRecords], names: Sequence[str], curves: Sequence[list[Point]]
) -> LineChart:
    lines = [
        Line(name, [(at / factor, loss) for at, loss in curve], dots=True)
        for name, curve in zip(names, curves, strict=True)
    ]
    levels = {run.summary.unigram_loss for run in runs if run.summary}
    level = {"word frequency alone": levels.pop()} if len(levels) == 1 else {}
    return LineChart(
        f"Held-out loss against {against}", x, "nats a masked token", lines, levels=level, top=loss_top(runs)
    )


def _at_marks(
    names: Sequence[str], curves: Sequence[list[Point]], step: float, words: Callable[[float], str]
) -> list[Table]:
    """Tabulate losses at equal places, the lowest of each column set off; nothing if no run has come to a mark."""
    at = marks(max(curve[-1][0] for curve in curves), step)
    losses = [[interpolated(curve, mark) for mark in at] for curve in curves]
    kept = [j for j in range(len(at)) if any(row[j] is not None for row in losses)]
    if not kept:
        return []
    rows = [
        [name, *("-" if row[j] is None else f"{row[j]:.4f}" for j in kept)]
        for name, row in zip(names, losses, strict=True)
    ]
    caption = "Loss in nats, interpolated between evaluations, linearly in the logarithm of the place."
    return [Table(["run", *(words(at[j]) for j in kept)], rows, numbers=range(1, len(kept) + 1), caption=caption)]


def _cautions(runs: Sequence[RunRecords], names: Sequence[str]) -> list[str]:
    """Say why times may not compare."""
    texts = []
    for fact in ("processor", "commit"):
        values = [run.config.environment.get(fact, "not recorded") for run in runs]
        if len(set(values)) > 1:
            texts.append(f"Not one {fact}: {'; '.join(map(': '.join, zip(names, values, strict=True)))}.")
    return texts


def _origins(runs: Sequence[RunRecords], names: Sequence[str]) -> Table:
    rows = [
        [
            name,
            run.architecture,
            run.origin,
            run.config.recipe,
            run.config.budget,
            run.config.corpus,
            str(run.config.seed),
        ]
        for name, run in zip(names, runs, strict=True)
    ]
    return Table(["run", "model", "from", "recipe", "budget", "corpus", "seed"], rows)


def _facts(runs: Sequence[RunRecords], names: Sequence[str]) -> dict[str, Any]:
    """Return command, commit, processor and load: of all runs, or of each if they differ."""
    facts = {}
    for fact in PROVENANCE:
        values = [str(run_facts(run)[fact]) for run in runs]
        each = "; ".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
        facts[fact] = values[0] if len(set(values)) == 1 else each
    return facts

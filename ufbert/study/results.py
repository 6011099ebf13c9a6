"""Results of a study: means, spreads over seeds, differences paired by seed, and curves, from the run folders of its cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from ufbert.cost.flops import neurons
from ufbert.report.overlay import interpolated, marks
from ufbert.runtime.metrics import EvaluationRecord
from ufbert.runtime.run_folder import Sample, Summary, read_run, read_samples
from ufbert.runtime.typed import read_lines
from ufbert.study.cells import Cell, StudyFile, counted_cells, first_cells, heldout_loss, read_cell, summary_of

SMALLEST_GAP = 0.02
"""Nats that the two ends of a gap must lie apart; below, a share of it is noise."""


class Spread(NamedTuple):
    """A mean over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation over seeds (n - 1); None for one seed, which has no spread."""
    n: int


def spread_of(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of the values of some seeds, at least one."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


class Point(NamedTuple):
    """A held-out evaluation, averaged over the seeds."""

    tokens: float
    seconds: float
    loss: float
    accuracy: float
    """Share of the masked tokens that are guessed."""


@dataclass(frozen=True)
class Row:
    """A variant that has a finished cell, at its best rate. Losses are in nats."""

    variant: str
    options: list[str]
    rate: float | None
    """None for the variant's own."""
    losses: dict[int, float]
    """Held-out loss by seed."""
    loss: Spread
    difference: Spread | None
    """Loss less that of the baseline, paired by seed; None without a seed in common."""
    gap_closed: Spread | None
    """Share of the gap closed, paired by seed."""
    tokens: float
    seconds: float
    """Of the budget, on average."""
    parameters: int
    flops_per_token: float
    """Of a training step, forward and backward."""
    neurons_used: int
    """Of the feedforward that has most neurons, those that a token uses in inference."""
    neurons: int
    """And all of them."""
    rates: dict[str, float]
    """Held-out loss of the first seed by rate."""
    at_tokens: dict[str, float]
    """Loss after so many tokens, interpolated between evaluations, mean of the seeds that have it."""
    curve: list[Point]
    commits: list[str]
    cpus: list[str]
    beside_other_work: list[str]
    """Cells that were measured beside other work: other cells, or other processes."""
    loads: list[float] = field(default_factory=list)
    """Load averages before each session."""
    samples: list[Sample] = field(default_factory=list)
    """Guesses of the first seed's model."""


class Results(NamedTuple):
    """All that the tables and the page show."""

    study: StudyFile
    rows: list[Row]
    waiting: list[str]
    """Variants without a finished cell."""
    failed: dict[str, str]
    """Reason by cell, of those that failed at last."""
    notes: list[str]


def results_of(folder: Path, study: StudyFile) -> Results:
    """Read what is finished of a study. Raises UserError if a file of a finished cell is damaged."""
    counted = {name: cells for name in study.variants if (cells := counted_cells(study, folder, name))}
    losses = {
        name: {cell.seed: loss for cell in cells if (loss := heldout_loss(cell.folder(folder))) is not None}
        for name, cells in counted.items()
    }
    gap, notes = _gap(study, losses)
    most = max((s.tokens for cells in counted.values() for s in _summaries(folder, cells)), default=0)
    rows = [_row(study, folder, name, cells, losses, gap, marks(float(most), 2.5e6)) for name, cells in counted.items()]
    failed = {}
    for path in sorted((folder / "cells").glob("*")):
        if (stored := read_cell(path)) and stored.failed and summary_of(path) is None:
            failed[path.name] = stored.failed
    waiting = [name for name in study.variants if name not in counted]
    return Results(study, rows, waiting, failed, [*notes, *_notes(study, rows)])


def _summaries(folder: Path, cells: Sequence[Cell]) -> list[Summary]:
    return [summary for cell in cells if (summary := summary_of(cell.folder(folder)))]


def _row(
    study: StudyFile, folder: Path, name: str, cells: list[Cell], losses: Mapping[str, Mapping[int, float]],
    gap: Mapping[int, tuple[float, float]], at_marks: Sequence[float],
) -> Row:  # fmt: skip
    places = [cell.folder(folder) for cell in cells]
    summaries, own = _summaries(folder, cells), losses[name]
    base = losses.get(study.baseline, {})
    differences = [own[seed] - base[seed] for seed in own if seed in base]
    shares = [(gap[seed][0] - own[seed]) / (gap[seed][0] - gap[seed][1]) for seed in own if seed in gap]
    stored = [record for place in places if (record := read_cell(place))]
    sessions = [(record, session) for record in stored for session in record.sessions]
    curves = [evaluations(place) for place in places]
    at = {f"{mark:.6g}": [loss for curve in curves if (loss := loss_at(curve, mark)) is not None] for mark in at_marks}
    used, all_neurons = neurons(read_run(places[0] / "run").run.model)
    return Row(
        variant=name,
        options=study.variants[name].asked,
        rate=cells[0].rate,
        losses=dict(own),
        loss=spread_of(list(own.values())),
        difference=spread_of(differences) if differences and name != study.baseline else None,
        gap_closed=spread_of(shares) if shares else None,
        tokens=fmean(s.tokens for s in summaries),
        seconds=fmean(s.spent_seconds for s in summaries),
        parameters=summaries[0].parameters,
        flops_per_token=summaries[0].flops_per_token,
        neurons_used=used,
        neurons=all_neurons,
        rates={
            f"{cell.rate:g}": loss
            for cell in first_cells(study, name)
            if cell.rate is not None and (loss := heldout_loss(cell.folder(folder))) is not None
        },
        at_tokens={mark: fmean(values) for mark, values in at.items() if len(values) == len(curves)},
        curve=mean_curve(curves),
        commits=sorted({session.commit for _, session in sessions}),
        cpus=sorted({session.cpu for _, session in sessions}),
        beside_other_work=sorted(
            {
                Cell(record.variant, record.rate, record.seed).name
                for record, session in sessions
                if session.beside_other_work
            }
        ),
        loads=[float(session.load_before) for _, session in sessions],
        samples=read_samples(places[0] / "run"),
    )


def evaluations(place: Path) -> list[Point]:
    """Read the held-out evaluations of a cell's run, in order; of repeated ones, after a resume, the last."""
    by_tokens = {e.tokens: e for e in read_lines(place / "run" / "metrics.jsonl", EvaluationRecord)}
    return [Point(float(e.tokens), e.spent, e.heldout_loss, e.heldout_accuracy) for _, e in sorted(by_tokens.items())]


def loss_at(curve: Sequence[Point], tokens: float) -> float | None:
    """Interpolate a curve at a number of tokens, linearly in their logarithm; None outside what was evaluated."""
    return interpolated([(point.tokens, point.loss) for point in curve], tokens)


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Average the curves of several seeds, evaluation by evaluation, as far as all have come."""
    return [Point(*(fmean(values) for values in zip(*points, strict=True))) for points in zip(*curves, strict=False)]


def _gap(
    study: StudyFile, losses: Mapping[str, Mapping[int, float]]
) -> tuple[dict[int, tuple[float, float]], list[str]]:
    """Return both ends of the gap by seed, or nothing and a sentence where a share of it would mean nothing."""
    if not study.gap_from:
        return {}, []
    start, end = losses.get(study.gap_from, {}), losses.get(study.gap_to, {})
    seeds = [seed for seed in start if seed in end]
    ends = f"the gap from {study.gap_from} to {study.gap_to}"
    if not seeds:
        return {}, [f"{ends} is not known yet: no seed has run on both"]
    width = spread_of([start[seed] - end[seed] for seed in seeds])
    error = (width.deviation or 0.0) / sqrt(width.n)
    if width.mean < max(SMALLEST_GAP, 2.0 * error):
        errors = "" if width.deviation is None else f" and two standard errors ({2.0 * error:.4f})"
        return {}, [
            f"{ends} is {width.mean:+.4f} nats ({_seeds(width)}), too little for shares of it to mean anything: at least "
            f"{SMALLEST_GAP}{errors} are wanted"
        ]
    note = f"gap closed = (D(k) - loss) / (D(k) - D(all)), D(k) {study.gap_from}, D(all) {study.gap_to}, "
    return {seed: (start[seed], end[seed]) for seed in seeds}, [f"{note}{width.mean:.4f} nats apart ({_seeds(width)})"]


def _seeds(spread: Spread) -> str:
    return "one seed, no spread" if spread.deviation is None else f"± {spread.deviation:.4f} over {spread.n} seeds"


def _notes(study: StudyFile, rows: Sequence[Row]) -> list[str]:
    """Write sentences on how the numbers were measured."""
    counts = sorted({row.loss.n for row in rows})
    notes = []
    if counts:
        spread = "one seed, no spread" if counts == [1] else "± is the standard deviation over seeds (n - 1)"
        notes.append(
            f"seeds: {' or '.join(map(str, counts))} of {len(study.seeds)} finished; {spread}; differences by seed"
        )
    if study.rates:
        notes.append(
            f"the rate is the best of {', '.join(f'{rate:g}' for rate in study.rates)} by the held-out loss of seed "
            f"{study.seeds[0]}, whose loss is a little flattered by the choice"
        )
    commits, cpus = sorted({c for row in rows for c in row.commits}), sorted({c for row in rows for c in row.cpus})
    if commits:
        notes.append(
            f"commit {commits[0]}" if len(commits) == 1 else f"NOT ONE COMMIT: cells ran at {', '.join(commits)}"
        )
    if cpus:
        notes.append(f"processor {cpus[0]}" if len(cpus) == 1 else f"NOT ONE PROCESSOR: {'; '.join(cpus)}")
    if beside := [name for row in rows for name in row.beside_other_work]:
        notes.append(f"measured beside other work, so that seconds say little: {', '.join(beside)}")
    return notes

"""`ufbert glue-table`: sweeps side by side, with the chance that is in their differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ufbert.errors import UserError
from ufbert.glue.bootstrap import DRAWS, interval, resampled_scores
from ufbert.glue.metrics import METRICS
from ufbert.glue.outcome import Predictions, read_predictions
from ufbert.glue.tasks import TASKS
from ufbert.report.glue_results import DevResult, GlueResults, TaskResult, read_results
from ufbert.report.glue_table import Difference, Line, side_by_side
from ufbert.runtime.files import write_text


def _positional() -> Any:
    import tyro

    return tyro.conf.Positional


@dataclass(frozen=True)
class GlueTableOptions:
    """Print GLUE sweeps side by side as Markdown: the median of each task, and its difference to the first sweep's with a 95
    % interval for the seeds and the finite dev set."""

    sweeps: Annotated[tuple[str, ...], _positional()]
    """Two or more folders that `ufbert finetune` wrote, or their glue.json."""
    out: str = ""
    """Write the table to this file, too."""


def glue_table_command(args: list[str]) -> None:
    """`ufbert glue-table ARGS`."""
    import tyro

    options = tyro.cli(GlueTableOptions, args=args, prog="ufbert glue-table")
    if len(options.sweeps) < 2:
        raise UserError("glue-table compares; name at least two sweeps.")
    text = glue_table([read_results(Path(place)) for place in options.sweeps])
    if options.out:
        write_text(Path(options.out), text)
    print(text, end="")


def glue_table(sweeps: Sequence[GlueResults]) -> str:
    """The Markdown of two or more sweeps, the first being what the others are compared with."""
    names = dict.fromkeys((name, split) for sweep in sweeps for name, task in sweep.tasks.items() for split in task.dev)
    lines = [_line(sweeps, name, split) for name, split in names]
    warnings = [
        f"{chr(ord('B') + i)} and A differ in {mismatch}; a difference is not the models' alone."
        for i, other in enumerate(sweeps[1:])
        for mismatch in _mismatches(sweeps[0], other)
    ]
    return side_by_side(sweeps, lines, warnings, _key(sweeps, lines))


def _line(sweeps: Sequence[GlueResults], name: str, split: str) -> Line:
    found = [(sweep.tasks[name], sweep.tasks[name].dev.get(split)) if name in sweep.tasks else None for sweep in sweeps]
    devs = [pair[1] if pair else None for pair in found]
    task = next(pair[0] for pair in found if pair and pair[1])
    metric = task.metrics[0]
    title = f"{task.title(split)} (a part of {TASKS[task.cut_of].folder})" if task.cut_of else task.title(split)
    rows = " / ".join(dict.fromkeys(f"{dev.rows:,}" for dev in devs if dev))
    medians = [dev.median.get(metric) if dev else None for dev in devs]
    differences = [_compared(sweeps[0], sweep, name, split, metric) for sweep in sweeps[1:]]
    return Line(title, metric, rows, medians, differences)


def _compared(first: GlueResults, other: GlueResults, name: str, split: str, metric: str) -> Difference | str | None:
    """The difference on one dev split; None if one of the two lacks it, a text if they cannot be compared."""
    if any(name not in sweep.tasks or split not in sweep.tasks[name].dev for sweep in (first, other)):
        return None
    tasks, devs = [s.tasks[name] for s in (first, other)], [s.tasks[name].dev[split] for s in (first, other)]
    if devs[0].rows != devs[1].rows or tasks[0].cut_of != tasks[1].cut_of or metric not in tasks[1].metrics:
        return "not the same dev rows"
    files = [_predictions(s, s.tasks[name], name, split, metric) for s in (first, other)]
    if files[0] and files[1] and files[0].rows != files[1].rows:
        return "not the same dev rows"
    return _difference(devs[0], devs[1], metric, (files[0], files[1]) if files[0] and files[1] else None)


def _predictions(sweep: GlueResults, task: TaskResult, name: str, split: str, metric: str) -> Predictions | None:
    """A sweep's predictions on one dev split, or None. Raises UserError where they do not give the scores of `glue.json`."""
    path = sweep.folder / "predictions" / f"{name}.{split}.tsv"
    found = read_predictions(path, task.label_names)
    if found is None:
        return None
    for seed, scores in task.dev[split].seeds.items():
        predicted = found.predicted.get(seed)
        if predicted is None or abs(METRICS[metric](predicted, found.labels) - scores[metric]) > 1e-4:
            raise UserError(
                f"{path} is not of the run in {sweep.folder / 'glue.json'}: seed {seed} scores differently."
            )
    return found


def _difference(
    first: DevResult, other: DevResult, metric: str, files: tuple[Predictions, Predictions] | None
) -> Difference:
    """The difference of two medians over seeds; the interval is of dev rows and seeds, or without files of seeds alone."""
    seeds = sorted(first.seeds), sorted(other.seeds)
    value = other.median[metric] - first.median[metric]
    if not files and len(seeds[0]) == len(seeds[1]) == 1:
        return Difference(value)
    rng = np.random.default_rng(0)
    if files:
        scores = resampled_scores(
            METRICS[metric],
            [np.stack([file.predicted[seed] for seed in some]) for file, some in zip(files, seeds, strict=True)],
            files[0].labels,
            rng,
        )
    else:
        scores = [
            np.tile([dev.seeds[seed][metric] for seed in some], (DRAWS, 1))
            for dev, some in zip((first, other), seeds, strict=True)
        ]
    low, high = interval(scores[0], scores[1], seeds[0] == seeds[1], rng)
    return Difference(value, low, high, files is not None)


def _mismatches(first: GlueResults, other: GlueResults) -> list[str]:
    """In what two sweeps differ besides the model, in words."""
    shared = [(first.tasks[name], other.tasks[name]) for name in first.tasks if name in other.tasks]
    found = [
        f"the {what} ({a}; {b})"
        for what, a, b in (
            *(
                (f"protocol's {key}", getattr(first.protocol, key), getattr(other.protocol, key))
                for key in ("name", "mode")
            ),
            ("source", first.source, other.source),
        )
        if a != b
    ]
    if first.protocol.text != other.protocol.text:
        found.append("the protocol's text (see above)")
    for one, two in shared:
        for key in ("cut_of", "train_rows", "skipped_rows", "starts_from"):
            a, b = getattr(one, key), getattr(two, key)
            if a != b:
                found.append(f"the {key.replace('_', ' ')} of {one.folder} ({a or 'none'}; {b or 'none'})")
    return found


def _key(sweeps: Sequence[GlueResults], lines: Sequence[Line]) -> str:
    """How to read the table, as far as it needs saying."""
    found = [d for line in lines for d in line.differences if isinstance(d, Difference) and d.low == d.low]
    fewest = min(
        (len(dev.seeds) for sweep in sweeps for task in sweep.tasks.values() for dev in task.dev.values()), default=0
    )
    said = ["Scores are medians over seeds, times 100."]
    if found:
        said.append(
            "Brackets hold the 95 % interval of a difference, ≈ marks one that contains 0: its sign is not settled."
        )
    if any(d.of_rows for d in found):
        said.append(
            f"The interval is the middle 95 % of {DRAWS:,} bootstrap draws, each of dev rows (the same rows for both models) "
            "and of seeds."
        )
    if any(not d.of_rows for d in found):
        said.append(
            f"† No prediction files with equal rows on both sides: the interval is of {DRAWS:,} draws of seeds alone, and "
            "too narrow."
        )
    if found and fewest == 1:
        said.append("Where a model has one seed, the interval leaves out what another seed would have changed.")
    elif found and fewest < 5:
        said.append(
            f"The range of {fewest} seeds holds their true median in {100 * (1 - 2 ** (1 - fewest)):.0f} % of cases, so "
            "that the intervals are too narrow."
        )
    return " ".join(said)

"""`ufbert glue-table`: sweeps side by side, with the chance that is in their differences."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ufbert.errors import UserError
from ufbert.glue.metrics import DRAWS, METRICS, interval, resampled_scores
from ufbert.glue.predictions import Predictions, read_predictions
from ufbert.glue.report import points
from ufbert.glue.results import DevResult, GlueResults, read_results
from ufbert.glue.tasks import TASKS
from ufbert.options.finetune import GlueTableOptions
from ufbert.report.page import markdown_grid
from ufbert.runtime.console import phase
from ufbert.runtime.files import write_text


def compare(options: GlueTableOptions) -> str:
    """Print sweeps side by side as Markdown, write it to `options.out` if that is named, and return it.

    Raises UserError for fewer than two sweeps, and for a file that is missing or damaged.
    """
    if len(options.sweeps) < 2:
        raise UserError("glue-table compares; name at least two sweeps.")
    text = glue_table([Path(place) for place in options.sweeps])
    if options.out:
        write_text(Path(options.out), text)
    print(text, end="")
    return text


class Sweep(NamedTuple):
    """A sweep to compare."""

    folder: Path
    """Folder of its prediction files."""
    results: GlueResults

    def dev(self, name: str, split: str) -> DevResult | None:
        """Return the scores on a dev split of a task; None if the sweep lacks them."""
        return self.results.tasks[name].dev.get(split) if name in self.results.tasks else None


class Difference(NamedTuple):
    """Difference of one sweep's median to the first sweep's."""

    value: float
    """As a fraction, not in points of a hundred."""
    low: float = float("nan")
    high: float = float("nan")
    """Ends of the 95 % interval; NaN if there is none."""
    of_rows: bool = False
    """True if the interval holds the chance of dev rows and seeds, False if that of seeds alone."""

    @property
    def has_interval(self) -> bool:
        return self.low == self.low

    def __str__(self) -> str:
        value = points(self.value, "+")
        if not self.has_interval:
            return f"{value} (no interval)"
        unsettled = " ≈" if self.low <= 0 <= self.high else ""
        return f"{value} [{points(self.low, '+')}, {points(self.high, '+')}]{unsettled}{'' if self.of_rows else ' †'}"


class TableRow(NamedTuple):
    """One dev split, or one average: the median of each sweep, and its difference to the first."""

    task: str
    metric: str
    rows: str
    medians: list[float | None]
    """None for a sweep without that split."""
    differences: list[Difference | str | None]
    """Of each sweep but the first; a text says why there is none, None that there is nothing to compare."""

    def cells(self) -> list[str]:
        medians = ["" if median is None else points(median) for median in self.medians]
        differences = ["" if difference is None else str(difference) for difference in self.differences]
        pairs = zip(medians[1:], differences, strict=True)
        return [self.task, self.metric, self.rows, medians[0], *(cell for pair in pairs for cell in pair)]


@phase("comparing the predictions")
def glue_table(places: Sequence[Path]) -> str:
    """Compare sweeps with the first of them, as Markdown: their letters, warnings, the table, and how to read it.

    `places` are folders of sweeps, or their `glue.json`. Raises UserError for a file that is missing or damaged.
    """
    sweeps = [Sweep(place if place.is_dir() else place.parent, read_results(place)) for place in places]
    letters = [chr(ord("A") + i) for i in range(len(sweeps))]
    tasks = [named for sweep in sweeps for named in sweep.results.tasks.items()]
    names = dict.fromkeys((name, split) for name, task in tasks for split in task.dev)
    rows = [_split_row(sweeps, name, split) for name, split in names]
    warnings = [
        f"**WARNING: {letter} and A differ in {mismatch}; a difference is not the models' alone.**"
        for letter, other in zip(letters[1:], sweeps[1:], strict=True)
        for mismatch in _mismatches(sweeps[0].results, other.results)
    ]
    models = [
        [letter, r.model, str(r.protocol), r.source, ", ".join(map(str, r.seeds))]
        for letter, (_, r) in zip(letters, sweeps, strict=True)
    ]
    model_grid = markdown_grid(["", "model", "protocol", "source", "seeds"], models)
    head = ["task", "metric", "dev rows", "A", *(x for b in letters[1:] for x in (b, f"{b} - A"))]
    cells = [row.cells() for row in (*rows, *_average_rows(sweeps))]
    score_grid = markdown_grid(head, cells, numbers=range(2, len(head)))
    return "\n\n".join([model_grid, *warnings, score_grid, _key(sweeps, rows)]) + "\n"


def _split_row(sweeps: Sequence[Sweep], name: str, split: str) -> TableRow:
    devs = [sweep.dev(name, split) for sweep in sweeps]
    task = next(sweep.results.tasks[name] for sweep in sweeps if sweep.dev(name, split))
    metric = task.metrics[0]
    part = f" (a part of {TASKS[task.cut_of].folder})" if task.cut_of in TASKS else ""
    rows = " / ".join(dict.fromkeys(f"{dev.rows:,}" for dev in devs if dev))
    medians = [dev.median.get(metric) if dev else None for dev in devs]
    differences = [compared(sweeps[0], sweep, name, split, metric) for sweep in sweeps[1:]]
    return TableRow(task.title(split) + part, metric, rows, medians, differences)


def _average_rows(sweeps: Sequence[Sweep]) -> list[TableRow]:
    """Return a row for each average that every sweep has."""
    rows = []
    for key, average in sweeps[0].results.averages.items():
        averages = [sweep.results.averages.get(key) for sweep in sweeps]
        values = [a.value for a in averages if a is not None and a.value is not None]
        if len(values) == len(sweeps):
            differences: list[Difference | str | None] = [Difference(value - values[0]) for value in values[1:]]
            rows.append(TableRow(average.name, "mean", "", [*values], differences))
    return rows


def compared(first: Sweep, other: Sweep, name: str, split: str, metric: str) -> Difference | str | None:
    """Return the difference on one dev split; None if one of the two lacks it, a text if they cannot be compared."""
    devs = first.dev(name, split), other.dev(name, split)
    if devs[0] is None or devs[1] is None:
        return None
    tasks = first.results.tasks[name], other.results.tasks[name]
    if devs[0].rows != devs[1].rows or tasks[0].cut_of != tasks[1].cut_of or metric not in tasks[1].metrics:
        return "not the same dev rows"
    read = [_predictions(sweep, name, split, metric) for sweep in (first, other)]
    files = [file for file in read if file is not None]
    if len(files) == 2 and files[0].rows != files[1].rows:
        return "not the same dev rows"
    return _difference(devs[0], devs[1], metric, files if len(files) == 2 else [])


def _predictions(sweep: Sweep, name: str, split: str, metric: str) -> Predictions | None:
    """Read a sweep's predictions on one dev split, or None. Raises UserError if they do not give the scores of `glue.json`."""
    task = sweep.results.tasks[name]
    path = sweep.folder / "predictions" / f"{name}.{split}.tsv"
    predictions = read_predictions(path, task.label_names)
    if predictions is None:
        return None
    for seed, scores in task.dev[split].seeds.items():
        predicted = predictions.predicted.get(seed)
        if predicted is None or abs(METRICS[metric](predicted, predictions.labels) - scores[metric]) > 1e-4:
            raise UserError(f"{path} is not of the run in {sweep.folder}/glue.json: seed {seed} scores differently.")
    return predictions


def _difference(first: DevResult, other: DevResult, metric: str, files: list[Predictions]) -> Difference:
    """Return the difference of two medians over seeds. Its interval is of dev rows and seeds, or without files of seeds."""
    seeds = sorted(first.seeds), sorted(other.seeds)
    value = other.median[metric] - first.median[metric]
    if not files and len(seeds[0]) == len(seeds[1]) == 1:
        return Difference(value)
    rng = np.random.default_rng(0)
    if files:
        predicted = [np.stack([file.predicted[seed] for seed in of]) for file, of in zip(files, seeds, strict=True)]
        scores = resampled_scores(METRICS[metric], predicted, files[0].labels, rng)
    else:
        scores = [
            np.tile([dev.seeds[seed][metric] for seed in of], (DRAWS, 1))
            for dev, of in zip((first, other), seeds, strict=True)
        ]
    low, high = interval(scores[0], scores[1], seeds[0] == seeds[1], rng)
    return Difference(value, low, high, bool(files))


def _mismatches(first: GlueResults, other: GlueResults) -> list[str]:
    """List in words what two sweeps differ in besides the model."""
    pairs = [
        ("protocol's name", first.protocol.name, other.protocol.name),
        ("protocol's mode", first.protocol.mode, other.protocol.mode),
        ("source", first.source, other.source),
    ]
    for name in [name for name in first.tasks if name in other.tasks]:
        tasks = first.tasks[name], other.tasks[name]
        for key in ("cut_of", "train_rows", "skipped_rows", "starts_from"):
            a, b = (getattr(task, key) or "none" for task in tasks)
            pairs.append((f"{key.replace('_', ' ')} of {tasks[0].folder}", a, b))
    texts = [] if first.protocol.text == other.protocol.text else ["the protocol's text (see above)"]
    return texts + [f"the {name} ({a}; {b})" for name, a, b in pairs if a != b]


def _key(sweeps: Sequence[Sweep], rows: Sequence[TableRow]) -> str:
    """Say how to read the table, as far as its rows need it."""
    differences = [d for row in rows for d in row.differences if isinstance(d, Difference) and d.has_interval]
    devs = [dev for sweep in sweeps for task in sweep.results.tasks.values() for dev in task.dev.values()]
    fewest = min((len(dev.seeds) for dev in devs), default=0)
    sentences = ["Scores are medians over seeds, times 100."]
    if differences:
        sentences.append(
            "Brackets hold the 95 % interval of a difference, ≈ marks one that contains 0: its sign is not settled."
        )
    if any(d.of_rows for d in differences):
        sentences.append(
            f"The interval is the middle 95 % of {DRAWS:,} bootstrap draws, each of dev rows (the same rows for both models) "
            "and of seeds."
        )
    if any(not d.of_rows for d in differences):
        sentences.append(
            f"† No prediction files with equal rows on both sides: the interval is of {DRAWS:,} draws of seeds alone, and "
            "too narrow."
        )
    if differences and fewest == 1:
        sentences.append("If a model has one seed, the interval leaves out what another seed would have changed.")
    elif differences and fewest < 5:
        sentences.append(
            f"The range of {fewest} seeds holds their true median in {100 * (1 - 2 ** (1 - fewest)):.0f} % of cases, so "
            "that the intervals are too narrow."
        )
    return " ".join(sentences)

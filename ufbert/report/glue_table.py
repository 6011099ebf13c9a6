"""Several sweeps side by side, as Markdown."""

from collections.abc import Sequence
from typing import NamedTuple

from ufbert.report.glue_report import points
from ufbert.report.glue_results import GlueResults
from ufbert.report.page import markdown_grid


class Difference(NamedTuple):
    """How far the median of one sweep is from the first one's."""

    value: float
    """As a fraction, not in points of a hundred."""
    low: float = float("nan")
    high: float = float("nan")
    """Ends of the 95 % interval; NaN where there is none."""
    of_rows: bool = False
    """Whether the interval holds the chance of the dev rows, too, or that of the seeds alone."""

    def __str__(self) -> str:
        value = _signed(self.value)
        if self.low != self.low:
            return f"{value} (no interval)"
        unsettled = " ≈" if self.low <= 0 <= self.high else ""
        return f"{value} [{_signed(self.low)}, {_signed(self.high)}]{unsettled}{'' if self.of_rows else ' †'}"


def _signed(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0


class Line(NamedTuple):
    """One dev split: the median of each sweep, and its difference to the first."""

    task: str
    metric: str
    rows: str
    medians: list[float | None]
    """None for a sweep without that split."""
    differences: list[Difference | str | None]
    """Of each sweep but the first; a text says why there is none, None that there is nothing to compare."""


def side_by_side(sweeps: Sequence[GlueResults], lines: Sequence[Line], warnings: Sequence[str], key: str) -> str:
    """The whole Markdown text: which sweep each letter is, warnings, the table, the averages, and how to read it."""
    letters = [chr(ord("A") + i) for i in range(len(sweeps))]
    named = [
        [letter, sweep.model, f"{sweep.protocol.name} ({sweep.protocol.mode}): {sweep.protocol.text}", sweep.source,
         ", ".join(map(str, sweep.seeds))]
        for letter, sweep in zip(letters, sweeps, strict=True)
    ]  # fmt: skip
    head = ["task", "metric", "dev rows", "A", *(x for b in letters[1:] for x in (b, f"{b} - A"))]
    body = [[line.task, line.metric, line.rows, *_cells(line)] for line in (*lines, *_averages(sweeps))]
    parts = [
        markdown_grid(["", "model", "protocol", "source", "seeds"], named),
        *(f"**WARNING: {warning}**" for warning in warnings),
        markdown_grid(head, body, numbers=range(2, len(head))),
        key,
    ]
    return "\n\n".join(parts) + "\n"


def _cells(line: Line) -> list[str]:
    medians = ["" if median is None else points(median) for median in line.medians]
    others = zip(medians[1:], line.differences, strict=True)
    return [medians[0], *(x for median, found in others for x in (median, "" if found is None else str(found)))]


def _averages(sweeps: Sequence[GlueResults]) -> list[Line]:
    """The averages that every sweep has."""
    lines = []
    for key, average in sweeps[0].averages.items():
        values = [sweep.averages[key].value if key in sweep.averages else None for sweep in sweeps]
        known = [value for value in values if value is not None]
        if len(known) == len(sweeps):
            differences: list[Difference | str | None] = [Difference(value - known[0]) for value in known[1:]]
            lines.append(Line(average.name, "mean", "", values, differences))
    return lines

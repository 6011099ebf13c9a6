"""The result of a compression: the format `compress.json`, and the pages that show it."""

import html
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ufbert.errors import UserError
from ufbert.report.page import facts, grid, markdown_grid, page, svg
from ufbert.runtime.files import to_json_text, write_json, write_text
from ufbert.runtime.typed import Count, read_lines, read_typed

FORMAT, FORMAT_VERSION = "ufbert-compress", 1
RESULTS_FILE = "compress.json"
Spread = tuple[float, float, float]
"""Lower quartile, median and upper quartile."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of the comparison."""

    name: str
    architecture: str
    parameters: Count
    bytes: Count
    """Of its model.safetensors."""
    flops: float
    """Operations of the encoder for a token of a row of the timed length."""
    scores: dict[str, float] = field(default_factory=dict)
    """Empty where nothing was scored."""
    milliseconds: dict[str, Spread] = field(default_factory=dict)
    """Of a call, by the type of the weights."""
    faster: dict[str, Spread] = field(default_factory=dict)
    """Times as fast as the first row, of neighbouring blocks, by the type of the weights."""
    neurons: Count = 0
    """Feedforward neurons that a token uses, in the layer where it uses most."""
    lost: float | None = None
    """Of the deciding score against the first row, in `unit`; negative for a gain."""


@dataclass(frozen=True, kw_only=True)
class CompressResults:
    """`compress.json`. The first row is the model before."""

    method: str
    model: str
    """The folder that was compressed."""
    rows: list[Row]
    metrics: tuple[str, ...] = ()
    """The deciding one first."""
    unit: str = ""
    """Unit of what was lost, points or nats."""
    material: str = ""
    """The rows that tuned and scored the models."""
    shape: str = ""
    """BATCHxTOKENS of a timed call."""
    updates: Count = 0
    """Of the tuning."""
    spent_seconds: float = 0.0
    """In tuning."""
    notes: list[str] = field(default_factory=list)
    """Sentences that a reader needs."""
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    """Machine, versions and commit."""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


def read_results(folder: Path) -> CompressResults:
    """Read `compress.json`. Raises UserError if it is absent or damaged, or of another format."""
    results = read_typed(folder / RESULTS_FILE, CompressResults)
    if (results.format, results.format_version) != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{folder / RESULTS_FILE} is of another format than this ufbert reads; run the compression again."
        )
    return results


def write_results(folder: Path, results: CompressResults) -> str:
    """Write `compress.json`, `report.md`, whose text is returned, and `report.html`. Raises UserError if the disk refuses."""
    write_json(folder / RESULTS_FILE, asdict(results))
    text = markdown(results)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", html_page(folder, results))
    return text


def table(results: CompressResults) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the comparison."""
    types = list(dict.fromkeys(name for row in results.rows for name in row.milliseconds))
    head = ["", "parameters", "MB", "MFLOP/token", *(f"{name}" for name in results.metrics)]
    head += [f"lost, {results.unit}"] if results.metrics else []
    for name in types:
        head += [f"ms, {name}", f"faster by, {name}"]
    lines = []
    for row in results.rows:
        cells = [row.name, f"{row.parameters:,}", f"{row.bytes / 1e6:,.1f}", f"{row.flops / 1e6:,.1f}"]
        cells += [_score(results, row.scores.get(name)) for name in results.metrics]
        cells += [_lost(results, row.lost)] if results.metrics else []
        for name in types:
            cells += [_spread(row.milliseconds.get(name), 2), _spread(row.faster.get(name), 2, "x")]
        lines.append(cells)
    return head, lines


def _score(results: CompressResults, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if results.unit == "nats" else f"{100 * value:.1f}"


def _lost(results: CompressResults, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value + 0.0:.3f}" if results.unit == "nats" else f"{round(value, 1) + 0.0:.1f}"


def _spread(spread: Spread | None, digits: int, unit: str = "") -> str:
    if spread is None:
        return ""
    low, median, high = (f"{value:.{digits}f}" for value in spread)
    return f"{median}{unit} ({low} to {high})"


def lines(results: CompressResults) -> list[str]:
    """Return the sentences that stand with the table."""
    said = [f"{results.method} of {results.model}."]
    if results.material:
        said.append(f"Scored on {results.material}.")
    if results.updates:
        said.append(f"Tuned for {results.updates:,} updates in {results.spent_seconds:,.0f} s.")
    if any(row.milliseconds for row in results.rows):
        where = "{cpu}, {threads} of {cores} cores, load {load:.1f}".format(**results.environment)
        said.append(
            f"Milliseconds a call of {results.shape}, from ids to hidden states, in one run on {where}: medians and quartiles "
            "of blocks that take turns; ratios are those of neighbouring blocks."
        )
    return [*said, *results.notes]


def markdown(results: CompressResults) -> str:
    """Return `report.md`."""
    head, rows = table(results)
    text = "\n".join(lines(results))
    shapes = "\n".join(f"- {row.name}: {row.architecture}" for row in results.rows)
    return f"# {results.method}: {results.model}\n\n{text}\n\n{markdown_grid(head, rows, range(1, len(head)))}\n\n{shapes}\n"


def html_page(folder: Path, results: CompressResults) -> str:
    """Return `report.html`, with the loss of the tuning that `metrics.jsonl` of the folder holds."""
    head, rows = table(results)
    said = "".join(f"<p>{html.escape(line)}</p>" for line in lines(results))
    shapes = grid([], ([row.name, row.architecture] for row in results.rows))
    body = f"""{said}{grid(head, rows, range(1, len(head)))}{_points_picture(results)}{_neurons_picture(results)}{shapes}
{_loss_picture(folder)}
<h2>Environment</h2>{facts(results.environment)}
<h2>Options</h2><pre>{html.escape(to_json_text(results.options, indent=2))}</pre>"""
    return page(f"{results.method}: {results.model}", body)


def _points_picture(results: CompressResults) -> str:
    """Draw what was lost against milliseconds, a line of points for each type of weights; nothing without both."""
    rows = [row for row in results.rows if row.milliseconds and row.lost is not None]
    if len(rows) < 2:
        return ""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    for dtype in rows[0].milliseconds:
        points = [(row.milliseconds[dtype][1], row.lost or 0.0, row.name) for row in rows if dtype in row.milliseconds]
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=dtype)
        for x, y, name in points:
            axis.annotate(name, (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
    axis.set_xlabel(f"milliseconds a call of {results.shape}")
    axis.set_ylabel(f"lost, {results.unit}")
    axis.legend(frameon=False)
    return svg(figure)


def _neurons_picture(results: CompressResults) -> str:
    """Draw what was lost against the neurons that a token uses, a line for each family of children; nothing without families.

    Children of a family are called after it and their neurons: `tree_64`, `tree_128`.
    """
    families: dict[str, list[Row]] = {}
    for row in results.rows:
        name, _, number = row.name.rpartition("_")
        if row.lost is not None and number.isdecimal():
            families.setdefault(name, []).append(row)
    if not any(len(rows) > 1 for rows in families.values()):
        return ""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, rows in families.items():
        points = sorted((row.neurons, row.lost or 0.0) for row in rows)
        axis.plot([x for x, _ in points], [y for _, y in points], "o-", label=name)
    for lost in (row.lost for row in results.rows if row.name == "none" and row.lost is not None):
        axis.axhline(lost, lw=1, ls=":", color="gray", label="no feedforward")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("feedforward neurons that a token uses in a layer")
    axis.set_ylabel(f"lost, {results.unit}")
    axis.legend(frameon=False)
    return svg(figure)


@dataclass(frozen=True)
class _Update:
    step: Count
    loss: float


def _loss_picture(folder: Path) -> str:
    """Draw the loss of the tuning; nothing without one."""
    updates = list(read_lines(folder / "metrics.jsonl", _Update))
    if len(updates) < 2:
        return ""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.2), layout="constrained")
    axis = figure.subplots()
    kept = updates[:: max(1, len(updates) // 1000)]
    axis.plot([update.step for update in kept], [update.loss for update in kept], lw=1)
    axis.set_xlabel("update")
    axis.set_ylabel("loss of the tuning")
    return svg(figure)

"""What a compression began with and what came of it: the formats `config.json` and `compress.json`, and their pages."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ufbert.errors import UserError
from ufbert.report.page import Dot, Line, LineChart, Page, Scatter, Section, Table, html, markdown
from ufbert.runtime.files import to_json_text, write_json, write_text
from ufbert.runtime.typed import Count, read_lines, read_typed

FORMAT, FORMAT_VERSION = "ufbert-compress", 1
CONFIG_FILE, RESULTS_FILE = "config.json", "compress.json"
RUN_FORMAT: Literal["ufbert-compress-run"] = "ufbert-compress-run"
Spread = tuple[float, float, float]
"""Lower quartile, median and upper quartile."""


@dataclass(frozen=True)
class CompressFile:
    """`config.json` of an output folder: what the compression began with."""

    format: Literal["ufbert-compress-run"]
    format_version: Literal[1]
    options: dict[str, Any]
    sha256: str
    """Of the model's files."""


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
    timed = any(row.milliseconds for row in results.rows)
    known = {"cpu", "cores", "threads", "load"} <= results.environment.keys()
    scored = any(row.lost is not None for row in results.rows)
    if len(results.rows) < 2 or (timed and not known) or (scored and not results.metrics):
        raise UserError(f"{folder / RESULTS_FILE} is damaged: it does not say what was compared.")
    return results


def write_results(folder: Path, results: CompressResults) -> str:
    """Write `compress.json`, `report.md`, whose text is returned, and `report.html`. Raises UserError if the disk refuses."""
    write_json(folder / RESULTS_FILE, asdict(results))
    page = report_page(folder, results)
    text = markdown(page)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", html(page))
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


def page_of(folder: Path) -> Page:
    """Return the page of a compression, at work or dead ones too. Raises UserError if its files are damaged."""
    if (folder / RESULTS_FILE).is_file():
        return report_page(folder, read_results(folder))
    begun = read_typed(folder / CONFIG_FILE, CompressFile)
    updates = len(list(read_lines(folder / "metrics.jsonl", _Update)))
    left = "it is at work, or the same command with --resume goes on with it"
    return Page(
        title=f"{begun.options.get('method', 'compress')}: {begun.options.get('folder', folder.name)}",
        verdict=f"Not finished: {updates:,} updates of the tuning so far; {left}.",
        sections=[Section("Tuning", list(filter(None, [_tuning(folder)])))],
        facts={},
        configuration=to_json_text(begun.options, indent=2),
    )


def report_page(folder: Path, results: CompressResults) -> Page:
    """Return the page of a compression, with the loss of the tuning that `metrics.jsonl` of the folder holds."""
    head, rows = table(results)
    said = lines(results)
    shapes = Table(["model", "architecture"], [[row.name, row.architecture] for row in results.rows])
    pictures = [_against_milliseconds(results), _against_neurons(results), _tuning(folder)]
    parts = [*said[1:], Table(head, rows, numbers=range(1, len(head))), *filter(None, pictures), shapes]
    return Page(
        title=f"{results.method}: {results.model}",
        verdict=verdict(results),
        sections=[Section("What it lost", parts)],
        facts=results.environment,
        configuration=to_json_text(results.options, indent=2),
    )


def verdict(results: CompressResults) -> str:
    """Return how the child in OUT/model compares with the model before, and what controls of as many neurons lost."""
    first, child, *others = results.rows
    size = f"{child.bytes / max(1, first.bytes):.2f} of the bytes"
    speeds = [f"{faster[1]:.2f} times as fast in {name}" for name, faster in child.faster.items()]
    parts = [size, *speeds]
    if child.lost is not None:
        parts.append(f"{_change(results, child.lost)} of {results.metrics[0]}")
    said = f"{child.name}, against the model before: {', '.join(parts)}."
    controls = [
        f"{row.name} {_change(results, row.lost)}" for row in others
        if row.lost is not None and row.name.rpartition("_")[2] in (child.name.rpartition("_")[2], "none")
    ]  # fmt: skip
    return f"{said} Beside it, {', '.join(controls)}." if controls else said


def _change(results: CompressResults, lost: float) -> str:
    change = "loses" if lost > 0 else "gains" if lost < 0 else "keeps its score:"
    return f"{change} {_lost(results, abs(lost)) if lost else '0'} {results.unit}"


def _against_milliseconds(results: CompressResults) -> Scatter | None:
    """Draw what was lost against milliseconds, for each type of weights; nothing without both."""
    rows = [row for row in results.rows if row.milliseconds and row.lost is not None]
    if len(rows) < 2:
        return None
    types = list(dict.fromkeys(dtype for row in rows for dtype in row.milliseconds))
    dots = [
        Dot(f"{row.name}, {dtype}" if len(types) > 1 else row.name, row.milliseconds[dtype][1], row.lost or 0.0)
        for row in rows
        for dtype in row.milliseconds
    ]
    x = f"milliseconds a call of {results.shape}"
    return Scatter("Lost against time", x, f"lost, {results.unit}", dots, frontier="lower")


def _against_neurons(results: CompressResults) -> LineChart | None:
    """Draw what was lost against the neurons that a token uses, a line for each family of children; nothing without families.

    Children of a family are called after it and their neurons: `tree_64`, `tree_128`.
    """
    families: dict[str, list[Row]] = {}
    for row in results.rows:
        name, _, number = row.name.rpartition("_")
        if row.lost is not None and number.isdecimal():
            families.setdefault(name, []).append(row)
    if not any(len(rows) > 1 for rows in families.values()):
        return None
    drawn = [
        Line(name, sorted((row.neurons, row.lost or 0.0) for row in rows), dots=True) for name, rows in families.items()
    ]
    without = [row.lost for row in results.rows if row.name == "none" and row.lost is not None]
    levels = {"no feedforward": without[0]} if without else {}
    x = "feedforward neurons that a token uses in a layer"
    return LineChart("Lost against neurons used", x, f"lost, {results.unit}", drawn, levels, log_x=True)


@dataclass(frozen=True)
class _Update:
    step: Count
    loss: float


def _tuning(folder: Path) -> LineChart | None:
    """Draw the loss of the tuning; nothing without one."""
    updates = list(read_lines(folder / "metrics.jsonl", _Update))
    if len(updates) < 2:
        return None
    return LineChart("Loss of the tuning", "update", "loss", [Line("loss", [(u.step, u.loss) for u in updates])])

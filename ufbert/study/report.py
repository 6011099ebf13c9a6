"""The tables and the page of a study, of whatever is finished."""

import html
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ufbert.report.plain import facts, grid, markdown_grid, page, svg
from ufbert.runtime.files import write_json, write_text
from ufbert.study.cells import StudyFile
from ufbert.study.results import Results, Row, Spread, results_of


def write_results(folder: Path, study: StudyFile) -> Results:
    """Write results.json, results.md and report.html into a study's folder, and return what they hold.

    Raises UserError if a file of a finished cell is damaged, or if the disk refuses.
    """
    results = results_of(folder, study)
    write_json(folder / "results.json", _to_json(results))
    head, rows = _table(results)
    numbers = range(1, len(head))
    curve_head, curve_rows = _curve_table(results)
    notes = [*results.notes, *_missing(results)]
    lines = [f"# {_title(study)}", "", markdown_grid(head, rows, numbers), "", *(f"- {note}" for note in notes)]
    if curve_rows:
        lines += ["", "Held-out loss by tokens:", "", markdown_grid(curve_head, curve_rows, range(1, len(curve_head)))]
    write_text(folder / "results.md", "\n".join(lines) + "\n")
    write_text(folder / "report.html", page(_title(study), _body(results, notes)))
    return results


def show_results(results: Results) -> None:
    """Print the table, no wider than a terminal of 80 columns, and the notes."""
    console = Console(highlight=False, soft_wrap=False)
    table = Table(title=escape(_title(results.study)), title_justify="left", box=None, pad_edge=False)
    columns: dict[str, Callable[[Row], str]] = {
        "variant": lambda row: row.variant + ("" if row.rate is None else f" @{row.rate:g}"),
        "loss": lambda row: _spread(row.loss, ".3f"),
        f"less {results.study.baseline}": lambda row: _spread(row.difference, "+.3f"),
        "gap closed": lambda row: _spread(row.gap_closed, ".2f"),
        "neurons": lambda row: f"{row.neurons_used:,}/{row.neurons:,}",
        "M tokens": lambda row: f"{row.tokens / 1e6:,.2f}",
        "s": lambda row: f"{row.seconds:,.0f}",
    }
    if not any(row.gap_closed for row in results.rows):
        del columns["gap closed"]
    for name in columns:
        table.add_column(name, justify="left" if name == "variant" else "right", overflow="fold")
    for row in results.rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)
    for note in (*results.notes, *_missing(results)):
        console.print(f"- {note}", markup=False)


def _title(study: StudyFile) -> str:
    budget = f"{study.tokens / 1e6:g} M tokens" if study.tokens else study.budget
    return f"{len(study.variants)} variants, {budget} each, {study.corpus}"


def _spread(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:{form}}" + ("" if spread.deviation is None else f" ± {spread.deviation:{form.lstrip('+')}}")


def _missing(results: Results) -> list[str]:
    """Name what is not in the table."""
    notes = [f"FAILED {cell}: {reason}" for cell, reason in results.failed.items()]
    return [*notes, f"not run yet: {', '.join(results.waiting)}"] if results.waiting else notes


def _table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the full table."""
    columns: dict[str, Callable[[Row], str]] = {
        "variant": lambda row: row.variant,
        "held-out loss, nats": lambda row: _spread(row.loss, ".4f"),
        f"difference to {results.study.baseline}": lambda row: _spread(row.difference, "+.4f"),
        "share of the gap closed": lambda row: _spread(row.gap_closed, ".3f"),
        "seeds": lambda row: str(row.loss.n),
        "rate": lambda row: "its own" if row.rate is None else f"{row.rate:g}",
        "M tokens": lambda row: f"{row.tokens / 1e6:,.2f}",
        "seconds": lambda row: f"{row.seconds:,.1f}",
        "neurons used": lambda row: f"{row.neurons_used:,}",
        "neurons": lambda row: f"{row.neurons:,}",
        "MFLOP per token": lambda row: f"{row.flops_per_token / 1e6:,.2f}",
        "parameters": lambda row: f"{row.parameters:,}",
    }
    if not any(row.gap_closed for row in results.rows):
        del columns["share of the gap closed"]
    return list(columns), [[cell(row) for cell in columns.values()] for row in results.rows]


def _curve_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the losses at equal numbers of tokens."""
    marks = sorted({mark for row in results.rows for mark in row.at_tokens}, key=float)
    head = ["variant", *(f"{float(mark) / 1e6:g} M" for mark in marks)]
    rows = [
        [row.variant, *(f"{row.at_tokens[m]:.4f}" if m in row.at_tokens else "-" for m in marks)]
        for row in results.rows
    ]
    return head, rows if marks else []


def _to_json(results: Results) -> dict[str, Any]:
    rows = []
    for row in results.rows:
        values = asdict(row)
        for name in ("loss", "difference", "gap_closed"):
            spread = getattr(row, name)
            values[name] = spread and spread._asdict()
        rows.append({**values, "curve": [point._asdict() for point in row.curve]})
    return {**results._asdict(), "study": asdict(results.study), "rows": rows}


def _body(results: Results, notes: Sequence[str]) -> str:
    head, rows = _table(results)
    curve_head, curve_rows = _curve_table(results)
    study = results.study
    protocol = {
        "corpus": study.corpus, "held-out text": study.heldout or "a part of the corpus",
        "tokenizer": study.tokenizer or "trained",
        "tokens of the corpus, at most": study.max_tokens, "seeds": ", ".join(map(str, study.seeds)),
    }  # fmt: skip
    asked = [[row.variant, " ".join(row.options)] for row in results.rows]
    rates = [[row.variant, ", ".join(f"{r}: {loss:.4f}" for r, loss in row.rates.items())] for row in results.rows]
    parts = [
        grid(head, rows, range(1, len(head))),
        "".join(f"<p>{html.escape(note)}.</p>" for note in notes),
        *([_pictures(results.rows)] if results.rows else []),
        *(
            [f"<h2>Held-out loss by tokens</h2>{grid(curve_head, curve_rows, range(1, len(curve_head)))}"]
            if curve_rows
            else []
        ),
        "<p>Interpolated between the evaluations of each run, linearly in the logarithm of tokens; means over seeds.</p>",
        *([f"<h2>Learning rates</h2>{grid(['variant', 'loss of the first seed'], rates)}"] if study.rates else []),
        f"<h2>Protocol</h2>{facts(protocol)}<h2>Variants</h2>{grid(['variant', 'options'], asked)}",
    ]
    return "\n".join(parts)


def _pictures(rows: Sequence[Row]) -> str:
    """Draw the held-out loss against tokens, seconds and neurons used."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 9.6), layout="constrained")
    by_tokens, by_seconds, by_neurons = figure.subplots(3, 1)
    for row in rows:
        curve = [point for point in row.curve if point.tokens > 0]
        by_tokens.plot([p.tokens / 1e6 for p in curve], [p.loss for p in curve], "o-", ms=3, lw=1, label=row.variant)
        by_seconds.plot([p.seconds for p in curve], [p.loss for p in curve], "o-", ms=3, lw=1)
        by_neurons.errorbar(max(row.neurons_used, 1), row.loss.mean, yerr=row.loss.deviation or 0.0, fmt="o", capsize=3)
        by_neurons.annotate(
            row.variant, (max(row.neurons_used, 1), row.loss.mean), xytext=(5, 3), textcoords="offset points"
        )
    by_tokens.set_xlabel("M tokens")
    by_seconds.set_xlabel("seconds of the budget")
    by_neurons.set_xlabel("feedforward neurons that a token uses")
    by_neurons.set_xscale("log")
    by_neurons.margins(0.15)
    for axis in figure.axes:
        axis.set_ylabel("held-out loss, nats")
    by_tokens.legend(frameon=False)
    return svg(figure)

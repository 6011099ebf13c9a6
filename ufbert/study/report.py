"""The tables and the page of a study, of whatever is finished."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console
from rich.markup import escape

from ufbert.report.charts import Dot, Line, LineChart, Scatter
from ufbert.report.page import Bullets, Page, Section, Table, html, markdown_grid
from ufbert.report.run_report import guess_words, time_unit
from ufbert.runtime.files import to_json_text, write_json, write_text
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
    write_text(folder / "report.html", html(study_page(results)))
    return results


def show_results(results: Results) -> None:
    """Print the table, no wider than a terminal of 80 columns, and the notes."""
    console = Console(highlight=False, soft_wrap=False)
    table = rich.table.Table(title=escape(_title(results.study)), title_justify="left", box=None, pad_edge=False)
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


def study_page(results: Results) -> Page:
    """Return the page of a study."""
    study, rows = results.study, results.rows
    head, table = _table(results)
    best = min(range(len(rows)), key=lambda i: rows[i].loss.mean, default=-1)
    notes = [f"{note}." for note in [*results.notes, *_missing(results)]]
    curve_head, curve_rows = _curve_table(results)
    asked = [[row.variant, " ".join(row.options)] for row in rows]
    rates = [[row.variant, ", ".join(f"{r}: {loss:.4f}" for r, loss in row.rates.items())] for row in rows]
    numbers = range(1, len(head))
    sections = [
        Section("Results", [Table(head, table, numbers, strong_rows=[best]), Bullets(notes)]) if rows else None,
        Section("Not there yet", [Bullets(notes)]) if notes and not rows else None,
        Section("Curves", _pictures(rows)) if rows else None,
        Section("Held-out loss by tokens", [_CURVES, Table(curve_head, curve_rows, range(1, len(curve_head)))])
        if curve_rows
        else None,
        Section("Learning rates", [Table(["variant", "loss of the first seed"], rates)]) if study.rates else None,
        Section("Variants", [Table(["variant", "options"], asked)]) if asked else None,
    ]
    return Page(
        title=_title(study),
        verdict=" ".join(_verdict(results)),
        sections=[section for section in sections if section],
        samples=_samples(rows),
        facts=_facts(results),
        configuration=to_json_text(asdict(study), indent=2),
    )


_CURVES = "Interpolated between the evaluations of each run, linearly in the logarithm of tokens; means over seeds."


def _verdict(results: Results) -> list[str]:
    """Say in plain sentences which variant is ahead, by how much, and what is missing."""
    rows, baseline = results.rows, results.study.baseline
    if not rows:
        texts = ["No cell is finished yet."]
    else:
        best = min(rows, key=lambda row: row.loss.mean)
        rank = "the lowest held-out loss" if len(rows) > 1 else "a held-out loss, the only one so far"
        texts = [f"{best.variant} has {rank}: {_spread(best.loss, '.3f')} nats a masked token."]
    for row in rows:
        if row.difference is None:
            continue
        gap, error = row.difference.mean, 2.0 * (row.difference.deviation or 0.0) / math.sqrt(row.difference.n)
        side = "above" if gap > 0 else "below"
        doubt = " (one seed, so that the spread is not known)" if row.difference.n == 1 else ""
        if row.difference.n > 1 and abs(gap) <= error:
            doubt = " (within two standard errors: not to be told apart)"
        texts.append(f"{row.variant} is {abs(gap):.3f} {side} {baseline}{doubt}.")
    if results.failed:
        texts.append(f"Failed: {', '.join(results.failed)}.")
    if results.waiting:
        texts.append(f"Not run yet: {', '.join(results.waiting)}.")
    return texts


def _facts(results: Results) -> dict[str, Any]:
    """Return how the study came about: a command that is the same study, commits, processors and load."""
    study, rows = results.study, results.rows
    budget = f"--tokens={study.tokens:g}" if study.tokens else f"--budget={study.budget}"
    ends = [
        f"--{name.replace('_', '-')}={getattr(study, name)}" for name in ("heldout", "tokenizer", "gap_from", "gap_to")
    ]
    words = ["ufbert", "study", f"--corpus={study.corpus}", budget, f"--seeds={','.join(map(str, study.seeds))}"]
    words += [f"--rates={','.join(f'{rate:g}' for rate in study.rates)}"] if study.rates else []
    words += [f"--baseline={study.baseline}", *(word for word in ends if not word.endswith("="))]
    words += [f"{name}: {shlex.join(variant.asked)}" for name, variant in study.variants.items()]
    loads = [load for row in rows for load in row.loads]
    return {
        "command": shlex.join(words),
        "commit": ", ".join(sorted({c for row in rows for c in row.commits})) or "not recorded",
        "processor": "; ".join(sorted({c for row in rows for c in row.cpus})) or "not recorded",
        "load": f"{min(loads):.2f} to {max(loads):.2f} before the cells" if loads else "not recorded",
        "measured beside other work": ", ".join(name for row in rows for name in row.beside_other_work) or "no cell",
        "corpus": study.corpus,
        "held-out text": study.heldout or "a part of the corpus",
        "tokenizer": study.tokenizer or "trained",
        "tokens of the corpus, at most": study.max_tokens,
        "seeds": ", ".join(map(str, study.seeds)),
    }


def _samples(rows: Sequence[Row]) -> list[Any]:
    """Tabulate the first guess of each variant at the same masked tokens of held-out text."""
    guesses: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        for sample in row.samples:
            words = guess_words(sample.guesses[0]) if sample.guesses else "-"
            guesses.setdefault((sample.text, sample.token), {})[row.variant] = words
    if not guesses:
        return []
    names = [row.variant for row in rows if row.samples]
    table = [[text, token, *(own.get(name, "-") for name in names)] for (text, token), own in guesses.items()]
    about = "The likeliest word piece for [MASK] in held-out text, by the first seed's model of each variant."
    return [about, Table(["held-out text", "stood there", *names], table)]


def _pictures(rows: Sequence[Row]) -> list[LineChart | Scatter]:
    """Draw the held-out loss against tokens, seconds and neurons used."""
    curves = {row.variant: [point for point in row.curve if point.tokens > 0] for row in rows}
    unit, factor = time_unit(max(row.seconds for row in rows))
    by_tokens = [Line(name, [(p.tokens / 1e6, p.loss) for p in curve], dots=True) for name, curve in curves.items()]
    by_time = [Line(name, [(p.seconds / factor, p.loss) for p in curve], dots=True) for name, curve in curves.items()]
    dots = [Dot(row.variant, max(row.neurons_used, 1), row.loss.mean, y_interval=_interval(row.loss)) for row in rows]
    y = "held-out loss, nats"
    x = "feedforward neurons that a token uses"
    return [
        LineChart("Held-out loss against tokens", "M tokens", y, by_tokens),
        LineChart("Held-out loss against time", f"{unit} of the budget", y, by_time),
        *(
            [Scatter("Held-out loss against neurons used", x, y, dots, frontier="lower", log_x=True)]
            if len(rows) > 1
            else []
        ),
    ]


def _interval(spread: Spread) -> tuple[float, float] | None:
    if spread.deviation is None:
        return None
    return spread.mean - spread.deviation, spread.mean + spread.deviation

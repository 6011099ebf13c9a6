"""`report.html` of a pretraining run, at any time: finished, at work, stopped or dead."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ufbert.report.charts import Line, LineChart
from ufbert.report.page import Page, Section, Table, html, number
from ufbert.report.run_records import RunRecords, read_records_of
from ufbert.runtime.files import to_json_text, write_text
from ufbert.runtime.machine import PROVENANCE
from ufbert.runtime.run_folder import Guess, Sample

SMALL_GAIN = 0.1
"""Nats better than word frequency, up to which a model has learnt next to nothing."""


def write_report(folder: Path, ending: str = "", at_work: bool = False) -> Path:
    """Draw a run folder's page into its `report.html`, whole or not at all, and return the path.

    A run without a summary has ended with `ending`, a sentence, or is `at_work`; else its lock tells. Raises UserError for a
    damaged folder, or if the disk refuses.
    """
    path = folder / "report.html"
    write_text(path, html(run_page(read_records_of(folder, ending, at_work))))
    return path


def run_page(run: RunRecords) -> Page:
    """Return the page of a run."""
    sections = [
        Section("Loss", [_loss_chart(run)]) if run.steps or run.evaluations else None,
        Section("Speed, learning rate and gradients", _speed_charts(run)) if run.steps else None,
        _usage(run),
        _events(run),
        Section("All results", [_results(run)], folded=True) if run.summary else None,
        Section("Every held-out evaluation", [_evaluations(run)], folded=True) if run.evaluations else None,
    ]
    return Page(
        title=f"{run.architecture}, {run.config.budget} ({run.origin})",
        verdict=" ".join(verdict(run)),
        sections=[section for section in sections if section],
        samples=_samples(run.samples),
        facts=run_facts(run),
        configuration=to_json_text(asdict(run.config), indent=2),
    )


def verdict(run: RunRecords) -> list[str]:
    """Say in plain sentences how a run stands, or has ended, and what its model can do."""
    return [_state(run), *([_quality(run)] if run.heldout_loss is not None else []), *_troubles(run)]


def _state(run: RunRecords) -> str:
    read = f"{run.tokens / 1e6:,.2f} M tokens in {duration(run.spent)}"
    if run.summary:
        return f"The run is finished: {run.summary.steps:,} updates on {read}."
    if run.state == "ended":
        return f"The run has ended without a model: {run.ending.rstrip('.')}."
    share = f"{run.fraction:.0%} of its budget of {run.config.budget}"
    if run.state == "running":
        return f"The run is running, as of step {run.step:,}: {share} is spent, on {read}."
    return (
        f"The run has stopped at step {run.step:,} without a word, killed perhaps, when {share} was spent, on {read}. "
        f"`ufbert train --resume --out={run.folder}` goes on with it."
    )


def _quality(run: RunRecords) -> str:
    """Say what the loss means."""
    loss, summary = run.heldout_loss, run.summary
    text = f"Its held-out loss is {loss:.3f} nats a masked token"
    if summary is None:
        return (
            f"{text}, as of the last evaluation, where it guesses {run.evaluations[-1].heldout_accuracy:.1%} of them."
        )
    gain = summary.unigram_loss - summary.heldout_loss
    if run.evaluations and run.evaluations[-1].heldout_loss == loss:  # else it is that of averaged weights
        text += f", where it guesses {run.evaluations[-1].heldout_accuracy:.1%} of them"
    text += f"; guessing by word frequency alone has {summary.unigram_loss:.3f}, "
    if gain <= SMALL_GAIN:
        text += "so the model has learnt next to nothing beyond that"
    else:
        text += f"so the model has learnt {gain:.3f} nats beyond that"
    if summary.started_heldout_loss is not None:
        text += f"; the model that it started from has {summary.started_heldout_loss:.3f}"
    return text + "."


def _troubles(run: RunRecords) -> list[str]:
    """Say what a reader must know before believing the numbers."""
    texts, usage = [], (run.evaluations[-1].usage or {}) if run.evaluations else {}
    dead: dict[str, float] = {}
    for shares in usage.values():
        for name, count in shares.items():
            if "dead" in name and count:
                parts = name.replace("dead", "").strip("_")
                dead[parts] = dead.get(parts, 0.0) + count
    if dead:
        parts = " and ".join(f"{count:,.0f} {name}" for name, count in dead.items())
        texts.append(f"No held-out token reaches {parts}, which are dead weight.")
    if run.summary and run.summary.skipped_updates:
        texts.append(f"{run.summary.skipped_updates:,} updates were skipped, since their numbers were not finite.")
    if run.damaged:
        texts.append(f"Damaged lines of metrics.jsonl, left out: {run.damaged:,}.")
    return texts


def run_facts(run: RunRecords) -> dict[str, Any]:
    """Return how a run came about: command, commit, processor and load first."""
    config, environment = run.config, run.config.environment
    facts: dict[str, Any] = {name: environment.get(name, "not recorded") for name in PROVENANCE}
    if run.summary:
        facts["device"] = f"{run.summary.devices} x {run.summary.device}"
    facts |= {
        "started": _moment(config.started_at),
        "drawn": _moment(datetime.now(UTC).timestamp()),
        "corpus": config.corpus,
        "budget": config.budget,
        "preset": f"{config.config} at scale {config.scale}, recipe {config.recipe}",
        "seed": config.seed,
    }
    if config.started_from:
        facts["started from"] = config.started_from
    if config.price:
        hours = run.spent / 3600
        cost = f"{hours * config.price:,.2f} in all"
        facts["cost"] = f"{hours:,.2f} hours of the budget at {config.price:,.2f} an hour, {cost}"
    return facts | {name: value for name, value in environment.items() if name not in PROVENANCE}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """Write a time in its natural unit."""
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _results(run: RunRecords) -> Table:
    """Tabulate the summary, large numbers in units that people read."""
    assert run.summary is not None
    values = run.summary.to_json()
    for name, unit, factor in (
        ("flops_per_token", "MFLOP per token", 1e6),
        ("peak_flops", "peak of the device, TFLOP/s", 1e12),
        ("memory_bytes", "memory, GB", 1e9),
    ):
        if values.get(name):
            values[unit] = float(values.pop(name)) / factor
    return Table(["quantity", "value"], [[name.replace("_", " "), number(value)] for name, value in values.items()])


def _loss_chart(run: RunRecords) -> LineChart:
    unit, factor = time_unit(run.spent)
    training = list(zip([r.spent / factor for r in run.steps], _smoothed([r.loss for r in run.steps]), strict=True))
    heldout = [(e.spent / factor, e.heldout_loss) for e in run.evaluations]
    lines = [Line("training, smoothed", training, faint=True), Line("held-out", heldout, dots=True)]
    levels = {"word frequency alone": run.summary.unigram_loss} if run.summary else {}
    title, x = "Masked-LM loss", f"{unit} of the budget"
    return LineChart(title, x, "nats a masked token", lines, levels=levels, top=loss_top([run]))


def loss_top(runs: Sequence[RunRecords]) -> float | None:
    """Return the loss at which a chart ends, so that what counts has room: that of word frequency, or of a worse model.

    None before a run is finished.
    """
    levels = [run.summary.unigram_loss for run in runs if run.summary]
    last = [loss for run in runs if (loss := run.heldout_loss) is not None]
    return 1.03 * max(*levels, *last) if levels else None


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which a time is read, and its seconds."""
    if seconds < 600:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 7200 else ("hours", 3600.0)


def _smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """Compute the exponential moving average, corrected for its start as in Adam."""
    total, norm, out = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def _speed_charts(run: RunRecords) -> list[LineChart]:
    unit, factor = time_unit(run.spent)
    at = [r.spent / factor for r in run.steps]

    def chart(title: str, y: str, values: list[float], colour: int, log: bool = False, zero: bool = False) -> LineChart:
        line = Line(y, list(zip(at, values, strict=True)), colour=colour)
        return LineChart(title, f"{unit} of the budget", y, [line], log_y=log, from_zero=zero)

    speed, norm = ([getattr(r, name) for r in run.steps] for name in ("tokens_per_second", "gradient_norm"))
    return [
        chart("Learning rate", "learning rate", [r.lr for r in run.steps], 2),
        chart("Speed, smoothed", "tokens per second", _smoothed(speed), 3, zero=True),
        chart("Gradients, smoothed", "gradient norm", _smoothed(norm), 4, log=True),
    ]


def _usage(run: RunRecords) -> Section | None:
    """Tabulate the shares of each layer's nodes, leaves or experts in use; None for dense models."""
    usage = run.evaluations[-1].usage if run.evaluations else None
    if not usage:
        return None
    names = list(dict.fromkeys(name for shares in usage.values() for name in shares))
    rows = [[layer, *(_share(name, shares.get(name)) for name in names)] for layer, shares in usage.items()]
    head = ["layer", *(name.replace("_", " ") for name in names)]
    return Section("In use on held-out text", [Table(head, rows, numbers=range(1, len(head)))])


def _share(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if "dead" in name else f"{value:.3f}"  # a number of parts, or a share of them


def _events(run: RunRecords) -> Section | None:
    """Tabulate what interrupted the run, and what it cost."""
    rows = []
    for event in run.events:
        cost = [f"{k.replace('_', ' ')} {number(v)}" for k, v in event.items() if k not in ("step", "event")]
        rows.append([number(event.get("step")), str(event["event"]), ", ".join(cost)])
    return Section("Events", [Table(["step", "event", "details"], rows)]) if rows else None


def _evaluations(run: RunRecords) -> Table:
    rows = [
        [
            f"{r.step:,}",
            f"{r.spent:.1f}",
            f"{r.tokens / 1e6:,.2f}",
            f"{r.heldout_loss:.4f}",
            f"{r.heldout_accuracy:.2%}",
        ]
        for r in run.evaluations
    ]
    return Table(["step", "seconds", "M tokens", "loss, nats", "accuracy"], rows, numbers=range(5))


def guess_words(guess: Guess) -> str:
    """Write a guess and its probability, a mark in quotes."""
    word = guess.token if guess.token.isalnum() else f'"{guess.token}"'
    return f"{word} {guess.probability:.0%}"


def _samples(samples: list[Sample]) -> list[Any]:
    """Tabulate what the model takes for likely at masked tokens of held-out text."""
    if not samples:
        return []
    rows = [[s.text, s.token, ", ".join(map(guess_words, s.guesses))] for s in samples]
    about = "The trained model's likeliest word pieces for [MASK], in text that it has not seen."
    return [about, Table(["held-out text", "stood there", "guesses"], rows)]

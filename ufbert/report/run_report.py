"""Write `report.html` of a pretraining run, a self-contained page with its curves."""

import html
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ufbert.report.plain import facts, grid, number, page, svg
from ufbert.runtime.files import to_json_text, write_text
from ufbert.runtime.metrics import EvaluationRecord, StepRecord
from ufbert.runtime.run_folder import SUMMARY_FILE, RunFile, read_run, read_summary
from ufbert.runtime.typed import read_lines


def write_report(folder: Path, ending: str = "") -> Path:
    """Draw the curves of a run folder into `report.html`, whole or not at all, and return its path.

    A run without a summary is running, or has ended with `ending`, a sentence. Raises UserError if the disk refuses.
    """
    config, metrics = read_run(folder), folder / "metrics.jsonl"
    summary = read_summary(folder) if (folder / SUMMARY_FILE).exists() and not ending else None
    steps = [step for step in read_lines(metrics, StepRecord) if not step.skipped]
    evals = list(read_lines(metrics, EvaluationRecord))
    events = [r for r in read_lines(metrics, dict[str, str | float | None]) if "event" in r]
    spent = max([summary.spent_seconds] if summary else [r.spent for r in (*steps[-1:], *evals[-1:])], default=0.0)
    unigram = summary.unigram_loss if summary else None
    pictures = [_loss_picture(steps, evals, unigram), _speed_picture(steps)] if steps else []
    bill = f"{spent / 3600:,.2f} hours of the budget at {config.price:,.2f} an hour, {spent / 3600 * config.price:,.2f} in all"
    cost = f"<p>Cost: {bill}.</p>" if config.price else ""
    body = f"""{facts(_in_units(summary.to_json())) if summary else _standing(config, steps, evals, spent, ending)}
{cost}
{"".join(pictures)}
{_events(events)}
<h2>Held-out evaluations</h2>{_evaluations(evals)}
{_usage(evals)}
<h2>Environment</h2>{facts(config.environment)}
<h2>Configuration</h2><pre>{html.escape(to_json_text(asdict(config), indent=2))}</pre>"""
    path = folder / "report.html"
    origin = f"from {config.init_from}" if config.init_from else f"{config.config} at scale {config.scale}"
    title = f"{origin}, {config.budget}: {config.run.model.architecture()}"
    write_text(path, page(title, body))
    return path


def _standing(
    config: RunFile, steps: list[StepRecord], evals: list[EvaluationRecord], spent: float, ending: str
) -> str:
    """Write the state of a run that has no summary (yet)."""
    last = max((r.step for r in (*steps[-1:], *evals[-1:])), default=0)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    state = ending or f"running, as of step {last:,}"
    values: dict[str, Any] = {"state": state, "drawn": now, "spent seconds": spent}
    if config.started_from:
        values |= {"started from": config.started_from}
    if evals:
        values |= {"held-out loss": evals[-1].heldout_loss, "tokens": evals[-1].tokens}
    return facts(values)


def _in_units(summary: dict[str, Any]) -> dict[str, Any]:
    """Convert the large numbers of a summary to units that people read."""
    values = dict(summary)
    for name, unit, factor in (
        ("flops_per_token", "MFLOP per token", 1e6),
        ("peak_flops", "peak of the device, TFLOP/s", 1e12),
        ("memory_bytes", "memory, GB", 1e9),
    ):
        if values.get(name):
            values[unit] = float(values.pop(name)) / factor
    return values


def _events(events: list[dict[str, str | float | None]]) -> str:
    """Write a table of the events that interrupted the run, with their cost."""
    if not events:
        return ""
    rows = []
    for r in events:
        cost = [f"{k.replace('_', ' ')} {number(v)}" for k, v in r.items() if k not in ("step", "event")]
        rows.append([number(r.get("step")), str(r["event"]), ", ".join(cost)])
    return f"<h2>Events</h2>{grid(['step', 'event', ''], rows)}"


def _evaluations(evals: list[EvaluationRecord]) -> str:
    rows = [[f"{r.step:,}", f"{r.spent:.1f}", f"{r.heldout_loss:.4f}", f"{r.heldout_accuracy:.2%}"] for r in evals]
    return grid(["step", "seconds", "loss, nats", "accuracy"], rows, numbers=range(4))


def _usage(evals: list[EvaluationRecord]) -> str:
    """Write a table of the shares of each layer's nodes, leaves or experts in use; nothing for dense models."""
    usage = evals[-1].usage if evals else None
    if not usage:
        return ""
    names = list(dict.fromkeys(name for shares in usage.values() for name in shares))
    rows = [[layer, *(f"{shares.get(name, float('nan')):.3f}" for name in names)] for layer, shares in usage.items()]
    head = ["layer", *(name.replace("_", " ") for name in names)]
    return f"<h2>In use on held-out text</h2>{grid(head, rows, numbers=range(1, len(head)))}"


def _smoothed(values: list[float], weight: float = 0.95) -> list[float]:
    """Compute the exponential moving average, corrected for its start as in Adam."""
    total, norm, out = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def _axes(rows: int) -> Any:
    """Return the axes of a new figure, one below the other over the seconds of the budget."""
    import matplotlib.figure

    height = 3.2 * rows  # inches, as the margins are; matplotlib's own layout would double the time (0.66 s, not 0.30)
    figure = matplotlib.figure.Figure(figsize=(9, height))
    figure.subplots_adjust(left=0.13, right=0.99, bottom=0.5 / height, top=1 - 0.1 / height, hspace=0.06)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    axes[-1].set_xlabel("seconds of the budget")
    return axes


def _thin(values: list[Any], most: int = 2000) -> list[Any]:
    return values[:: max(1, len(values) // most)]


def _loss_picture(steps: list[StepRecord], evals: list[EvaluationRecord], unigram_loss: float | None) -> str:
    (axis,) = _axes(1)
    spent, smooth = [r.spent for r in steps], _smoothed([r.loss for r in steps])
    axis.plot(_thin(spent), _thin(smooth), color="tab:blue", lw=1, label="training (smoothed)")
    heldout = [r.heldout_loss for r in evals]
    axis.plot([r.spent for r in evals], heldout, "o-", color="tab:orange", label="held-out")
    if unigram_loss is not None:
        axis.axhline(unigram_loss, color="gray", ls="--", lw=1, label="word frequency alone")
    axis.set_ylabel("masked-LM loss, nats")
    axis.legend(frameon=False)
    return svg(axis.figure)


def _speed_picture(steps: list[StepRecord]) -> str:
    lr, speed, norm = _axes(3)
    spent = _thin([r.spent for r in steps])
    lr.plot(spent, _thin([r.lr for r in steps]), color="tab:green", lw=1)
    lr.set_ylabel("learning rate")
    speed.plot(spent, _thin(_smoothed([r.tokens_per_second for r in steps])), color="tab:purple", lw=1)
    speed.set_ylabel("tokens per second")
    speed.set_ylim(bottom=0)
    norm.plot(spent, _thin(_smoothed([r.gradient_norm for r in steps])), color="tab:red", lw=1)
    norm.set_ylabel("gradient norm")
    norm.set_yscale("log")
    return svg(lr.figure)

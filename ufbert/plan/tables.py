"""A plan as plain values, and as tables for a person."""

from typing import Any

from rich.console import Console
from rich.table import Table

from ufbert.config import RunConfig
from ufbert.cost.speeds import CPU_UTILISATION, Speeds
from ufbert.options.train import PlanOptions
from ufbert.plan.check import Check
from ufbert.plan.counts import RunCounts
from ufbert.plan.estimate import RunPlan, micro_batch_sizes
from ufbert.plan.prepare import Preparation
from ufbert.plan.target import Target
from ufbert.pretrain.budget import Budget


def plan_facts(
    options: PlanOptions, run: RunConfig, budget: Budget, target: Target, counts: RunCounts, speeds: Speeds, plan: RunPlan,
    preparation: Preparation, check: Check | None,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that is shown, as JSON values: seconds, bytes, tokens, FLOP."""
    hours = (budget.seconds or plan.seconds.total) / 3600
    peak = target.peaks.products(run.model.dtype) if target.peaks else speeds.products / CPU_UTILISATION
    activations = 1.0
    if target.shares:
        gathers = "tree" in run.model.feedforward and run.model.tree_backend == "gather"
        activations = target.shares.gathered if gathers else target.shares.memory
    return {
        "config": options.origin,
        "scale": options.scale,
        "architecture": run.model.architecture(),
        "device": target.name,
        "budget": options.budget,
        "backend": {"compiled_here": target.local, "dtype": run.model.dtype, "trees": run.model.tree_backend},
        **plan._asdict(),
        "updates": round(plan.updates),
        "seconds": {**plan.seconds._asdict(), "total": plan.seconds.total, "budget": budget.seconds},
        "passes": plan.tokens / options.corpus_tokens if options.corpus_tokens else None,
        "peak_flops": peak,
        "model_flops_utilisation": plan.flops_per_token * plan.tokens_per_second / peak,
        "speeds": speeds.source,
        "micro_rows": run.train.micro_rows,
        "memory": {str(rows): counts.memory(rows, activations) for rows in micro_batch_sizes(run)},
        "memory_compiled": sorted({rows for rows, _ in counts.gradient}),
        "usable_memory": target.memory,
        "state_bytes": counts.state_bytes,
        "hours": hours,
        "price": options.price or None,
        "money": hours * options.price if options.price else None,
        "preparation": preparation._asdict(),
        "evidence": target.evidence,
        "activations": activations,
        "shares": target.shares and target.shares._asdict(),
        "check": check and {**check._asdict(), "ratio": check.ratio, "within_25_percent": check.holds},
    }


def show_plan(facts: dict[str, Any]) -> None:
    """Print the facts."""
    console = Console(highlight=False, soft_wrap=False)
    console.print(_table("what the budget buys", _yield_rows(facts)))
    console.print(_table("where the time goes", _time_rows(facts)))
    console.print(_table("memory while training", _memory_rows(facts), "rows of a micro-batch"))
    console.print(_table("what stands behind the figures", _evidence_rows(facts)))
    for note in _notes(facts):
        console.print(f"- {note}")
    console.print(_preparation_note(facts), soft_wrap=True)
    if facts["check"]:
        check = facts["check"]
        verdict = "agrees" if check["within_25_percent"] else "does NOT agree"
        console.print(
            f"check on this machine: {check['predicted']:,.0f} tokens/s predicted, {check['measured']:,.0f} measured "
            f"({check['updates']} updates of {check['rows']} rows): ratio {check['ratio']:.2f}, {verdict} within 25 %"
        )


def _preparation_note(facts: dict[str, Any]) -> str:
    """Say what preparing the text ahead takes and saves."""
    text = facts["preparation"]
    minutes, size, most = text["seconds"] / 60, text["bytes"] / 1e9, text["tokens"] / 1e6
    saved = f", up to {minutes / 60 * facts['price']:,.2f} saved" if facts["price"] else ""
    return (
        f"- text: `{text['command']}` on a cheap machine first: about {minutes:,.0f} min on a core and "
        f"{size:,.2f} GB for at most {most:,.0f} M tokens{saved}"
    )


def _table(title: str, rows: list[tuple[str, str, str]], first: str = "") -> Table:
    table = Table(title=title, title_justify="left", show_header=bool(first), box=None, pad_edge=False)
    table.add_column(first, min_width=22)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        table.add_row(*row)
    return table


def _yield_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    counted = f"{facts['counted_flops_per_token'] / 1e6:,.1f} in the compiled step"
    rows = [
        ("tokens", f"{facts['tokens']:,.0f}", f"{facts['tokens_per_second']:,.0f} a second"),
        ("updates", f"{facts['updates']:,}", f"of {facts['rows_per_update']:,.0f} rows on average"),
        ("MFLOP a token", f"{facts['flops_per_token'] / 1e6:,.1f}", f"analytic; {counted}"),
        ("kB moved a token", f"{facts['bytes_per_token'] / 1e3:,.0f}", "in the compiled step"),
        ("model FLOPs utilisation", f"{facts['model_flops_utilisation']:.1%}", facts["bound"]),
    ]
    if facts["passes"] is not None:
        rows.append(("passes over the corpus", f"{facts['passes']:,.2f}", ""))
    if facts["money"] is not None:
        rows.append(("money", f"{facts['money']:,.2f}", f"{facts['hours']:,.2f} hours"))
    return rows


def _time_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    seconds = facts["seconds"]
    why = {
        "compilation": "",
        "updates": "",
        "evaluations": "",
        "checkpoints": f"0.5 s and {facts['state_bytes'] / 1e6:,.0f} MB at 200 MB/s each, the last save included",
    }
    total = max(seconds["total"], 1e-9)
    rows = [(name, f"{seconds[name]:,.1f} s", f"{seconds[name] / total:6.1%}  {why[name]}") for name in why]
    rows.append(("in all", f"{seconds['total']:,.1f} s", ""))
    text = f"{facts['preparation']['seconds']:,.1f} s"
    return [*rows, ("text", text, "before the clock starts, on one core; none if it is prepared already")]


def _evidence_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the figures, the kind of evidence behind each, and where it comes from."""
    parts = [(name, *evidence.partition(": ")) for name, evidence in facts["evidence"].items()]
    return [(name, kind, source) for name, kind, _, source in parts]


def _memory_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows, usable = [], facts["usable_memory"]
    for size, held in facts["memory"].items():
        fits = "" if not usable else "fits" if held <= usable else "does not fit"
        source = "" if int(size) in facts["memory_compiled"] else ", extrapolated"
        used = " (configured)" if int(size) == facts["micro_rows"] else ""
        rows.append((f"{size}{used}", f"{held / 1e9:,.2f} GB", f"{fits}{source}".removeprefix(", ")))
    return [*rows, ("usable", f"{usable / 1e9:,.1f} GB", "")] if usable else rows


def _notes(facts: dict[str, Any]) -> list[str]:
    backend = facts["backend"]
    sizes = " and ".join(map(str, facts["memory_compiled"]))
    notes = [
        f"speed: {facts['speeds']}",
        f"computed in {backend['dtype']}, trees by `{backend['trees']}`",
        f"memory is that of the step compiled for {sizes} rows, and for other sizes on the line through these",
    ]
    if facts["shares"]:
        notes.append(
            "this device is not here: the step was compiled for this CPU. An accelerator's compiler fuses more, so of its "
            f"bytes moved {facts['shares']['traffic']:.0%} count, and of its activations {facts['activations']:.0%}; an "
            "assumed speed may be off by half"
        )
    if facts["seconds"]["budget"] is not None and not facts["updates"]:
        notes.append("the budget is spent before the first update")
    return notes

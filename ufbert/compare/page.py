"""The page of a comparison, as HTML and as Markdown: the verdict first, then what it rests on, then its limits."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ufbert.compare.claims import claim_rows
from ufbert.compare.collect import comparison_results
from ufbert.compare.protocol import ComparisonFile
from ufbert.compare.results import Axis, Comparison, CurvePoint, GlueScore, Model, Spread, write_results
from ufbert.compare.verdict import AXES, mean_scores, narrowest, quality_and_latency
from ufbert.report.page import (
    Bullets,
    Dot,
    Intervals,
    Line,
    LineChart,
    Page,
    Part,
    Scatter,
    Section,
    Table,
    Track,
    html,
    markdown,
)
from ufbert.runtime.console import phase
from ufbert.runtime.files import to_json_text, write_text

AXIS_NAMES: dict[Axis, str] = {"tokens": "equal tokens", "time": "equal time"}


@phase("drawing the report")
def draw_comparison(folder: Path, asked: ComparisonFile) -> Comparison:
    """Write results.json, results.md and report.html of what is there, and return what they hold.

    Raises UserError if a file of a finished cell is damaged, or if the disk refuses.
    """
    results = comparison_results(folder, asked)
    write_results(folder, results)
    page = page_of(results)
    write_text(folder / "results.md", markdown(page))
    write_text(folder / "report.html", html(page))
    return results


def page_of(results: Comparison) -> Page:
    """Return the page of results."""
    sections = [
        _section("Quality against latency", _frontier(results)),
        _section("Pretraining", _pretraining(results)),
        _section("GLUE", _glue(results)),
        _section("Speed on this CPU", _speed(results)),
        _section("Size and cost", _sizes(results)),
        _section("Trees, leaves and experts in use", _usage(results)),
        _section("Published, and measured here", _claims(results)),
        _section("Limits", [Bullets(_limits(results))]),
        _section("Every cell", [_cells(results)] if results.cells else [], folded=True),
    ]
    asked = results.asked
    return Page(
        title=_title(asked),
        verdict=" ".join(results.verdict),
        sections=[section for section in sections if section.parts],
        facts=_facts(results),
        configuration=to_json_text(asdict(asked), indent=2),
    )


def _title(asked: ComparisonFile) -> str:
    few = ", ".join(asked.models[:-1]) + f" and {asked.models[-1]}"
    return f"{few if len(asked.models) <= 4 else f'{len(asked.models)} models'} at scale {asked.scale}"


def _section(heading: str, parts: Sequence[Part], folded: bool = False) -> Section:
    return Section(heading, parts, folded)


def _facts(results: Comparison) -> dict[str, str]:
    asked, cells = results.asked, results.cells
    loads = [cell.load_before for cell in cells]
    return {
        "command": asked.command,
        "commit": ", ".join(sorted({commit for cell in cells for commit in cell.commits})) or "-",
        "processor": "; ".join(sorted({cell.cpu for cell in cells})) or "-",
        "load": f"{min(loads):.2f} to {max(loads):.2f} when cells began" if loads else "-",
        "text": asked.corpus + (f", held out {asked.heldout}" if asked.heldout else ""),
        "recipe": asked.recipe,
        "seeds of pretraining": ", ".join(map(str, asked.seeds)),
    }


def _frontier(results: Comparison) -> list[Part]:
    points = quality_and_latency(results)
    if not points or not results.speed:
        return []
    case = results.speed.shapes[0]
    times = {one.model: one for one in narrowest(case)}
    dots = [
        Dot(
            name, 1e3 * seconds, loss, (1e3 * times[name].low, 1e3 * times[name].high), _interval(results.model(name)),
            strong=name == results.asked.baseline,
        )
        for name, seconds, loss in points
    ]  # fmt: skip
    kind = next(iter(times.values())).type
    title = f"Held-out loss against the time of {case.batch} x {case.tokens} tokens, {kind} weights"
    return [Scatter(title, "milliseconds a call", "held-out loss, nats", dots, frontier="lower")]


def _interval(model: Model) -> tuple[float, float] | None:
    spread = model.by_tokens.loss if model.by_tokens else None
    if spread is None or spread.deviation is None:
        return None
    return spread.mean - spread.deviation, spread.mean + spread.deviation


def _pretraining(results: Comparison) -> list[Part]:
    parts: list[Part] = []
    for axis in AXES:
        trained = [(model, t) for model in results.models if (t := model.trained(axis))]
        if not trained:
            continue
        base = results.asked.baseline
        head = [
            "model",
            "held-out loss, nats",
            f"to {base}",
            "to its control",
            "accuracy",
            "M tokens",
            "minutes",
            "TFLOP",
        ]
        rows = [
            [
                model.name, _spread(t.loss), _spread(t.difference, "+"), _spread(t.to_control, "+"), f"{t.accuracy:.1%}",
                f"{t.tokens / 1e6:,.2f}", f"{t.seconds / 60:,.1f}", f"{t.flops / 1e12:,.4g}",
            ]
            for model, t in trained
        ]  # fmt: skip
        tokens = f"{results.asked.tokens / 1e6:,.3g} M tokens each"
        budget = tokens if axis == "tokens" else f"{results.asked.budget or 'an earlier budget'} each"
        parts.append(Table(head, rows, range(1, len(head)), caption=f"{AXIS_NAMES[axis].capitalize()}: {budget}"))
    parts += [
        _curves(results, "tokens", "M tokens", lambda p: p.tokens / 1e6),
        _curves(results, "tokens", "TFLOP", lambda p: p.flops / 1e12),
        *([_curves(results, "time", "minutes", lambda p: p.seconds / 60)] if results.asked.budget else []),
    ]
    return parts if results.models else []


def _curves(results: Comparison, axis: Axis, name: str, x: Callable[[CurvePoint], float]) -> LineChart:
    lines = [
        Line(model.name, [(x(point), point.loss) for point in t.curve if point.tokens > 0], dots=True)
        for model in results.models
        if (t := model.trained(axis))
    ]
    levels = {} if results.unigram_loss is None else {"word frequency alone": results.unigram_loss}
    return LineChart(f"Held-out loss against {name}, {AXIS_NAMES[axis]}", name, "held-out loss, nats", lines, levels)


def _spread(spread: Spread | None, sign: str = "") -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:{sign}.4f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.4f}")


def _glue(results: Comparison) -> list[Part]:
    splits = list(dict.fromkeys((s.task, s.split) for model in results.models for s in model.glue))
    if not splits:
        return []
    scores = {(model.name, s.task, s.split): s for model in results.models for s in model.glue}
    means = mean_scores(results)
    models = [model.name for model in results.models if model.glue]
    head = ["task", "metric", "dev rows", "majority", *models]
    rows = []
    for task, split in splits:
        cells = [scores.get((name, task, split)) for name in models]
        any_score = next(score for score in cells if score)
        facts = [any_score.title, any_score.metric, f"{any_score.rows:,}", f"{100 * any_score.majority:.1f}"]
        rows.append([*facts, *(_score(score) for score in cells)])
    if means:
        rows.append(
            ["mean of the tasks", "", "", "", *(f"{100 * means[n]:.1f}" if n in means else "-" for n in models)]
        )
    tracks = [
        Track(f"{name}: {s.title}", 100 * s.difference, 100 * (s.low or 0.0), 100 * (s.high or 0.0), baseline=0.0)
        for name in models
        for task, split in splits
        if (s := scores.get((name, task, split))) and s.difference is not None and s.low is not None
    ]
    base = results.asked.baseline
    chart = Intervals(
        f"Differences to {base}", "points of a hundred, with 95 % intervals", tracks, baseline=base, from_zero=True
    )
    return [
        "Medians over the seeds of fine-tuning, times 100. In brackets the difference to the baseline with its 95 % interval, "
        "≈ where that contains 0. The interval holds the chance of dev rows and of those seeds.",
        Table(head, rows, range(2, len(head))),
        *([chart] if tracks else []),
    ]


def _score(score: GlueScore | None) -> str:
    if score is None:
        return "-"
    text = f"{100 * score.median:.1f}"
    if score.difference is None:
        return text
    if score.low is None or score.high is None:
        return f"{text} ({100 * score.difference:+.1f})"
    sign = " ≈" if score.low <= 0 <= score.high else ""
    return f"{text} ({100 * score.difference:+.1f} [{100 * score.low:+.1f}, {100 * score.high:+.1f}]{sign})"


def _speed(results: Comparison) -> list[Part]:
    times = results.speed
    if times is None:
        return []
    parts: list[Part] = []
    for case in times.shapes:
        head = ["model", "weights", "ms a call", "quartiles", "tokens/s", f"times as fast as {times.baseline}"]
        rows = [
            [
                one.model, one.type, f"{1e3 * one.median:.3g}", f"{1e3 * one.low:.3g} to {1e3 * one.high:.3g}",
                f"{one.tokens_per_second:,.0f}",
                "-" if one.ratio is None else f"{one.ratio:.2f} ({one.ratio_low:.2f} to {one.ratio_high:.2f})",
            ]
            for one in case.timed
        ]  # fmt: skip
        parts.append(Table(head, rows, range(2, len(head)), caption=f"{case.batch} text(s) of {case.tokens} tokens"))
    machine = times.machine
    checked = [
        f"{name}: off by {gate['relative']:.1e} from the training graph, median over tokens"
        for name, gate in times.checked.items()
    ]
    refused = [f"{name}: NOT TIMED: {reason}" for name, reason in times.refused.items()]
    load = f"load {machine['load']:.1f} before and {machine['load_after']:.1f} after"
    return [
        f"{machine['cpu']}, {times.job['used_threads']} threads, {load}. Blocks of the models took turns; ratios are medians "
        "and quartiles of neighbouring blocks, of weights of one type.",
        *parts,
        "Before anything was timed, answers were compared:",
        Bullets([*checked, *refused]),
    ]


def _sizes(results: Comparison) -> list[Part]:
    if not results.models:
        return []
    price = results.asked.price
    head = ["model", "as trained", "parameters", "neurons used", "neurons", "MFLOP a token, training", "inference"]
    head += ["GB in training", "MB of weights, int8", "hours", *(["money"] if price else [])]
    loaded = results.speed.loaded if results.speed else {}
    rows = []
    for model in results.models:
        weights = loaded.get(f"{model.name}-int8")
        rows.append([
            model.name, model.architecture, f"{model.parameters:,}", f"{model.neurons_used:,}", f"{model.neurons:,}",
            f"{model.train_flops / 1e6:,.2f}", f"{model.infer_flops / 1e6:,.2f}",
            f"{model.memory / 1e9:,.2f}" if model.memory else "-", f"{weights.bytes / 1e6:,.1f}" if weights else "-",
            f"{model.hours:,.2f}", *([f"{model.hours * price:,.2f}"] if price else []),
        ])  # fmt: skip
    return [Table(head, rows, range(2, len(head)))]


def _usage(results: Comparison) -> list[Part]:
    names = list(dict.fromkeys(name for model in results.models for name in model.usage))
    if not names:
        return []
    head = ["model", *(name.replace("_", " ") for name in names)]
    rows = [
        [model.name, *(f"{model.usage[name]:.3g}" if name in model.usage else "-" for name in names)]
        for model in results.models
        if model.usage
    ]
    text = "On held-out text at the end, means over layers; dead subtrees are those of all layers together."
    return [text, Table(head, rows, range(1, len(head)))]


def _claims(results: Comparison) -> list[Part]:
    rows = claim_rows(results)
    text = "Papers measured other sizes, texts and hardware; this says what holds of their claims at this scale and budget."
    return [text, Table(["model", "paper", "says", "here"], rows)] if rows else []


def _limits(results: Comparison) -> list[str]:
    limits = list(results.notes)
    limits += [f"FAILED {name}: {reason}" for name, reason in results.failed.items()]
    limits += [f"Not measured yet: {', '.join(results.waiting)}."] if results.waiting else []
    return [
        *limits,
        "Every model has the learning rate of its preset at this scale and recipe, the same for all; none was tuned by itself.",
        "What holds at this scale and budget need not hold at another.",
    ]


def _cells(results: Comparison) -> Table:
    head = ["cell", "seeds", "minutes", "load before", "after", "other work, cores", "restarts", "commit", "command"]
    rows = []
    for cell in results.cells:
        other = "-" if cell.other_work is None else f"{cell.other_work:.2f}"
        rows.append([
            cell.name, ", ".join(map(str, cell.seeds)), f"{cell.seconds / 60:,.1f}", f"{cell.load_before:.2f}",
            "-" if cell.load_after is None else f"{cell.load_after:.2f}",
            f"{other}, BESIDE OTHER WORK" if cell.beside_other_work else other, str(cell.restarts), ", ".join(cell.commits),
            cell.command,
        ])  # fmt: skip
    return Table(head, rows, range(1, 7))

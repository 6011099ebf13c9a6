"""The verdict: what a comparison amounts to, in sentences that follow from its numbers, whichever way they fall."""

from collections.abc import Sequence
from math import gamma, pi, sqrt
from statistics import fmean

from ufbert.bench.encoder_models import ShapeTimes, Timed
from ufbert.compare.results import Axis, Comparison, Model, Pretraining, Spread, spread_of
from ufbert.report.charts import frontier

LEAST_GAIN = 0.5
"""Nats below the loss of word frequency alone that a model must reach for differences to mean something."""
UNSETTLED = "whether the neurons that it skips are worth anything is not settled"
AXES: tuple[Axis, ...] = ("tokens", "time")


def is_settled(difference: Spread) -> bool:
    """Tell whether a difference lies beyond twice its standard error over seeds. That of one seed never does."""
    return difference.deviation is not None and abs(difference.mean) > 2 * difference.deviation / sqrt(difference.n)


def chance_beyond(n: int) -> float:
    """Return the chance that a difference of n seeds without a cause lies beyond twice its standard error.

    That is 1 less the integral from -2 to 2 of Student's density with n - 1 degrees of freedom, here by Simpson's rule.
    """
    freedom, steps = n - 1, 200
    scale = gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2))
    density = [scale * (1 + (4 * i / steps - 2) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    inside = density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])
    return 1 - inside * 4 / steps / 3


def how_sure(difference: Spread) -> str:
    """Say in words whether a difference is settled."""
    if difference.deviation is None:
        return "one seed, whose spread is not known"
    beyond = "beyond" if is_settled(difference) else "within"
    return f"{beyond} twice the standard error over {difference.n} seeds"


def after(results: Comparison, axis: Axis) -> str:
    """Return "after 10 M tokens" or "after 20m"."""
    return f"after {results.asked.tokens / 1e6:,.3g} M tokens" if axis == "tokens" else f"after {results.asked.budget}"


def verdict_of(results: Comparison) -> list[str]:
    """Return the verdict, a sentence or a few for each question that the numbers answer."""
    if not results.models:
        return ["No model is trained yet."]
    sentences = [text for axis in AXES if (text := _best(results, axis))]
    sentences += [text for text in [_knows_little(results)] if text]
    sentences += [text for model in results.models if (text := _against_control(results, model))]
    sentences += [text for model in results.models if (text := _against_twin(results, model))]
    sentences += [text for text in (_glue(results), _speed(results), _frontier(results)) if text]
    if results.failed:
        sentences.append(f"{len(results.failed)} cell(s) failed: {', '.join(results.failed)}.")
    if results.waiting:
        sentences.append(f"This is what is there so far; {len(results.waiting)} cell(s) are not measured yet.")
    return sentences


def paired(a: Pretraining, b: Pretraining) -> Spread | None:
    """Return the loss of `a` less that of `b`, paired by seed; None without a seed in common."""
    values = [a.losses[seed] - b.losses[seed] for seed in a.losses if seed in b.losses]
    return spread_of(values) if values else None


def _best(results: Comparison, axis: Axis) -> str:
    """Name the model of the lowest loss on an axis, and how far the next one is."""
    trained = [(model, t) for model in results.models if (t := model.trained(axis))]
    if len(trained) < 2:
        return ""
    (best, ours), (second, theirs), *_ = sorted(trained, key=lambda pair: pair[1].loss.mean)
    text = f"A{after(results, axis)[1:]}, {best.name} has the lowest held-out loss, {ours.loss.mean:.3f} nats"
    gap = paired(theirs, ours)
    if gap is None:
        return f"{text}; {second.name} comes next, by no seed in common."
    told = "" if is_settled(gap) or gap.deviation is None else ": the two are not told apart"
    return f"{text}; {second.name} comes next, {gap.mean:.3f} higher ({how_sure(gap)}){told}."


def _knows_little(results: Comparison) -> str:
    """Warn if no model knows much more than the frequency of words."""
    losses = [t.loss.mean for model in results.models for axis in AXES if (t := model.trained(axis))]
    if results.unigram_loss is None or results.unigram_loss - min(losses) >= LEAST_GAIN:
        return ""
    return (
        f"No model knows much more than the frequency of words, which alone gives {results.unigram_loss:.3f} nats: after so "
        "little training, differences say nothing about trained models."
    )


def _against_control(results: Comparison, model: Model) -> str:
    """Say whether a model is better than as many plain neurons as it uses."""
    if not model.control:
        return ""
    parts = []
    for axis in AXES:
        trained = model.trained(axis)
        if trained and trained.to_control:
            parts.append(f"{_compared(trained.to_control)} {after(results, axis)} ({how_sure(trained.to_control)})")
    if not parts:
        return ""
    used = f"{model.neurons_used:,} of its {model.neurons:,} neurons a token"
    differences = [t.to_control for axis in AXES if (t := model.trained(axis)) and t.to_control]
    worth = UNSETTLED if _knows_little(results) else _worth(differences)
    return (
        f"{model.name} uses {used}; against {model.control}, which has those {model.neurons_used:,} and no others, it is "
        f"{' and '.join(parts)}: {worth}."
    )


def _compared(difference: Spread) -> str:
    return f"{abs(difference.mean):.3f} nats {'better' if difference.mean < 0 else 'worse'}"


def _worth(differences: Sequence[Spread]) -> str:
    """Say what the neurons that a token skips are worth, from differences to the control."""
    settled = [d for d in differences if is_settled(d)]
    if not settled:
        return UNSETTLED
    better = [d.mean < 0 for d in settled]
    if all(better):
        sure = "" if len(settled) == len(differences) else ", where that is settled"
        return f"the neurons that it skips are worth something{sure}"
    return "the neurons that it skips are worth nothing" if not any(better) else "the two budgets say otherwise"


def _against_twin(results: Comparison, model: Model) -> str:
    """Say what learnt decisions are worth, against the same trees with random ones."""
    if not model.random_twin:
        return ""
    ours, theirs = model.by_tokens, results.model(model.random_twin).by_tokens
    gap = paired(ours, theirs) if ours and theirs else None
    if gap is None:
        return ""
    return (
        f"Against {model.random_twin}, whose decisions are random, {model.name} is {_compared(gap)} "
        f"{after(results, 'tokens')} ({how_sure(gap)})."
    )


def mean_scores(results: Comparison) -> dict[str, float]:
    """Return the mean over tasks of each model's medians, of the models that have every task of any."""
    tasks = {score.task for model in results.models for score in model.glue}
    means = {}
    for model in results.models:
        first = {score.task: score.median for score in reversed(model.glue)}  # of several splits, the one that decides
        if tasks and first.keys() == tasks:
            means[model.name] = fmean(first.values())
    return means


def _glue(results: Comparison) -> str:
    """Name the model of the highest mean on GLUE, and count the differences to the baseline that are settled."""
    means = mean_scores(results)
    if len(means) < 2:
        return ""
    best, second = sorted(means, key=means.__getitem__, reverse=True)[:2]
    differences = [s for model in results.models for s in model.glue if s.low is not None and s.high is not None]
    settled = [s for s in differences if not (s.low or 0.0) <= 0 <= (s.high or 0.0)]
    n_tasks = len({score.task for model in results.models for score in model.glue})
    text = (
        f"On GLUE ({n_tasks} task(s), mean of medians) {best} comes first with {100 * means[best]:.1f}, then {second} with "
        f"{100 * means[second]:.1f}"
    )
    if not differences:
        return f"{text}."
    return (
        f"{text}; of {len(differences)} differences to {results.asked.baseline}, {len(settled)} have an interval that leaves "
        "out 0."
    )


def narrowest(case: ShapeTimes) -> list[Timed]:
    """Return the times of the narrowest type of weights at a shape."""
    types = [one.type for one in case.timed]
    kind = next(kind for kind in ("int8", "bfloat16", "float32") if kind in types)
    return [one for one in case.timed if one.type == kind]


def _speed(results: Comparison) -> str:
    """Name the fastest model at each shape, and its loss against the baseline's."""
    if not results.speed or not results.speed.shapes:
        return ""
    parts = []
    for case in results.speed.shapes:
        fastest = min(narrowest(case), key=lambda one: one.median)
        ratio = "" if fastest.ratio is None else f", {fastest.ratio:.2f} times as fast as {results.speed.baseline}"
        texts = "text" if case.batch == 1 else "texts"
        parts.append(
            f"{case.batch} {texts} of {case.tokens} tokens fastest by {fastest.model} in {fastest.type}, "
            f"{1e3 * fastest.median:.3g} ms{ratio}"
        )
    return f"This CPU computes {'; '.join(parts)}."


def _frontier(results: Comparison) -> str:
    """Name the models that no other beats in both loss and latency."""
    points = quality_and_latency(results)
    if len(points) < 2:
        return ""
    best = frontier([(seconds, loss) for _, seconds, loss in points], "lower")
    names = [points[i][0] for i in best]
    beaten = [name for name, _, _ in points if name not in names]
    text = f"No other model is both faster and better than {', '.join(names)}"
    return (
        f"{text}; {', '.join(beaten)} {'is' if len(beaten) == 1 else 'are'} beaten in both." if beaten else f"{text}."
    )


def quality_and_latency(results: Comparison) -> list[tuple[str, float, float]]:
    """Return (model, seconds of a call, loss after equal tokens) at the first shape, with the narrowest weights."""
    if not results.speed or not results.speed.shapes:
        return []
    losses = {model.name: model.by_tokens.loss.mean for model in results.models if model.by_tokens}
    return [
        (one.model, one.median, losses[one.model]) for one in narrowest(results.speed.shapes[0]) if one.model in losses
    ]

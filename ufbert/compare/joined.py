"""One comparison of several: the models and seeds that several machines, or days, have measured under one protocol."""

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from statistics import fmean

from ufbert.compare.collect import control_of, notes_of, random_twin_of
from ufbert.compare.results import Axis, Comparison, CurvePoint, GlueScore, Model, Pretraining, spread_of
from ufbert.compare.verdict import AXES, paired, verdict_of
from ufbert.errors import UserError

SAME = ("scale", "recipe", "tokens")
"""What the protocol of all must have in common, and `budget` where both have one."""


def joined(comparisons: Mapping[str, Comparison]) -> Comparison:
    """Join comparisons, given by the names of their files, into one, whose baseline is that of the first.

    A model may be in several of them, with other seeds: its losses are united, and its curve is a mean over all seeds. Raises
    UserError for protocols, texts or options of a model that differ, and for a seed that ended otherwise in two of them.
    """
    (first, results), *others = comparisons.items()
    for name, other in others:
        _refuse_unequal(results, other, f"{first} and {name}")
        results = _united(results, other, f"{first} and {name}")
    results = _with_differences(results)
    results = replace(results, notes=notes_of(results))
    return replace(results, verdict=verdict_of(results))


def _refuse_unequal(a: Comparison, b: Comparison, files: str) -> None:
    names = [*SAME, *(["budget"] if a.asked.budget and b.asked.budget else [])]
    names += ["protocol"] if a.asked.tasks and b.asked.tasks else []
    for name in names:
        ours, theirs = getattr(a.asked, name), getattr(b.asked, name)
        if ours != theirs:
            raise UserError(f"{files} cannot be joined: {name} is {ours} in one and {theirs} in the other.")
    if not isclose(a.unigram_loss or 0.0, b.unigram_loss or 0.0, rel_tol=1e-6):
        raise UserError(
            f"{files} cannot be joined: word frequency alone gives {a.unigram_loss} and {b.unigram_loss} nats, so their "
            "texts or tokenizers are not the same."
        )


def _united(a: Comparison, b: Comparison, files: str) -> Comparison:
    """Unite the models and the cells of two comparisons. Differences, notes and verdict are left as they were."""
    ours, theirs = ({model.name: model for model in results.models} for results in (a, b))
    asked = replace(
        a.asked,
        models=list(dict.fromkeys([*a.asked.models, *b.asked.models])),
        seeds=sorted({*a.asked.seeds, *b.asked.seeds}),
        tasks=list(dict.fromkeys([*a.asked.tasks, *b.asked.tasks])),
        first_seed_only=list(dict.fromkeys([*a.asked.first_seed_only, *b.asked.first_seed_only])),
        budget=a.asked.budget or b.asked.budget,
        command="; ".join(dict.fromkeys([a.asked.command, b.asked.command])),
    )
    if a.asked.baseline != b.asked.baseline:  # the differences of the second are to another model
        theirs = {name: replace(m, glue=[_without_difference(s) for s in m.glue]) for name, m in theirs.items()}
    models = []
    for name in asked.models:
        both = [rows[name] for rows in (ours, theirs) if name in rows]
        models += [both[0] if len(both) == 1 else _one_model(*both, files)] if both else []
    begun = {cell.name: cell for r in (b, a) for cell in r.cells}
    measured = {cell.name: cell for r in (b, a) for cell in r.cells if cell.name not in {*r.waiting, *r.failed}}
    cells = list({**begun, **measured}.values())
    failed = {name: reason for name, reason in {**b.failed, **a.failed}.items() if name not in measured}
    waiting = [name for name in dict.fromkeys([*a.waiting, *b.waiting]) if name not in measured and name not in failed]
    return replace(
        a, asked=asked, models=models, speed=a.speed or b.speed, cells=cells, failed=failed, waiting=waiting,
        unigram_loss=a.unigram_loss or b.unigram_loss,
    )  # fmt: skip


def _without_difference(score: GlueScore) -> GlueScore:
    return replace(score, difference=None, low=None, high=None, of_rows=False)


def _one_model(a: Model, b: Model, files: str) -> Model:
    """Unite what two comparisons have measured of one model."""
    for name in ("options", "parameters"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if ours != theirs:
            raise UserError(
                f"{files} cannot be joined: {name} of {a.name} are {ours} in one and {theirs} in the other."
            )
    trained = {
        axis: _one_training(a.trained(axis), b.trained(axis), f"{files} cannot be joined: {a.name}") for axis in AXES
    }
    known = {(score.task, score.split) for score in a.glue}
    for score in b.glue:
        same = next((s for s in a.glue if (s.task, s.split) == (score.task, score.split)), score)
        if same.seeds != score.seeds:
            raise UserError(f"{files} cannot be joined: both have scores of {a.name} on {score.title}, which differ.")
    return replace(
        a,
        by_tokens=trained["tokens"],
        by_time=trained["time"],
        usage=a.usage or b.usage,
        memory=max(a.memory, b.memory),
        glue=[*a.glue, *(score for score in b.glue if (score.task, score.split) not in known)],
        hours=a.hours if a.by_tokens == b.by_tokens else a.hours + b.hours,
    )


def _one_training(a: Pretraining | None, b: Pretraining | None, what: str) -> Pretraining | None:
    """Unite the seeds of two trainings. Raises UserError, which begins with `what`, if a seed is in both and not the same."""
    if a is None or b is None:
        return a or b
    common = a.losses.keys() & b.losses.keys()
    if common and any(a.losses[seed] != b.losses[seed] for seed in common):
        seed = next(seed for seed in sorted(common) if a.losses[seed] != b.losses[seed])
        raise UserError(
            f"{what} ends at {a.losses[seed]} nats with seed {seed} in one and at {b.losses[seed]} in the other."
        )
    if common in (a.losses.keys(), b.losses.keys()):
        return a if common == b.losses.keys() else b
    if common:
        raise UserError(
            f"{what} has seeds of its own in both besides one in common, whose curve is not stored by itself."
        )
    losses = dict(sorted({**a.losses, **b.losses}.items()))
    shares = [len(a.losses) / len(losses), len(b.losses) / len(losses)]

    def mean(ours: float, theirs: float) -> float:
        return fmean([ours, theirs], shares)

    return replace(
        a, losses=losses, loss=spread_of(list(losses.values())), accuracy=mean(a.accuracy, b.accuracy),
        tokens=mean(a.tokens, b.tokens), seconds=mean(a.seconds, b.seconds), flops=mean(a.flops, b.flops),
        curve=[
            CurvePoint(*(mean(getattr(p, name), getattr(q, name)) for name in CurvePoint.__dataclass_fields__))
            for p, q in zip(a.curve, b.curve, strict=False)
        ],
    )  # fmt: skip


def _with_differences(results: Comparison) -> Comparison:
    """Find the control and the random twin of each model among all, and take the differences to it and to the baseline anew."""
    configs = {model.name: model.config for model in results.models if model.config is not None}
    models = []
    for model in results.models:
        if model.config is not None:
            others = {name: config for name, config in configs.items() if name != model.name}
            control, twin = control_of(model.config, others), random_twin_of(model.config, others)
            model = replace(model, control=control or model.control, random_twin=twin or model.random_twin)
        models.append(model)
    results = replace(results, models=models)
    return replace(results, models=[_differing(results, model) for model in models])


def _differing(results: Comparison, model: Model) -> Model:
    return replace(model, by_tokens=_compared(results, model, "tokens"), by_time=_compared(results, model, "time"))


def _compared(results: Comparison, model: Model, axis: Axis) -> Pretraining | None:
    own = model.trained(axis)
    if own is None:
        return None
    ends = {other.name: other.trained(axis) for other in results.models}
    base, control = ends.get(results.asked.baseline), ends.get(model.control)
    is_base = model.name == results.asked.baseline
    return replace(
        own,
        difference=None if is_base or base is None else paired(own, base),
        to_control=None if control is None else paired(own, control),
    )

"""Structured pruning: hidden neurons, heads, layers and branches of trees are physically removed.

Layers and branches go at once. Neurons and heads go over the first part of the tuning, in steps whose number follows a cubic
curve (Zhu & Gupta 2017, arXiv 1710.01878, equation 1); until its end they are masked, then they are cut out, and the smaller
model is tuned for the rest of the budget. The unpruned model is the teacher throughout.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from ufbert import nn
from ufbert.compress.depth import check_depth, layer_pairs, layers_to_keep, with_depth, with_layers, with_own_leaves
from ufbert.compress.job import Job, finish, usable_types
from ufbert.compress.material import loss_gradient
from ufbert.compress.parts import (
    Group,
    Kept,
    alive,
    by_first_order,
    by_magnitude,
    head_groups,
    keep_best,
    masks_of,
    neuron_groups,
    without,
)
from ufbert.compress.speed import time_models
from ufbert.compress.tune import Lesson, Tuning, masked, start_state, tuned, with_clock
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, load_model, save_model
from ufbert.pretrain.budget import Clock
from ufbert.runtime.console import phase, say
from ufbert.runtime.files import write_json
from ufbert.runtime.typed import Count, read_typed

STAGES = 8
"""Times that parts go during the ramp."""
GRID = 16
"""Steps of the share that a search for a latency tries, where no number of heads says otherwise."""


class Plan(NamedTuple):
    """What is to stay."""

    groups: list[Group]
    """The parts that are to become fewer."""
    counts: dict[str, int]
    """Parts that stay in the end, by the path of a group's `out`."""


def prune(job: Job) -> None:
    """Prune a model, tune what is left, and report. Raises UserError for what leaves nothing, or takes nothing away."""
    options, material = job.options, job.material
    _check(job)
    choice = _choice(job)
    student, notes = with_layers(job.model, choice.layers), list(choice.notes)
    if options.keep_depth >= 0:
        student = with_depth(student, options.keep_depth, material, options.calibration, options.seed)
        notes.append(f"Trees are {options.keep_depth} deep instead of {job.model.config.tree_depth}.")
    student = with_own_leaves(student)
    plan = plan_of(job, student, choice.share)
    if job.tunes:
        pairs = layer_pairs(choice.layers, job.model.config.n_layers)
        child = with_clock(options, job.folder, lambda clock: _tuned(job, student, plan, pairs, clock))
    else:
        kept = choose(job, student.params, plan, 1.0, _gradient(job, student))
        params, config = without(student.params, student.config, kept, plan.groups)
        child = replace(student, params=params, config=config)
    finish(job, child, notes)


@dataclass(frozen=True)
class _Choice:
    """`choice.json` of an output folder: what was chosen by measuring, which a resumed pruning keeps to."""

    layers: list[Count]
    """That stay."""
    share: float
    """Of neurons and heads, by a search; 0 without one."""
    notes: list[str]


def _choice(job: Job) -> _Choice:
    """Choose layers and, for a latency, the share of neurons and heads, or read what an earlier session has chosen."""
    options, path = job.options, job.folder / "choice.json"
    if path.is_file():
        return read_typed(path, _Choice)
    layers, share, notes = list(range(job.model.config.n_layers)), 0.0, list[str]()
    if options.keep_layers:
        layers = layers_to_keep(job.model, options.keep_layers, job.material, options.calibration, options.seed)
        notes.append(f"Layers that stay: {', '.join(map(str, layers))}.")
    if options.target_latency:
        share, sentence = search_latency(job, with_own_leaves(with_layers(job.model, layers)))
        notes.append(sentence)
    for sentence in notes:
        say(sentence)
    write_json(path, asdict(choice := _Choice(layers, share, notes)))
    return choice


def _check(job: Job) -> None:
    """Raise UserError for options that leave nothing, that take nothing away, or that this model has no parts for."""
    options, config = job.options, job.model.config
    if not 0 < options.keep <= 1:
        raise UserError(
            f"--keep is {options.keep:g}; it is the share of the hidden neurons that stays, above 0, at most 1."
        )
    if options.target_latency and (options.keep < 1 or options.keep_heads):
        raise UserError("--target-latency chooses --keep and --keep-heads itself; leave them out.")
    nothing = options.keep == 1 and not options.keep_heads and not options.keep_layers and options.keep_depth < 0
    if nothing and not options.target_latency:
        raise UserError("Nothing is to go: give --keep, --keep-heads, --keep-layers, --keep-depth or --target-latency.")
    if options.keep_layers > config.n_layers:
        raise UserError(f"--keep-layers is {options.keep_layers}, and the model has {config.n_layers}.")
    heads = head_groups(config)
    fewest = min((group.count for group in heads), default=0)
    if options.keep_heads > fewest:
        raise UserError(f"--keep-heads is {options.keep_heads}, and a layer of the model has {fewest}.")
    if options.keep_depth >= 0:
        check_depth(config, options.keep_depth)
    if options.keep < 1 and not neuron_groups(config):
        trees = any(kind == "tree" for _, kind in config.layers)
        way = " The nodes of a tree go by whole branches: --keep-depth." if trees else ""
        raise UserError(
            f"The feedforwards of this model have no columns that could go for --keep {options.keep:g}.{way}"
        )


def plan_of(job: Job, student: ModelFolder, share: float = 0.0) -> Plan:
    """Return the parts that are to become fewer: by --keep and --keep-heads, or by the `share` that a search has found."""
    options, config = job.options, student.config
    keep = share or options.keep
    counts = {group.out: max(1, round(keep * group.count)) for group in neuron_groups(config)}
    heads = head_groups(config)
    counts |= {g.out: max(1, round(share * g.count)) if share else options.keep_heads or g.count for g in heads}
    groups = [g for g in (*heads, *neuron_groups(config)) if counts[g.out] < g.count]
    return Plan(groups, counts)


Gradient = Callable[..., Any]


def _gradient(job: Job, student: ModelFolder) -> Gradient | None:
    """Return the gradient that scores parts to first order; None if magnitude scores them."""
    if job.options.score == "magnitude" or job.material is None:
        return None
    return loss_gradient(job.material, student.config)


def choose(job: Job, params: nn.Params, plan: Plan, progress: float, gradient: Gradient | None) -> Kept:
    """Choose the parts that stay when this share of the ramp is over. Those that are masked do not come back."""
    options, groups = job.options, plan.groups
    now = {g.out: cubic(g.count, plan.counts[g.out], progress) for g in groups}
    with phase("scoring the parts", stays=False):
        if gradient is None:
            scores = by_magnitude(params, groups)
        else:
            assert job.material is not None
            scores = by_first_order(params, groups, gradient, job.material, options.calibration, options.seed)
    scores = {
        path: score * mask for (path, score), mask in zip(scores.items(), alive(params, groups).values(), strict=True)
    }
    kept: Kept = {}
    for some in ([g for g in groups if g.kind == "attention"], [g for g in groups if g.kind in ("dense", "glu")]):
        if some:
            kept |= keep_best(scores, some, now, free=options.spread == "free")
    rest = [g for g in groups if g.out not in kept]  # leaves and experts are stacks, which must stay even
    return kept | keep_best(scores, rest, now)


def cubic(whole: int, left: int, progress: float) -> int:
    """Return how many of `whole` parts stay at a share of the ramp: left + (whole - left) * (1 - progress)^3."""
    return round(left + (whole - left) * (1.0 - progress) ** 3)


@dataclass(frozen=True)
class _Ramp:
    """`ramp.json`, which stands in an output folder when the model in `pruned/` is whole."""

    updates: Count


def _tuned(job: Job, student: ModelFolder, plan: Plan, pairs: tuple[tuple[int, int], ...], clock: Clock) -> ModelFolder:
    """Mask parts over the ramp, cut them out, and tune what is left."""
    assert job.material is not None
    options, place, done = job.options, job.folder / "pruned", job.folder / "ramp.json"
    lesson = Lesson(student=student, material=job.material, options=options, teacher=job.model, pairs=pairs)
    if not done.is_file():
        pruned, step = _ramp(job, lesson, plan, clock)
        save_model(place, pruned)
        write_json(done, asdict(_Ramp(step)))
    pruned = load_model(place)
    return tuned(replace(lesson, student=pruned), clock, job.folder, name="rest", step=read_typed(done, _Ramp).updates)


def _ramp(job: Job, lesson: Lesson, plan: Plan, clock: Clock) -> tuple[ModelFolder, int]:
    """Mask more and more parts while the model is tuned; return the model without them, and the updates so far."""
    student, ramp = lesson.student, job.options.ramp
    ones = {g.out: _all(g, student.params) for g in plan.groups}
    tuning, gradient = Tuning(lesson, clock, job.folder, "ramp"), _gradient(job, student)
    kept = ones
    try:
        state = tuning.restored(start_state(lesson, masks_of(ones, plan.groups)))
        for stage in range(1, STAGES + 1) if plan.groups else ():
            until = ramp * stage / STAGES
            if stage < STAGES and clock.fraction(int(state.step)) >= until:
                continue  # an earlier session has been there
            kept = choose(job, state.params["student"], plan, stage / STAGES, gradient)
            masks: Any = masks_of(kept, plan.groups)
            params = {**state.params, "student": masked(state.params["student"], masks)}
            state = tuning.run(state._replace(params=params, masks=masks), until)
    finally:
        tuning.close()
    params, config = without(state.params["student"], student.config, kept, plan.groups)
    return replace(student, params=params, config=config), int(state.step)


def _all(group: Group, params: nn.Params) -> Any:
    """Keep every part of a group."""
    scores = by_magnitude(params, [group])
    return keep_best(scores, [group], {group.out: group.count})[group.out]


def search_latency(job: Job, student: ModelFolder) -> tuple[float, str]:
    """Find the largest share of neurons and heads whose call is fast enough, and say what was chosen.

    The time grows with the share, so half of what is left is tried each time. Raises UserError if the least is too slow, or if
    the whole model is fast enough.
    """
    wanted = parse_latency(job.options.target_latency)
    heads = {group.count for group in head_groups(student.config)}
    steps = min(heads) if heads and min(heads) > 3 else GRID
    dtype = usable_types(job.options)[0][0]

    def took(n: int) -> float:
        plan = plan_of(job, student, n / steps)
        kept = keep_best(by_magnitude(student.params, plan.groups), plan.groups, plan.counts)
        params, config = without(student.params, student.config, kept, plan.groups)
        times = time_models({"it": (replace(student, params=params, config=config), dtype)}, job.options.shape, 5)["it"]
        return 1e3 * float(min(times))

    least, most = took(1), took(steps)
    if least > wanted:
        raise UserError(
            f"--target-latency {job.options.target_latency} is below what an almost empty model takes here: {least:.2f} ms "
            f"with 1/{steps} of its heads and neurons. Take a longer one, or fewer layers (--keep-layers)."
        )
    if most <= wanted:
        raise UserError(
            f"The model takes {most:.2f} ms here, so that nothing need go for {job.options.target_latency}."
        )
    low, high, reached = 1, steps, least
    while high - low > 1:
        middle = (low + high) // 2
        ms = took(middle)
        low, high, reached = (middle, high, ms) if ms <= wanted else (low, middle, reached)
    plan = plan_of(job, student, low / steps)
    shares = ", ".join(dict.fromkeys(f"{plan.counts[g.out]} of {g.count} {_noun(g)}" for g in plan.groups))
    return low / steps, f"Chosen for {job.options.target_latency}: {shares} a layer, {reached:.2f} ms in {dtype}."


def _noun(group: Group) -> str:
    return "heads" if group.kind == "attention" else "neurons"


def parse_latency(text: str) -> float:
    """Read milliseconds, as 10ms or 0.5s. Raises UserError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--target-latency {text[:40]!r} is not a time; 10ms is one.")
    return float(match[1]) * (1.0 if match[2] == "ms" else 1e3)

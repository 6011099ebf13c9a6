"""Every open choice of a run decided: preset < scale < recipe < what was given. Training, planning and benchmarks share it.

A run that starts from a model has its architecture in place of the preset's, and the recipe at the scale nearest in width.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax

from ufbert import nn
from ufbert.config import RunConfig, Scale, TreeBackend
from ufbert.config.presets import load_preset, preset_names, scaled, with_recipe
from ufbert.cost.devices import device_of_kind
from ufbert.cost.parts import local_speeds
from ufbert.cost.scale import ScaleChoice, choose_scale
from ufbert.cost.speeds import Speeds
from ufbert.errors import UserError
from ufbert.options.given import Given, over
from ufbert.options.train import (
    FREE_ON_RESUME,
    PlanOptions,
    RunOptions,
    StartOptions,
    TextOptions,
    TrainOptions,
    with_run,
)
from ufbert.pretrain.budget import Budget, parse_budget
from ufbert.pretrain.schedules import final_batch_rows
from ufbert.pretrain.start import LR_SHARE, parts_line, read_start, started_run
from ufbert.runtime.run_folder import read_run

TIMED_SCALE: Scale = "mini"
"""The scale whose parts are timed on a CPU to choose among all: a choice may take two seconds, not ten."""


class Platform(NamedTuple):
    """The device that a run is for."""

    on_cpu: bool
    bfloat16: bool
    """It multiplies in bfloat16."""
    speeds: Callable[[RunConfig], Speeds]
    """Its speeds on the parts of a configuration."""
    trees: Callable[[RunConfig], TreeBackend]
    """The backend that computes the trees of a configuration there."""


def local_platform(name: str) -> Platform:
    """Return the device that jax runs on; `name` is its platform: cpu, gpu or tpu."""
    on_cpu = name == "cpu"
    peaks = device_of_kind(jax.devices()[0].device_kind)
    bfloat16 = peaks.dtype == "bfloat16" if peaks else not on_cpu
    return Platform(on_cpu, bfloat16, local_speeds, lambda run: nn.tree_backend(run.model, run.micro_tokens))


class Resolved(NamedTuple):
    """A run with every `auto` decided but the batch, which `with_batch` decides."""

    run: RunConfig
    scale: Scale
    reason: str
    """Why this scale."""
    tokens: float | None
    """Tokens that the budget is expected to buy; None where it counts steps."""
    caution: str = ""
    """A sentence on presets for which `auto` would take another scale."""
    start: str = ""
    """What the run keeps of the model that it starts from."""


def resolve(options: RunOptions, given: Given, budget: Budget, platform: Platform) -> Resolved:
    """Decide preset, scale and recipe; fields that were given win over all of them.

    Raises UserError for an unknown preset, and for a combination that contradicts itself.
    """
    if isinstance(options, StartOptions) and options.init_from:
        return _resolve_start(options, given, budget, platform)
    preset = load_preset(options.config)
    scale, reason, tokens, caution = options.scale, "as asked", None, ""
    if budget.steps is not None:
        if scale == "auto":
            scale = "tiny" if platform.on_cpu else "base"
            reason = "a budget of steps takes tiny on a CPU and base elsewhere"
    else:
        assert budget.seconds is not None
        backend = {name: value for name, value in given.items() if name == "model.tree_backend"}
        speeds, seconds = platform.speeds(scaled(preset, TIMED_SCALE)), budget.seconds

        def choice_for(preset: RunConfig, scale: Scale) -> ScaleChoice:
            trees = platform.trees(over(preset, backend))
            return choose_scale(
                preset, scale, seconds, speeds, trees=trees, bfloat16=platform.bfloat16, recipe=options.recipe
            )

        choice = choice_for(preset, scale)
        if scale == "auto":
            caution = _caution(preset, choice.scale, lambda other: choice_for(other, "auto").scale)
        scale, reason, tokens = choice.scale, choice.reason, choice.tokens
    run = over(with_recipe(scaled(preset, scale), options.recipe, scale), given)
    return Resolved(run, scale, reason, tokens, caution)


def _resolve_start(options: StartOptions, given: Given, budget: Budget, platform: Platform) -> Resolved:
    """Decide a run that starts from a model folder. Raises UserError if that cannot be read, or an option contradicts it."""
    model = read_start(options.init_from)
    run, scale = started_run(options, model, given)
    rate = "" if "train.peak_lr" in given else f" at {LR_SHARE:g} of its peak learning rate, {run.train.peak_lr:g}"
    reason, tokens = f"the nearest in width, for the training alone{rate}", None
    if budget.seconds is not None:
        trees, speeds = platform.trees(run), platform.speeds(run)
        choice = choose_scale(run, "base", budget.seconds, speeds, trees=trees, bfloat16=platform.bfloat16)
        reason, tokens = f"{reason}; {choice.reason}", choice.tokens
    return Resolved(run, scale, reason, tokens, start=parts_line(options, model, run))


def _caution(preset: RunConfig, scale: Scale, choice: Callable[[RunConfig], Scale]) -> str:
    """Return a sentence that names the presets of the same size for which `auto` would take another scale than `scale`.

    It rests on the speeds that were measured for `preset`.
    """
    others: dict[Scale, list[str]] = {}
    for name in preset_names():
        other = load_preset(name)
        if other.model.d_model == preset.model.d_model and (theirs := choice(other)) != scale:
            others.setdefault(theirs, []).append(name)
    if not others:
        return ""
    choices = "; ".join(f"for {', '.join(names)} it would take {theirs}" for theirs, names in others.items())
    return f"scale auto takes {scale} here; {choices}: give --scale to all runs whose losses you want to compare"


def with_batch(run: RunConfig, scale: Scale, tokens: float | None) -> RunConfig:
    """Return `run` with an open batch (0 rows) decided.

    A batch has the rows of the expected `tokens` over `train.aim_updates`, at most 8192. A budget of steps (None) says nothing
    of tokens: the batch is then the published 8192 at the preset's own size, and one micro-batch below.
    """
    if run.train.batch_rows:
        return run
    train, published = run.train, 8192.0 * run.train.aim_updates if scale == "base" else 0.0
    rows = published if tokens is None else tokens / run.data.seq_len
    return replace(run, train=replace(train, batch_rows=final_batch_rows(train, rows)))


def decided[Options: TextOptions | PlanOptions](options: Options, resolved: Resolved) -> tuple[Options, float]:
    """Return the options of a resolved run, and the tokens that it is planned to see."""
    run = with_batch(resolved.run, resolved.scale, resolved.tokens)
    tokens = resolved.tokens
    if tokens is None:
        tokens = float((parse_budget(options.budget).steps or 0) * run.train.batch_rows * run.data.seq_len)
    config = "" if options.init_from else options.config
    return replace(with_run(options, run), scale=resolved.scale, config=config), tokens


def stored_options(folder: Path) -> TrainOptions:
    """Return the options that a run folder was made with, but for the command to run at the end.

    Raises UserError if it is not a run folder.
    """
    stored = read_run(folder)
    return with_run(TrainOptions(**stored.options), stored.run)


def resumed_options(given: Given, folder: Path) -> TrainOptions:
    """Return the stored options of a run with those given that may change.

    Raises UserError if one is given that says something else than the run began with.
    """
    stored = replace(stored_options(folder), out=str(folder))
    for name, value in given.items():
        outer, _, inner = name.partition(".")
        before = getattr(getattr(stored, outer), inner) if inner else getattr(stored, outer)
        same = parse_budget(before) == parse_budget(value) if name == "budget" else before == value  # 1d is 24h
        if name not in FREE_ON_RESUME and not same:
            raise UserError(f"{folder} was started with {name}={before}; it cannot be resumed with {name}={value}.")
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return replace(stored, **{**free, "out": str(folder), "resume": True})

"""`train.py` and `ufbert train`: options to a run."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ufbert.config import DataConfig, Device, ModelConfig, PretrainConfig, Recipe, RunConfig, Scale
from ufbert.config.presets import load_preset, scaled, with_recipe
from ufbert.errors import UserError
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.schedules import final_batch_rows
from ufbert.runtime.run_folder import read_run


@dataclass(frozen=True)
class TrainOptions:
    """Pretrain a masked language model within a budget, from raw text to a model folder."""

    budget: str = "24h"
    """What the run may spend: 24h, 90m, 300s or 200steps. Time covers compilation, the last evaluation and the save."""
    config: str = "ultrafastbert_1x11"
    """Preset name (see `ufbert presets`) or the path of a preset file."""
    scale: Scale = "auto"
    """tiny 2x128, mini 4x256, small 4x512, base the preset's own size; auto picks one for the device and the budget."""
    corpus: str = "auto"
    """demo, text:PATH[,PATH], hf:NAME[:CONFIG[:FIELD]]; auto takes the demo text for at most 40 passes, else a hub corpus."""
    out: str = ""
    """Run folder; by default a new one under runs/."""
    resume: bool = False
    """Go on with the run in --out, within what is left of its budget."""
    seed: int = 0
    """Seed of initialisation, row order and masking."""
    device: Device = "auto"
    """cpu, gpu or tpu; auto takes the best one there is, and stops if an accelerator lacks its jax extra."""
    distributed: str = ""
    """Train with several processes, on one machine or many that share their folders: auto (jax finds TPU pods, Slurm and
    Open MPI by itself) or HOST:PORT,INDEX,COUNT; give the same command to each, with --out."""
    tokenizer: str = ""
    """A tokenizer.json, or a vocab.txt of BERT's, to use instead of training one."""
    prepared: str = ""
    """Where prepared text is kept for later runs; by default prepared/ under $UFBERT_CACHE or ~/.cache/ufbert."""
    recipe: Recipe = "crammed"
    """crammed: AdamW and a triangle, as published. modern: Muon, warm-up-stable-decay, masks from 30 to 15 %, rotary
    positions."""
    when_done: str = ""
    """A shell command to run once when training has ended and all is saved (`sudo shutdown -h now`): well, with 0 in
    $UFBERT_EXIT_CODE, or with an error, and its exit code there; not after a signal. Give it again with --resume: a command
    that a run folder names is never run."""
    max_hours_wall: float = 0.0
    """A second, absolute stop: hours by the calendar since the run was first started, preparation and pauses included;
    0 for none."""
    price: float = 0.0
    """What an hour of this machine costs, in any currency, for the report."""
    tensorboard: bool = False
    """Also write TensorBoard files, to tensorboard/ of the run folder (needs the `tensorboard` extra)."""
    reference: str = ""
    """A finished run folder; a run that falls far behind its curve is warned about. By default the packaged curve of the
    preset, where there is one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    train: PretrainConfig = field(default_factory=PretrainConfig)
    """The recipe."""
    data: DataConfig = field(default_factory=DataConfig)
    """The shape of the data."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; it must lie between 0 and 4294967295.")
        for name in ("price", "max_hours_wall"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be a finite number, 0 or more."
                )

    @property
    def run(self) -> RunConfig:
        """The preset that these options amount to."""
        return RunConfig(self.model, self.train, self.data)

    def with_run(self, run: RunConfig) -> "TrainOptions":
        """These options with another configuration."""
        return replace(self, model=run.model, train=run.train, data=run.data)


FREE_ON_RESUME = (
    "out", "resume", "device", "distributed", "prepared", "when_done", "max_hours_wall", "price", "tensorboard", "reference",
)  # fmt: skip
"""Options that say nothing about the numbers, so a resumed run may change them."""


def parse(args: list[str], default: TrainOptions) -> TrainOptions:
    """Command-line arguments over `default`. Prints help or a usage error and exits as tyro does."""
    import tyro

    return tyro.cli(TrainOptions, args=args, default=default, prog="train.py")


@dataclass(frozen=True)
class Resolved:
    """Options with every `auto` decided."""

    options: TrainOptions
    tokens_planned: float
    reason: str
    """Why this scale."""


def resolve(args: list[str], platform: str) -> Resolved:
    """Decide preset, scale, recipe and batch; fields given on the command line win over all of them."""
    named = parse(args, TrainOptions())
    budget = parse_budget(named.budget)
    preset = load_preset(named.config)
    options = parse(args, named.with_run(preset))
    on_cpu = platform == "cpu"
    if budget.steps is not None:
        scale, reason = scale_for_steps(options.scale, on_cpu)
        options = _shaped(args, options, preset, scale)
        options = replace(options, train=with_batch(options.train, scale, None))
        return Resolved(options, float(budget.steps * options.train.batch_rows * options.data.seq_len), reason)
    from ufbert import nn
    from ufbert.cost.parts import local_speeds
    from ufbert.cost.scale import plan

    assert budget.seconds is not None
    speeds = local_speeds(scaled(preset, SPEED_SCALE))
    trees = nn.tree_backend(options.model, preset.micro_tokens)
    found = plan(preset, options.scale, budget.seconds, speeds, trees=trees, bfloat16=not on_cpu)
    options = _shaped(args, options, preset, found.scale)
    options = replace(options, train=with_batch(options.train, found.scale, found.tokens / options.data.seq_len))
    return Resolved(options, found.tokens, found.reason)


SPEED_SCALE: Scale = "mini"
"""The scale whose parts are timed on a CPU to choose among all: a choice may take two seconds, not ten."""


def scale_for_steps(scale: Scale, on_cpu: bool) -> tuple[Scale, str]:
    """The scale of a run whose budget is a number of updates, and why: its length in time does not matter."""
    if scale != "auto":
        return scale, "as asked"
    return ("tiny" if on_cpu else "base"), "a budget of steps takes tiny on a CPU and base elsewhere"


def _shaped(args: list[str], options: TrainOptions, preset: RunConfig, scale: Scale) -> TrainOptions:
    shaped = with_recipe(scaled(preset, scale), options.recipe, scale)
    return replace(parse(args, options.with_run(shaped)), scale=scale)


def with_batch(train: PretrainConfig, scale: Scale, expected_rows: float | None) -> PretrainConfig:
    """The recipe with an open batch decided: by the expected rows, or where a budget of updates says nothing of them, the
    published 8192 at the preset's own size and one micro-batch below."""
    if train.batch_rows:
        return train
    rows = 8192.0 * 500 if scale == "base" else 0.0
    return replace(
        train, batch_rows=final_batch_rows(rows if expected_rows is None else expected_rows, train.micro_rows)
    )


def stored_options(folder: Path) -> TrainOptions:
    """The options a run folder was made with, but for the command to run at the end. Raises UserError if it is not one."""
    stored = read_run(folder)
    return TrainOptions(**stored.options).with_run(stored.run)


def resumed_options(args: list[str], folder: Path) -> TrainOptions:
    """The stored options of a run, after checking that the command line does not ask for something else."""
    stored = replace(stored_options(folder), out=str(folder))
    asked = parse(args, stored)
    for name, before, now in _differences(stored, asked):
        if name not in FREE_ON_RESUME:
            raise UserError(f"{folder} was started with {name}={before}; it cannot be resumed with {name}={now}.")
    return replace(stored, resume=True, **{name: getattr(asked, name) for name in FREE_ON_RESUME if name != "resume"})


def _differences(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for item in dataclasses.fields(before):
        old, new = getattr(before, item.name), getattr(now, item.name)
        if dataclasses.is_dataclass(old):
            found += _differences(old, new, f"{prefix}{item.name}.")
        elif old != new:
            found.append((prefix + item.name, old, new))
    return found

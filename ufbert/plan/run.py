"""`ufbert plan`: what a budget buys on a device, before it is spent."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from ufbert.config import DataConfig, ModelConfig, PretrainConfig, Recipe, RunConfig, Scale, TreeBackend
from ufbert.config.presets import load_preset, scaled, with_recipe
from ufbert.cost.devices import DevicePeaks, device_of_kind, find_device
from ufbert.errors import UserError
from ufbert.pretrain.budget import Budget, parse_budget
from ufbert.pretrain.command import SPEED_SCALE, scale_for_steps, with_batch
from ufbert.runtime.console import LiveLine
from ufbert.runtime.device import use_device
from ufbert.runtime.files import write_json

GPU_MEMORY_SHARE = 0.75
"""Share of a GPU's memory that jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclass(frozen=True)
class PlanOptions:
    """Say what a training budget buys on a device: updates, tokens, memory at each batch size, where the time goes, and the
    money. The training step is compiled, not run; for the device in this machine, a short run then checks the prediction."""

    budget: str = "24h"
    """24h, 90m, 300s or 200steps."""
    config: str = "ultrafastbert_1x11"
    """Preset name (see `ufbert presets`) or the path of a preset file."""
    scale: Scale = "auto"
    """tiny, mini, small or base; auto picks one for the device and the budget, as training does."""
    device: str = "auto"
    """h100, h100-pcie, h200, a100, a100-40gb, rtx4090, a6000, 2080ti, tpu-v5e, cpu (this machine's), or auto: what there is."""
    recipe: Recipe = "crammed"
    """crammed or modern, as in training."""
    price: float = 0.0
    """Price of an hour, in any currency; 0 leaves money out."""
    corpus_tokens: float = 0.0
    """Tokens of the corpus, to say how many passes the budget makes over it; 0 leaves that out."""
    check: bool = True
    """Train for some seconds on random rows and compare. Only for the device in this machine."""
    json: str = ""
    """Write the numbers to this file, too."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The architecture."""
    train: PretrainConfig = field(default_factory=PretrainConfig)
    """The recipe."""
    data: DataConfig = field(default_factory=DataConfig)
    """The shape of the data."""

    @property
    def run(self) -> RunConfig:
        """The preset that these options amount to."""
        return RunConfig(self.model, self.train, self.data)


@dataclass(frozen=True)
class Target:
    """The device that a plan is for."""

    name: str
    peaks: DevicePeaks | None
    """None for a CPU, or an accelerator that is not in the table."""
    on_cpu: bool
    local: bool
    """Whether it is the device that jax runs on here."""
    dtype: str

    @property
    def memory(self) -> float:
        """Bytes that training may use; 0 if that is not known."""
        if self.peaks is not None:
            return self.peaks.memory * (GPU_MEMORY_SHARE if self.peaks.platform == "gpu" else 1.0)
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if self.on_cpu else 0.0


def plan_command(args: list[str]) -> None:
    """`ufbert plan ARGS`."""
    named = _parse(args, PlanOptions())
    budget, preset = parse_budget(named.budget), load_preset(named.config)
    if named.price < 0 or named.corpus_tokens < 0:
        raise UserError("--price and --corpus-tokens must not be negative.")
    if named.json and not Path(named.json).absolute().parent.is_dir():
        raise UserError(f"--json {named.json}: that folder does not exist.")
    target = _target(named.device)
    options, reason = _rescaled(args, preset, budget, target)
    from ufbert.cost.parts import PartSpeeds, local_speeds
    from ufbert.cost.speeds import peak_speeds
    from ufbert.plan.check import check_run
    from ufbert.plan.counts import count_run, planned_model
    from ufbert.plan.estimate import ACCELERATOR_COMPILE_SECONDS, plan_run
    from ufbert.plan.tables import plan_facts, show_plan

    run = planned_model(options.run, dtype=target.dtype, trees=_trees(options.run, target))
    print(
        f"{options.config} at scale {options.scale} on {target.name}, {options.budget}\n  scale: {reason}", flush=True
    )
    live = LiveLine(every=5.0)
    counts, check = count_run(run, live.show), None
    speeds = peak_speeds(target.peaks, target.dtype) if target.peaks else None
    if target.local and options.check:
        live.show("training some updates on random rows, to check the prediction")
        speeds, check = check_run(run, PartSpeeds(run) if target.on_cpu else None, speeds or local_speeds(run))
    speeds = speeds or local_speeds(run)
    backend = {
        "masked_trees": run.model.tree_backend == "masked",
        "compile_seconds": counts.compile_seconds if target.local else ACCELERATOR_COMPILE_SECONDS,
    }
    if budget.seconds is None:
        run = replace(run, train=with_batch(run.train, options.scale, None))
    elif not run.train.batch_rows:  # the batch depends on the rows, and they hardly on the batch
        first = plan_run(
            replace(run, train=replace(run.train, batch_rows=run.train.micro_rows)), budget, counts, speeds, **backend
        )
        run = replace(run, train=with_batch(run.train, options.scale, first.tokens / run.data.seq_len))
    found = plan_run(run, budget, counts, speeds, **backend)
    live.say("")
    facts = plan_facts(options, run, budget, target, counts, speeds, found, check)
    show_plan(facts)
    if options.json:
        write_json(Path(options.json), facts)


def _parse(args: list[str], default: PlanOptions) -> PlanOptions:
    import tyro

    return tyro.cli(PlanOptions, args=args, default=default, prog="ufbert plan")


def _target(name: str) -> Target:
    """Decide the device and start jax: on it if it is here, else on the CPU, whose compiler stands in for its own."""
    if name not in ("auto", "cpu"):
        peaks = find_device(name)
        use_device("cpu")
        return Target(peaks.name, peaks, on_cpu=False, local=False, dtype=peaks.dtype)
    platform = use_device("cpu" if name == "cpu" else "auto")
    import jax

    if platform == "cpu":
        return Target("this machine's CPU", None, on_cpu=True, local=True, dtype="float32")
    kind = jax.devices()[0].device_kind
    peaks = device_of_kind(kind)
    return Target(kind, peaks, on_cpu=False, local=True, dtype=peaks.dtype if peaks else "bfloat16")


def _trees(run: RunConfig, target: Target) -> TreeBackend:
    """What computes trees on the planned device, which for an accelerator is not the one that jax runs on."""
    from ufbert import nn
    from ufbert.ops.fff import usual_backend

    if target.local:
        return nn.tree_backend(run.model, run.micro_tokens)
    assert target.peaks is not None
    return usual_backend(target.peaks.platform, run.micro_tokens, run.model.tree_depth, native_kernels=False)


def _rescaled(args: list[str], preset: RunConfig, budget: Budget, target: Target) -> tuple[PlanOptions, str]:
    """Options with preset and scale decided, as training decides them, and why; fields on the command line win."""

    def over(run: RunConfig) -> PlanOptions:
        return _parse(args, PlanOptions(model=run.model, train=run.train, data=run.data))

    options = over(preset)
    if budget.seconds is None:
        scale, reason = scale_for_steps(options.scale, target.on_cpu)
    elif options.scale != "auto":
        scale, reason = options.scale, "as asked"
    else:
        from ufbert.cost.parts import local_speeds
        from ufbert.cost.scale import plan
        from ufbert.cost.speeds import peak_speeds

        peaks, sample = target.peaks, scaled(preset, SPEED_SCALE)
        speeds = peak_speeds(peaks, target.dtype) if peaks else local_speeds(sample)
        bfloat16 = target.dtype == "bfloat16"
        found = plan(preset, "auto", budget.seconds, speeds, trees=_trees(over(preset).run, target), bfloat16=bfloat16)
        scale, reason = found.scale, found.reason
    return replace(over(with_recipe(scaled(preset, scale), options.recipe, scale)), scale=scale), reason

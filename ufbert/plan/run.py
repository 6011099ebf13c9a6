"""`ufbert plan`: what a budget buys on a device, before it is spent."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ufbert.cost.parts import PartSpeeds
from ufbert.errors import UserError
from ufbert.options.given import Given
from ufbert.options.train import PlanOptions, with_run
from ufbert.plan.check import check_run
from ufbert.plan.counts import count_run, planned_model
from ufbert.plan.estimate import ACCELERATOR_COMPILE_SECONDS, plan_run
from ufbert.plan.prepare import plan_preparation
from ufbert.plan.tables import plan_facts, show_plan
from ufbert.plan.target import start_target
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.resolve import resolve, with_batch
from ufbert.runtime.console import phase, say, show
from ufbert.runtime.files import write_json


def plan(options: PlanOptions, given: Given) -> dict[str, Any]:
    """Print what a budget buys, and return the figures, which are also written as JSON where a file is named.

    Raises UserError for what cannot be planned.
    """
    budget = parse_budget(options.budget)
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: that folder does not exist.")
    target = start_target(options.device)
    resolved = resolve(options, given, budget, target.platform)
    preparation = plan_preparation(options, given, resolved)
    options = replace(with_run(options, resolved.run), scale=resolved.scale)
    run = planned_model(resolved.run, dtype=target.dtype, trees=target.trees(resolved.run))
    model = run.model.architecture(run.model.tree_backend)
    say(f"{options.origin} at scale {options.scale} ({model}) on {target.name}, {options.budget}")
    say(f"  scale: {resolved.reason}")
    if resolved.start:
        say(f"  {resolved.start}")
    if resolved.caution:
        say(f"  {resolved.caution}")

    with phase("compiling the training step"):
        counts, check = count_run(run, show), None
    speeds = target.speeds(run)
    if target.local and options.check:
        with phase("training some updates on random rows, to check the prediction"):
            speeds, check = check_run(run, PartSpeeds(run) if target.on_cpu else None, speeds)
    backend = {
        "masked_trees": run.model.tree_backend == "masked",
        "compile_seconds": counts.compile_seconds if target.local else ACCELERATOR_COMPILE_SECONDS,
    }
    tokens = None
    if budget.seconds is not None and not run.train.batch_rows:
        # The batch depends on the tokens, and these hardly on the batch.
        one_micro_batch = replace(run, train=replace(run.train, batch_rows=run.train.micro_rows))
        tokens = plan_run(one_micro_batch, budget, counts, speeds, **backend).tokens
    run = with_batch(run, resolved.scale, tokens)
    estimate = plan_run(run, budget, counts, speeds, **backend)
    say("")
    facts = plan_facts(options, run, budget, target, counts, speeds, estimate, preparation, check)
    show_plan(facts)
    if options.json:
        write_json(Path(options.json), facts)
    return facts

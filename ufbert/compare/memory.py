"""Does training fit into the memory of this machine? Asked before anything runs."""

from collections.abc import Mapping

import jax

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.cost.devices import device_of_kind
from ufbert.cost.flops import train_bytes_per_token
from ufbert.errors import UserError
from ufbert.plan.counts import count_run, planned_model, state_bytes
from ufbert.plan.target import Target
from ufbert.runtime.console import phase


def here(on_cpu: bool) -> Target:
    """Return the device that jax runs on."""
    kind = jax.devices()[0].device_kind
    peaks = None if on_cpu else device_of_kind(kind)
    return Target(kind, peaks, on_cpu=on_cpu, local=True, dtype="float32" if on_cpu else "bfloat16")


def refuse_too_large(runs: Mapping[str, RunConfig], target: Target, at_once: int) -> None:
    """Raise UserError for a model whose training does not fit into the memory, beside as many others as run at once."""
    if not target.memory:
        return
    for name, run in runs.items():
        run = planned_model(run, dtype=target.dtype, trees=nn.tree_backend(run.model, run.micro_tokens))
        if at_once * most_bytes(run) <= target.memory:
            continue
        with phase(f"counting the memory of {name}"):
            needed = at_once * count_run(run).memory(run.train.micro_rows)
        if needed > target.memory:
            beside = f", with {at_once} at once," if at_once > 1 else ""
            raise UserError(
                f"{name} does not fit: its training{beside} takes {needed / 1e9:,.2f} GB at this scale, and there are "
                f"{target.memory / 1e9:,.2f}; take a smaller --scale, or fewer rows at a time (--train.micro-rows)."
            )


def most_bytes(run: RunConfig) -> float:
    """Return a bound of the bytes that training holds, without compiling it: the state twice, and all that a step moves."""
    backend = run.model.tree_backend
    assert backend != "auto"  # a planned model has none
    moved = train_bytes_per_token(run, trees=backend, bfloat16=run.model.dtype == "bfloat16")
    return 2 * state_bytes(run) + moved * run.micro_tokens

"""Choose the scale of a model that a device can train within a budget."""

from typing import NamedTuple

from ufbert.config import Recipe, RunConfig, Scale, TreeBackend
from ufbert.config.presets import scaled, with_recipe
from ufbert.cost.flops import (
    forward_flops_per_token,
    routing_flops_per_token,
    train_bytes_per_token,
    train_flops_per_token,
)
from ufbert.cost.speeds import Speeds

TOKENS_PER_WEIGHT = 40.0
"""`auto` chooses only scales that see this many tokens for each weight that a token touches."""

SCALES: tuple[Scale, ...] = ("tiny", "mini", "small", "base")


class ScaleChoice(NamedTuple):
    """A scale for a budget, and the speed and tokens to expect of it."""

    scale: Scale
    run: RunConfig
    tokens_per_second: float
    tokens: float
    reason: str


def choose_scale(
    run: RunConfig,
    scale: Scale,
    seconds: float,
    speeds: Speeds,
    *,
    trees: TreeBackend,
    bfloat16: bool,
    recipe: Recipe = "crammed",
) -> ScaleChoice:
    """Resolve `scale` for a budget of `seconds` on a device of these speeds, from analytic counts of `run` with a recipe.

    `auto` takes the largest scale that sees TOKENS_PER_WEIGHT tokens for each weight that a token touches, and `tiny` if none
    does.
    """

    def at(name: Scale) -> ScaleChoice:
        config = with_recipe(scaled(run, name), recipe, name)
        flops = train_flops_per_token(config, masked_trees=trees == "masked")
        routing = routing_flops_per_token(config, masked_trees=trees == "masked")
        moved = train_bytes_per_token(config, trees=trees, bfloat16=bfloat16)
        speed = 1 / speeds.seconds(flops, routing, moved)
        ratio = speed * seconds / _weights(config, trees)
        reason = (
            f"about {speed:,.0f} tokens/s expected ({speeds.source}): "
            f"{ratio:,.0f} tokens per weight in use ({TOKENS_PER_WEIGHT:.0f} wanted)"
        )
        return ScaleChoice(name, config, speed, speed * seconds, reason)

    if scale != "auto":
        return at(scale)
    plans = [at(name) for name in SCALES]
    fitting = [p for p in plans if p.tokens >= TOKENS_PER_WEIGHT * _weights(p.run, trees)]
    return fitting[-1] if fitting else plans[0]


def _weights(run: RunConfig, trees: TreeBackend) -> float:
    """Count the weights that a token touches: the forward pass multiplies and adds once for each."""
    return forward_flops_per_token(run.model, 0, masked_trees=trees == "masked") / 2

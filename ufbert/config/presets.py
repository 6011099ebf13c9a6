"""Find presets by name, and shrink them to a scale that a device and a budget can train."""

import math
import runpy
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ufbert.config.checks import shown
from ufbert.config.model import ModelConfig
from ufbert.config.run import Recipe, RunConfig, Scale
from ufbert.errors import UserError, near_miss

_PACKAGED = Path(__file__).parent.parent / "configs"
_CHECKOUT = Path(__file__).parent.parent.parent / "configs"


def preset_folder() -> Path:
    """Return the folder of preset files: inside an installed wheel, or `configs/` of a checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def preset_names() -> list[str]:
    """Return the name of every preset."""
    return sorted(path.stem for path in preset_folder().glob("*.py"))


def load_preset(name: str) -> RunConfig:
    """Load the `config` of a preset file, by name or by the path of a .py file.

    Raises UserError for an unknown name (with the nearest known one), and for a file without a `config` or whose code fails.
    """
    path = Path(name) if name.endswith(".py") else preset_folder() / f"{name}.py"
    try:
        known = path.is_file()
    except OSError:  # a name of more letters than a file may have
        known = False
    if not known:
        raise UserError(f"There is no preset {shown(name)}; {near_miss(name[:100], preset_names())}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:  # a preset is a program, and may fail in any way
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}{f', line {line}' if line else ''}: {what}") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"{path} does not define `config = RunConfig(...)`.")
    return config


def preset_summary(name: str) -> str:
    """Return the first line of a preset's docstring."""
    source = (preset_folder() / f"{name}.py").read_text(encoding="utf-8")
    return source.split('"""')[1].strip().splitlines()[0]


class _Size(NamedTuple):
    n_layers: int
    d_model: int
    vocab_size: int
    peak_lr: float
    micro_rows: int


SIZES = {
    "tiny": _Size(2, 128, 4096, 5e-3, 32),
    "mini": _Size(4, 256, 8192, 3e-3, 32),
    "small": _Size(4, 512, 16384, 2e-3, 64),
}
"""Settings of each --scale below `base`. Learning rates and batches were chosen by short runs on a two-core CPU."""

MODERN_LR = {"tiny": 7e-3, "mini": 5e-3, "small": 3e-3, "base": 2e-3}
"""Peak learning rate of the modern recipe. `mini` is the best of two in twelve-minute runs; in three-minute runs 1e-2 was the
best of four. The others are guesses from it."""


def nearest_scale(d_model: int) -> Scale:
    """Return the scale whose width is nearest by ratio; `base` is taken for 768."""
    widths: dict[Scale, int] = {"tiny": 128, "mini": 256, "small": 512, "base": 768}
    return min(widths, key=lambda scale: abs(math.log(d_model / widths[scale])))


def deepest_tree(n_trees: int, max_nodes: int) -> int:
    """Return the largest depth D with n_trees * (2^(D+1) - 1) <= max_nodes, at least 0."""
    depth = 0
    while n_trees * (2 ** (depth + 2) - 1) <= max_nodes:
        depth += 1
    return depth


def scaled(config: RunConfig, scale: Scale) -> RunConfig:
    """Return `config` at another size: the same architecture and recipe in fewer and narrower layers. `base` changes nothing.

    Hidden widths keep their ratio to `d_model`, and heads stay 64 wide. Trees get the deepest D whose nodes number at most
    4 * d_model in all. Value embeddings keep the tables that fewer layers have places for. Weights start at
    1 / sqrt(d_model), so that narrow layers do not start out silent. Models that read rows of any length read short pieces in
    the first quarter of the budget. The position scalar learns at a hundredth of the rate: Adam would move it by the full
    rate, and at these rates positions would vanish before attention learns to use them. Classifiers read the mean of the
    tokens.
    """
    if scale == "base":
        return config
    if scale not in SIZES:
        raise UserError(f"There is no scale {scale!r}; take one of {', '.join(SIZES)} or base.")
    size, model = SIZES[scale], config.model
    n_trees = min(model.n_trees, 4 * size.d_model)
    return replace(
        config,
        model=replace(
            model,
            vocab_size=size.vocab_size,
            d_model=size.d_model,
            n_layers=size.n_layers,
            n_heads=size.d_model // 64,
            head_width=0,
            layer_heads=(),
            layer_hidden=(),
            mixer=_resampled(model.mixer, size.n_layers),
            feedforward=_resampled(model.feedforward, size.n_layers),
            d_hidden=max(1, model.d_hidden * size.d_model // model.d_model),
            n_trees=n_trees,
            value_embeddings=min(model.value_embeddings, (size.n_layers + 1) // 2),
            pooling="mean",
            tree_depth=_scaled_depth(model, n_trees, 4 * size.d_model),
            pooler_width=max(1, model.pooler_width * size.d_model // model.d_model),
            ngram_width=model.ngram_width and max(1, model.ngram_width * size.d_model // model.d_model),
            ngram_layer=model.ngram_layer * size.n_layers // model.n_layers,
            init_std=round(size.d_model**-0.5, 4),
        ),
        data=config.data if model.only_len else replace(config.data, short_until=0.25),
        train=replace(
            config.train,
            peak_lr=size.peak_lr,
            micro_rows=size.micro_rows,
            position_scale_lr=0.01,
        ),
    )


def with_recipe(config: RunConfig, recipe: Recipe, scale: Scale) -> RunConfig:
    """Return `config` with a recipe, at the learning rate of a scale. `crammed` is the recipe of the presets: nothing changes.

    `modern` is Muon on dense matrices, a warm-up, a plateau and a decay, masks from 30 to 15 %, dense blocks that start as
    the identity under a last norm that starts small, rotary instead of sinusoid positions, more and smaller updates, and an
    average of past weights, each a field of its own. Below `base`, whose budgets are short, dense and GLU feedforwards are at
    most half as wide as the model: they cost most of a step, and in the same time a narrow one reads twice the text (one whose
    width comes from a tree, `hidden_from`, keeps it). It is for dense models first: trees, leaves, routers and experts keep
    AdamW.
    """
    if recipe == "crammed":
        return config
    train = replace(
        config.train,
        optimizer="muon",
        schedule="stable",
        peak_lr=MODERN_LR[scale],
        mask_rate=(0.3, 0.25, 0.2, 0.15),
        clip_norm=1.0,
        average_width=0.05,
        aim_updates=1500,
    )
    model = config.model
    is_dense = set(model.feedforward) <= {"dense", "glu"}
    model = replace(
        model,
        zero_init_out=True,
        positions="rotary" if model.positions == "scaled_sinusoid" else model.positions,
        # A masked token is still [MASK]'s own vector then, whose logit for itself is the width times this deviation.
        final_norm_start=min(1.0, round(1 / (model.d_model * model.init_std), 4)),
        d_hidden=min(model.d_hidden, max(1, model.d_model // 2)) if is_dense and scale != "base" else model.d_hidden,
    )
    return replace(config, train=train, model=model)


def _resampled(kinds: tuple[Any, ...], n_layers: int) -> tuple[Any, ...]:
    """Return the kinds of fewer layers. A pattern stays; a longer list is sampled evenly, so that the top stays the top."""
    if len(kinds) <= n_layers:
        return kinds
    return tuple(kinds[(i + 1) * len(kinds) // n_layers - 1] for i in range(n_layers))


def _scaled_depth(model: ModelConfig, n_trees: int, max_nodes: int) -> int:
    """Return the depth of the deepest tree of at most `max_nodes` neurons. A leaf tree's neurons are those of its leaves.

    A routed tree's are those and its decisions, of all its trees, and those that every token uses.
    """
    if "routed_tree" in model.feedforward or model.hidden_from.startswith("routed"):
        return max(0, (max(0, max_nodes - model.master_leaf) // (n_trees * (model.leaf_width + 1))).bit_length() - 1)
    if "leaf_tree" not in model.feedforward:
        return deepest_tree(n_trees, max_nodes)
    return max(0, (max_nodes // model.leaf_width).bit_length() - 1)

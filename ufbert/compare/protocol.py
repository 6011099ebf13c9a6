"""The protocol of a comparison: its models, what stands in `comparison.json`, and what cannot be compared.

A comparison's folder holds `comparison.json`, two studies (`tokens/`, and `time/` if there is a budget of time), a sweep for
every model and task (`glue/MODEL/TASK/`), and the timing (`speed/`).
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ufbert.config import ModelConfig, ProtocolName, RunConfig, Scale
from ufbert.config.checks import Positive, Seed, Size, shown
from ufbert.config.presets import SIZES, deepest_tree, load_preset
from ufbert.errors import UserError, near_miss
from ufbert.options.compare import CompareOptions, names_of
from ufbert.options.given import Given, argument_words, option_names, seeds_of
from ufbert.options.train import StartOptions
from ufbert.runtime.files import write_json
from ufbert.runtime.run_folder import Number
from ufbert.runtime.typed import read_typed
from ufbert.study.variants import NAME, parse_variant

COMPARISON_FILE = "comparison.json"
FORMAT = 1
SWEPT = "ultrafastbert_1x11"
"""The preset whose trees `--sweep` cuts into more and shallower ones."""


@dataclass(frozen=True)
class ComparisonFile:
    """comparison.json: what was asked last."""

    models: list[str]
    scale: Scale
    recipe: str
    corpus: str
    heldout: str
    budget: str
    """Of equal time; "" for none."""
    tokens: Number
    """Of equal tokens."""
    seeds: list[Seed]
    baseline: str
    command: str = ""
    first_seed_only: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    """Names of GLUE tasks, as a source knows them."""
    source: str = "hf"
    glue_seeds: list[Seed] = field(default_factory=list)
    one_seed_tasks: list[str] = field(default_factory=list)
    protocol: ProtocolName = "auto"
    speed: bool = True
    shapes: list[str] = field(default_factory=list)
    blocks: Size = 9
    seconds_a_block: Positive = 0.3
    price: Number = 0.0
    format_version: Annotated[int, Meta(ge=FORMAT, le=FORMAT)] = FORMAT

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("models is empty.")
        for field_name, names in (("baseline", [self.baseline]), ("first_seed_only", self.first_seed_only)):
            if unknown := [name for name in names if name not in self.models]:
                raise UserError(f"{field_name} is {shown(unknown[0])}, which is none of its models.")

    def seeds_of_task(self, task: str) -> list[int]:
        """Return the seeds of a task's fine-tuning."""
        return self.glue_seeds[:1] if task in self.one_seed_tasks else self.glue_seeds


def read_comparison(folder: Path) -> ComparisonFile:
    """Read comparison.json. Raises UserError if there is none, or if it is damaged."""
    if not (folder / COMPARISON_FILE).exists():
        raise UserError(f"There is no comparison in {folder}.")
    return read_typed(folder / COMPARISON_FILE, ComparisonFile, exact=True)


def write_comparison(folder: Path, comparison: ComparisonFile) -> None:
    """Write comparison.json, whole or not at all. Raises UserError if the disk refuses."""
    write_json(folder / COMPARISON_FILE, asdict(comparison))


def comparison_of(
    options: CompareOptions, given: Given, models: Sequence[str], tasks: Sequence[str], one_seed_tasks: Sequence[str],
    tokens: float,
) -> ComparisonFile:  # fmt: skip
    """Return what was asked. Raises UserError for a baseline or `--first-seed-only` that is none of the models."""
    first_only = names_of(options.first_seed_only)
    for flag, names in (
        ("--baseline", [options.baseline] if options.baseline else []),
        ("--first-seed-only", first_only),
    ):
        if unknown := [name for name in names if name not in models]:
            raise UserError(f"{flag} {shown(unknown[0])} is none of the models; {near_miss(unknown[0], models)}")
    rest = argument_words({name: value for name, value in given.items() if name != "presets"})
    return ComparisonFile(
        command=shlex.join(["ufbert", "compare", *options.presets, *rest]), models=list(models), scale=options.scale,
        recipe=options.recipe, corpus=options.corpus, heldout=options.heldout,
        budget=options.budget, tokens=tokens, seeds=list(options.seed_list), baseline=options.baseline or models[0],
        first_seed_only=first_only, tasks=list(tasks), source=options.source, glue_seeds=list(seeds_of(options.glue_seeds)),
        one_seed_tasks=list(one_seed_tasks), protocol=options.protocol, speed=options.speed, shapes=list(options.shapes),
        blocks=options.blocks, seconds_a_block=options.seconds_a_block, price=options.price,
    )  # fmt: skip


def same_comparison(before: ComparisonFile, now: ComparisonFile) -> None:
    """Raise UserError if a comparison that was begun would go on with other rows of GLUE or another protocol.

    Models, seeds and tasks may be added. What pretraining depends on is checked by its studies.
    """
    for name in ("source", "protocol"):
        ours, theirs = getattr(before, name), getattr(now, name)
        if before.tasks and now.tasks and ours != theirs:
            flag = {"source": "--glue-source"}.get(name, f"--{name}")
            raise UserError(f"The comparison was started with {flag} {ours}; it cannot go on with {theirs}.")


def models_of(options: CompareOptions, given: Given) -> dict[str, Given]:
    """Return the options of every model by name, over those given for all.

    Raises UserError for a wrong or repeated name, for fewer than two models, and for an unknown preset.
    """
    if "config" in given:
        raise UserError(
            "--config does not go with compare; name the presets as they are: ufbert compare crammed_bert ..."
        )
    if options.scale == "auto":
        raise UserError("A comparison needs a --scale, the same for all: tiny, mini, small or base.")
    shared = {name: value for name, value in given.items() if name in option_names(StartOptions)}
    named: dict[str, dict[str, Any]] = {}
    for text in options.presets:
        name, own = (Path(text).stem, {"config": text}) if text.endswith(".py") else parse_variant(text)
        if not NAME.fullmatch(name):
            raise UserError(f"{shown(name)} is no name of a model; take up to 40 letters, digits and any of . _ + -")
        if name in named:
            raise UserError(f"The model {shown(name)} is named twice.")
        named[name] = {"config": name, **own}
    for name, own in swept(options).items():
        if name in named:
            raise UserError(f"The model {shown(name)} is named twice.")
        named[name] = dict(own)
    if len(named) < 2:
        raise UserError(
            "compare needs at least two models, such as `ufbert compare ultrafastbert_1x11 path_dense_1x11`."
        )
    for name, own in named.items():
        try:
            load_preset(own["config"])
        except UserError as error:
            raise UserError(f"model {name}: {error}") from error
    return {name: {**shared, **own} for name, own in named.items()}


def swept(options: CompareOptions) -> dict[str, Given]:
    """Return the options of the models of `--sweep` by name: trees_1x9, ..., trees_all.

    Raises UserError for what is no number of trees.
    """
    model = load_preset(SWEPT).model
    most = model.nodes_per_tree if options.scale == "base" else 4 * SIZES[options.scale].d_model if options.sweep else 0
    named: dict[str, Given] = {}
    for text in names_of(options.sweep):
        if text == "all":
            trees = {"model.n_trees": 1, "model.tree_depth": deepest_tree(1, most)}
            named["trees_all"] = {
                "config": SWEPT,
                "model.feedforward": ("dense",),
                "model.hidden_from": "tree_all",
                **trees,
            }
        elif text.isdecimal() and 1 <= int(text) <= most:
            depth = deepest_tree(int(text), most)
            named[f"trees_{text}x{depth}"] = {"config": SWEPT, "model.n_trees": int(text), "model.tree_depth": depth}
        else:
            raise UserError(f"--sweep {shown(text)} is no number of trees; take 1 to {most}, or all.")
    return named


def refuse_shapes(runs: Mapping[str, RunConfig], shapes: Sequence[str]) -> None:
    """Raise UserError if a model cannot read texts of a shape's tokens."""
    for name, run in runs.items():
        for shape in shapes:
            if reason := unread(run.model, int(shape.partition("x")[2])):
                raise UserError(f"{name} {reason}, and --shapes asks for {shape}: leave out that shape, or that model.")


def unread(model: ModelConfig, tokens: int) -> str:
    """Say why a model does not read texts of so many tokens; "" if it does."""
    if model.only_len not in (0, tokens):
        return f"reads texts of {model.only_len} tokens only"
    return f"reads at most {model.max_len} tokens" if tokens > model.max_len else ""

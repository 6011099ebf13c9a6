"""The variants of a study: read, checked against each other, and decided to the last option before anything runs."""

import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import msgspec

from ufbert.config import DataConfig, ModelConfig, PretrainConfig, RunConfig
from ufbert.config.checks import check_kinds, shown, words
from ufbert.errors import UserError, near_miss
from ufbert.options.given import Given, argument_words, from_given, named_values, option_names
from ufbert.options.study import StudyOptions
from ufbert.options.train import RunOptions, StartOptions, TrainOptions
from ufbert.pretrain.budget import Budget, parse_budget
from ufbert.pretrain.resolve import Platform, resolve, with_batch
from ufbert.pretrain.schedules import rows_per_step
from ufbert.runtime.typed import convert, decode, read_whole

NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,39}")
"""Names of variants, which become names of folders."""
PARTS = {"model": ModelConfig, "train": PretrainConfig, "data": DataConfig}
OWN_DATA = ("document_attention", "short_len", "short_until")
"""Fields of the data that variants may set: they change neither the text nor the held-out rows."""


@dataclass(frozen=True)
class VariantsFile:
    """A file of variants: options of `train` by name, `train.peak_lr` or a table `train`."""

    variants: dict[str, dict[str, Any]]
    base: dict[str, Any] = field(default_factory=dict)
    """Options of all variants."""


class Variant(NamedTuple):
    """A variant with every option decided but the learning rate and the seed of a cell."""

    name: str
    asked: Given
    """Options of the study and the variant's own over them."""
    run: RunConfig
    tokens: float
    """Tokens that a cell is planned to read."""
    budget: str
    """Of a cell, as `train` takes it."""


def read_variants(path: Path) -> dict[str, Given]:
    """Read a file of variants. Returns the options of each by name, those of `base` under theirs.

    Raises UserError, naming the file, the variant and the option, for what is no option or has no right value.
    """
    data = read_whole(path)
    if path.suffix == ".toml":
        try:
            file = convert(tomllib.loads(data.decode()), VariantsFile, str(path), exact=True)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not readable TOML: {str(error)[:200]}.") from error
    else:
        file = decode(data, VariantsFile, str(path), exact=True)
    base = checked(file.base, f"{path}: base")
    named = {name: checked(own, f"{path}: variants: {shown(name)}") for name, own in file.variants.items()}
    return {name: {**base, **own} for name, own in named.items()}


def checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a variant's options with dotted names. Raises UserError, which begins with `where`, for a wrong one."""
    try:
        for name, value in values.items():
            if isinstance(value, Mapping) and name not in PARTS:
                raise UserError(f"{shown(name)} is a table; only {', '.join(PARTS)} are.")
            if name in PARTS and not isinstance(value, Mapping):
                raise UserError(f"{name} is {shown(value)}; it must be a table, or write {name}.OPTION.")
        for name in values:
            if name in option_names(TrainOptions) and name not in option_names(RunOptions):
                raise UserError(f"{name} is the study's, the same for all variants; it stands on the command line.")
        given = named_values(RunOptions, values)
        check_kinds(RunOptions, given, "")
        for part, cls in PARTS.items():
            inner = {name.removeprefix(f"{part}."): v for name, v in given.items() if name.startswith(f"{part}.")}
            check_kinds(cls, inner, f"{part}.")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def parse_variant(text: str) -> tuple[str, dict[str, Any]]:
    """Parse a variant of the command line: `NAME` or `NAME: --OPTION=VALUE ...`; values of a list have commas between them.

    Raises UserError, naming the variant, for what is no option or has no right value.
    """
    name, _, rest = text.partition(":")
    known, values = option_names(RunOptions), {}
    try:
        pieces = shlex.split(rest)
    except ValueError as error:
        raise UserError(f"variant {shown(name)}: {error}.") from error
    for piece in pieces:
        match = re.fullmatch(r"--([\w.-]+)=(.*)", piece, re.DOTALL)
        if match is None:
            raise UserError(f"variant {shown(name)}: {shown(piece)} is not of the form --OPTION=VALUE.")
        option, value = match[1].replace("-", "_"), match[2]
        if option not in known:
            raise UserError(f"variant {shown(name)}: there is no option --{match[1]}; {near_miss(option, known)}")
        if option in values:
            raise UserError(f"variant {shown(name)}: --{match[1]} stands there twice.")
        hint = known[option]
        try:
            parts = value.split(",") if get_origin(hint) is tuple else value
            values[option] = msgspec.convert(parts, hint, strict=False)
        except msgspec.ValidationError as error:
            raise UserError(
                f"variant {shown(name)}: --{match[1]} is {shown(value)}; it must be {words(hint)}."
            ) from error
    return name, checked(values, f"variant {shown(name)}")


def variants_of(options: StudyOptions, given: Given) -> dict[str, Given]:
    """Return the options of every variant by name, from the file and the command line, over those given for the study.

    Raises UserError for a wrong or repeated name, for no variant at all, and for a baseline or gap of no variant's name.
    """
    shared = {name: value for name, value in given.items() if name in option_names(StartOptions)}
    named = read_variants(Path(options.file)) if options.file else {}
    for text in options.variants:
        name, own = parse_variant(text)
        if name in named:
            raise UserError(f"The variant {shown(name)} is named twice.")
        named[name] = own
    if not named:
        raise UserError('A study needs variants: words such as "dense" "trees: --model.feedforward=tree", or --file.')
    for name in named:
        if not NAME.fullmatch(name):
            raise UserError(f"{shown(name)} is no name of a variant; take up to 40 letters, digits and any of . _ + -")
    for flag in ("baseline", "gap_from", "gap_to"):
        if getattr(options, flag) and getattr(options, flag) not in named:
            raise UserError(
                f"--{flag.replace('_', '-')} {shown(getattr(options, flag))} is no variant; "
                f"{near_miss(getattr(options, flag), named)}"
            )
    return {name: {**shared, **own} for name, own in named.items()}


def decide(options: StudyOptions, name: str, asked: Given, platform: Platform, batch_rows: int = 0) -> Variant:
    """Decide everything of a variant. `batch_rows` is the batch that an earlier start of the study has decided on; 0 for none.

    Raises UserError, naming the variant, for a combination that contradicts itself.
    """
    try:
        own = from_given(TrainOptions, {k: v for k, v in asked.items() if k in option_names(TrainOptions)})
        if own.scale == "auto" and not own.init_from:
            raise UserError("a study needs a --scale of its own, the same for all: tiny, mini, small or base.")
        budget = parse_budget(options.budget) if options.budget else None
        is_time = budget is not None and budget.seconds is not None and not batch_rows
        resolved = resolve(own, asked, budget if is_time and budget else Budget(steps=1), platform)
        tokens = options.tokens or resolved.tokens
        run = resolved.run
        if batch_rows:
            run = replace(run, train=replace(run.train, batch_rows=batch_rows))
        run = with_batch(run, resolved.scale, tokens)
    except UserError as error:
        raise UserError(f"variant {name}: {error}") from error
    if options.tokens:
        steps = steps_for(run, options.tokens)
        return Variant(name, asked, run, options.tokens, f"{steps}steps")
    if budget is not None and budget.steps is not None:
        tokens = float(tokens_in(run, budget.steps))
    return Variant(name, asked, run, tokens or 0.0, options.budget)


def expected_seconds(variant: Variant, platform: Platform) -> float:
    """Estimate the seconds of a cell from the speed that is expected of this machine on the variant's parts."""
    own = from_given(TrainOptions, {k: v for k, v in variant.asked.items() if k in option_names(TrainOptions)})
    hourly = resolve(own, variant.asked, Budget(seconds=3600.0), platform).tokens
    return 3600.0 * variant.tokens / hourly if hourly else 0.0


def tokens_in(run: RunConfig, steps: int) -> int:
    """Count the tokens that a run of so many steps reads, the ramp of its batch included."""
    return sum(rows_per_step(run.train, step / steps) for step in range(steps)) * run.data.seq_len


def steps_for(run: RunConfig, tokens: float) -> int:
    """Return the smallest number of steps that reads at least `tokens`."""
    most = ceil(tokens / (run.train.micro_rows * run.data.seq_len))
    least = max(1, min(most, ceil(tokens / (max(run.train.batch_rows, run.train.micro_rows) * run.data.seq_len))))
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if tokens_in(run, middle) >= tokens else (middle + 1, most)
    return least


def refuse_unequal(variants: list[Variant]) -> None:
    """Raise UserError if two variants would not read the same text or be held to the same held-out rows and masks."""
    shared = ["model.vocab_size", "train.eval_mask_rate", "train.micro_rows"]
    shared += [f"data.{f.name}" for f in fields(DataConfig) if f.name not in (*OWN_DATA, "max_tokens")]
    first = variants[0]
    for other in variants[1:]:
        for name in shared:
            part, _, inner = name.partition(".")
            ours, theirs = (getattr(getattr(v.run, part), inner) for v in (first, other))
            if ours != theirs:
                raise UserError(
                    f"The variants {first.name} and {other.name} do not compare: {name} is {shown(ours)} and {shown(theirs)}, "
                    "and text, held-out rows and their masks depend on it; give the same to all."
                )


def cell_words(options: StudyOptions, variant: Variant, max_tokens: int, rate: float | None, seed: int) -> list[str]:
    """Return the options of a cell as `train` takes them, all but those of the place and the device."""
    decided = {
        **variant.asked,
        "train.batch_rows": variant.run.train.batch_rows,
        "data.max_tokens": max_tokens,
        **({"train.peak_lr": rate} if rate is not None else {}),
        "corpus": options.corpus,
        **({"heldout": options.heldout} if options.heldout else {}),
        **({"tokenizer": options.tokenizer} if options.tokenizer else {}),
        "budget": variant.budget,
        "seed": seed,
    }
    return argument_words(decided)

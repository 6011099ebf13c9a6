"""Options from named values: what a command line or a call names, over what a preset or a default says."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from ufbert.config import RunConfig
from ufbert.config.checks import check_kinds
from ufbert.errors import UserError, near_miss
from ufbert.runtime.files import expand_home

Given = Mapping[str, Any]
"""Values by the name of their option, those of a nested configuration with a dot: {"seed": 1, "train.peak_lr": 1e-3}."""


def option_names(cls: Any) -> dict[str, Any]:
    """Return {name: type} of every option of a dataclass, nested configurations by dotted names."""
    names: dict[str, Any] = {}
    for field in fields(cls):
        if isinstance(field.type, type) and is_dataclass(field.type):
            names |= {f"{field.name}.{inner.name}": inner.type for inner in fields(field.type)}
        else:
            names[field.name] = field.type
    return names


def named_values(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` as `Given`: dicts of nested configurations become dotted names, and `~` a home folder.

    Raises UserError for a name that no option of `cls` has.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {name: value}
    known = option_names(cls)
    for name in flat:
        if name not in known:
            raise UserError(f"There is no option {name!r}; {near_miss(name, known)}")
    return {name: expand_home(value) if isinstance(value, str) else value for name, value in flat.items()}


def from_given[Options](cls: type[Options], given: Given) -> Options:
    """Build options of type `cls` from the values given, and defaults for the rest.

    Nested configurations keep their defaults: `over` puts dotted names on top of what a preset says. Raises UserError for a
    value of the wrong kind or out of range, and for an option that is needed and not given.
    """
    values = {name: value for name, value in given.items() if "." not in name}
    check_kinds(cls, values, "--")
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"An option is missing: {error}.") from error


def over(config: RunConfig, given: Given) -> RunConfig:
    """Return `config` with the fields that dotted names give. Raises UserError if the result contradicts itself."""
    parts = {}
    for part in ("model", "train", "data"):
        changes = {name.removeprefix(f"{part}."): value for name, value in given.items() if name.startswith(f"{part}.")}
        if changes:
            parts[part] = replace(getattr(config, part), **changes)
    model = parts.get("model", config.model)
    if given.get("model.d_hidden", model.d_hidden) != model.d_hidden:
        raise UserError(
            f"model.d_hidden {given['model.d_hidden']} contradicts model.hidden_from {model.hidden_from}, which makes it "
            f"{model.d_hidden}; give model.hidden_from d_hidden as well."
        )
    return replace(config, **parts)


def argument_words(given: Given) -> list[str]:
    """Write named values as the words of a command line, which `cli.parse` reads back."""
    words: list[str] = []
    for name, value in given.items():
        outer, _, inner = name.replace("_", "-").rpartition(".")
        flag = f"--{outer}.{inner}" if outer else f"--{inner}"
        if isinstance(value, bool):
            words.append(flag if value else f"{flag.removesuffix(inner)}no-{inner}")
        elif isinstance(value, tuple | list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    return words


def seeds_of(text: str) -> tuple[int, ...]:
    """Return the seeds that `--seeds` lists, separated by commas; () for "". Raises UserError if they are no seeds."""
    try:
        seeds = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UserError(f"--seeds {text[:60]!r} is not a list of whole numbers.") from error
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text[:60]} names a seed twice.")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise UserError(f"--seeds names {wrong[0]}; a seed must lie between 0 and 4294967295.")
    return seeds

"""Checks of values that a file or a caller gives to a dataclass."""

from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ufbert.errors import UserError

MOST = 2**63 - 1
"""Largest whole number that a field may be."""
LARGEST = 3.4e38
"""Largest number that single precision has, in which all is computed; neither an infinity nor NaN is below it."""


def check_kinds(cls: type, values: Mapping[str, Any], before: str) -> None:
    """Raise UserError if a value is not of the kind that the dataclass's field of that name is annotated with.

    NaN and infinities are no numbers. `before` stands before the field's name in the sentence.
    """
    for name, hint in _hints(cls).items():
        if name in values and not _fits(values[name], hint):
            raise UserError(f"{before}{name} is {shown(values[name])}; it must be {words(hint)}.")


_hints = cache(get_type_hints)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(part, inner[0]) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(part, Real) for part in value.values())
    if hint is str:
        return isinstance(value, str) and "\0" not in value
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and _within(value, MOST)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _within(value, LARGEST)
    return isinstance(value, hint)


def shown(value: Any) -> str:
    """Return the beginning of a value's text, to show in a sentence."""
    try:
        text = repr(value)
    except ValueError:  # of a whole number with thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _within(value: Any, most: int | float) -> bool:
    return bool(-most <= value <= most)


def words(hint: Any) -> str:
    """Say in words what a type hint allows."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:  # a number with the bounds of a msgspec.Meta
        bounds = {"at least": inner[1].ge, "above": inner[1].gt, "at most": inner[1].le, "below": inner[1].lt}
        limits = " and ".join(f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None)
        return f"{'a whole number' if inner[0] is int else words(inner[0])} {limits}".rstrip()
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, UnionType):
        return " or ".join(words(part) for part in inner)
    if origin in (tuple, list):
        return f"a list, each entry {words(inner[0])}"
    if origin is dict:
        return "an object" if inner[1] is Any else f"an object, each value {words(inner[1])}"
    plain = {
        int: "a whole number below 2^63",
        float: "a finite number",
        bool: "true or false",
        str: "text",
        NoneType: "null",
        Any: "a number in range",  # nothing else is refused
    }
    return plain.get(hint) or (f"a list of {', '.join(hint._fields)}" if hasattr(hint, "_fields") else "an object")


def check_least(config: Any, group: str, least: int, *names: str) -> None:
    """Raise UserError if a field of those names is less."""
    for name in names:
        if getattr(config, name) < least:
            wanted = f"be at least {least}" if least else "not be negative"
            raise UserError(f"{group}.{name} is {getattr(config, name)}; it must {wanted}.")


def check_most(config: Any, group: str, most: int, *names: str) -> None:
    """Raise UserError if a field of those names is more. Numbers that become an allocation or a loop have a bound."""
    for name in names:
        if getattr(config, name) > most:
            raise UserError(f"{group}.{name} is {getattr(config, name)}; it must be at most {most:,}.")


def check_share(config: Any, group: str, *names: str) -> None:
    """Raise UserError if a field of those names lies outside [0, 1)."""
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise UserError(f"{group}.{name} is {getattr(config, name)}; it must lie in [0, 1).")

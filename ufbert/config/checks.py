"""Checks of values that a file or a caller gives to a dataclass."""

import operator
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta

from ufbert.errors import UserError

# Bounds of fields. A number that becomes an allocation or a loop has an upper one.
Size = Annotated[int, Meta(ge=1, le=2**20)]
SizeOrNone = Annotated[int, Meta(ge=0, le=2**20)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
ShareBelowOne = Annotated[float, Meta(ge=0, lt=1)]
MaskRate = Annotated[float, Meta(gt=0, lt=1)]

Seed = Annotated[int, Meta(ge=0, lt=2**32)]
BOUNDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}

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


_hints = cache(lambda cls: get_type_hints(cls, include_extras=True))


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = ((compare, getattr(inner[1], name, None)) for name, compare in BOUNDS.items())
        return _fits(value, inner[0]) and all(bound is None or compare(value, bound) for compare, bound in bounds)
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
        return isinstance(value, Integral) and not isinstance(value, bool) and bool(-MOST <= value <= MOST)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and bool(-LARGEST <= value <= LARGEST)
    return isinstance(value, hint)


def shown(value: Any) -> str:
    """Return the beginning of a value's text, to show in a sentence."""
    try:
        text = repr(value)
    except ValueError:  # of a whole number with thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def words(hint: Any) -> str:
    """Say in words what a type hint allows."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated and not isinstance(inner[1], Meta):  # a mark of the command line's
        return words(inner[0])
    if origin is Annotated:
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

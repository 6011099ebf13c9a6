"""Whether the values of a dataclass are what its annotations say, as a file or a caller may have them otherwise."""

from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ufbert.errors import UserError


def check_kinds(config: Any, name: str) -> None:
    """Raise UserError if a field of a dataclass, which the sentence calls `name`, holds what its annotation does not allow: a
    word that is none of those it names, a number where a word belongs, or no number (NaN)."""
    for field_name, hint in _hints(type(config)).items():
        value = getattr(config, field_name)
        if not _fits(value, hint):
            raise UserError(f"{name}.{field_name} is {value!r}; it must be {_words(hint)}.")


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
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and value == value
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """What a hint allows, for a sentence."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in inner)
    if origin is tuple:
        return f"a list, each entry {_words(inner[0])}"
    if origin is dict:
        return "numbers by name"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        hint, f"a {hint.__name__}"
    )

"""Configurations as JSON, as model and run folders hold them."""

import dataclasses
from typing import Any

from ufbert.config.checks import check_kinds
from ufbert.config.model import ModelConfig
from ufbert.config.run import DataConfig, PretrainConfig, RunConfig
from ufbert.errors import UserError

FORMAT_VERSION = 1
"""Version of `config.json` in model and run folders; a folder of a newer format is refused."""


def to_json(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(cls: Any, values: Any, where: str) -> Any:
    """Rebuild a config dataclass of type `cls` from `to_json` values.

    Raises UserError, naming `where`, for a field that `cls` does not have or a value of the wrong kind.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {values!r} where an object of settings belongs.")
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{where} has a setting this version does not know: {', '.join(unknown)}.")
    rebuilt = {}
    for name, value in values.items():
        nested = {"model": ModelConfig, "train": PretrainConfig, "data": DataConfig}.get(name)
        if cls is RunConfig and nested is not None:
            rebuilt[name] = from_json(nested, value, where)
        else:
            rebuilt[name] = tuple(value) if isinstance(value, list) else value
    check_kinds(cls, rebuilt, f"{where}: ")
    try:
        return cls(**rebuilt)
    except TypeError as error:
        raise UserError(f"{where} holds a value of the wrong kind: {error}.") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error

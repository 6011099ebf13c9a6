"""What a run folder was made with: its config.json, written and read."""

import json
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from ufbert.config import RunConfig
from ufbert.config.stored import FORMAT_VERSION, from_json
from ufbert.errors import UserError
from ufbert.options.given import Given
from ufbert.options.train import FREE_ON_RESUME, TrainOptions, with_run

CONFIG_FILE = "config.json"
"""What a run folder was made with."""


class StoredRun(NamedTuple):
    """What a run folder's config.json says beside the options."""

    started_at: float
    """Seconds since 1970."""
    prepared_data: dict[str, Any] | None
    """The rows in use: folder, fingerprint, vocab_size; None before they are there."""
    when_done: str
    """The command that was to be run at the end. Folders are handed around, so this one never is."""


def stored_run(folder: Path) -> StoredRun:
    """What a run folder says beside its options. Raises UserError if it is not one."""
    values, path = _read_config(folder), folder / CONFIG_FILE
    started_at, used, command = (values.get(name) for name in ("started_at", "prepared_data", "when_done"))
    kinds = {"folder": str, "fingerprint": str, "vocab_size": int}
    whole = used is None or (isinstance(used, dict) and all(type(used.get(k)) is kind for k, kind in kinds.items()))
    if not whole or not isinstance(started_at, int | float) or not isfinite(started_at):
        raise UserError(f"{path} is damaged: its prepared_data or started_at makes no sense; start a new run.")
    return StoredRun(float(started_at), used, command if isinstance(command, str) else "")


def stored_options(folder: Path) -> TrainOptions:
    """The options a run folder was made with, but for the command to run at the end. Raises UserError if it is not one."""
    values, path = _read_config(folder), folder / CONFIG_FILE
    options = {name: value for name, value in values.items() if name not in _NOT_OPTIONS}
    for name, value in options.items():
        kind = type(getattr(TrainOptions, name, value))
        if not isinstance(value, (int, float) if kind is float else kind) or (
            kind is not bool and isinstance(value, bool)
        ):
            raise UserError(f"{path} is damaged: {name} is {value!r}, which is not a {kind.__name__}; start a new run.")
    try:
        run = from_json(RunConfig, values["run"], str(path))
        return with_run(from_json(TrainOptions, options, str(path)), run)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}; start a new run.") from error


_NOT_OPTIONS = ("format", "format_version", "environment", "started_at", "prepared_data", "run", "when_done")


def _read_config(folder: Path) -> dict[str, Any]:
    """A run folder's config.json. Raises UserError if there is none, or none of a version that is known."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no run in {folder} to resume.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}; start a new run.") from error
    if not isinstance(values, dict) or values.get("format") != "ufbert-run":
        raise UserError(f"{folder} is not a run folder of ufbert, so it cannot be resumed.")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}; this ufbert reads {FORMAT_VERSION}. Resume it with its own."
        )
    return values


def resumed_options(given: Given, folder: Path) -> TrainOptions:
    """Return the stored options of a run with those given that may change.

    Raises UserError if one is given that says something else than the run began with.
    """
    stored = replace(stored_options(folder), out=str(folder))
    for name, value in given.items():
        outer, _, inner = name.partition(".")
        before = getattr(getattr(stored, outer), inner) if inner else getattr(stored, outer)
        if name not in FREE_ON_RESUME and before != value:
            raise UserError(f"{folder} was started with {name}={before}; it cannot be resumed with {name}={value}.")
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    return replace(stored, **{**free, "out": str(folder), "resume": True})

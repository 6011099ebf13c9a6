"""The file that describes a task of one's own: a JSON object, or a Python file that defines TASK."""

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from ufbert.errors import UserError, near_miss
from ufbert.glue.table_files import object_of_pairs

PATHS = ("train", "dev", "test")
"""Keys that name files, from the task file's folder."""


def read_task_file(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a task file, under the keys of `kinds`, with their types: str, tuple[str, ...] or bool | None.

    Raises UserError, naming the file, if it cannot be read or says something else.
    """
    values = _python_values(path) if path.suffix == ".py" else _json_values(path)
    if not isinstance(values, dict):
        raise UserError(
            f"{path} does not describe a task: it must be an object with {', '.join(kinds)}, or some of them."
        )
    found = {"name": path.stem} | {key: _value(path, str(key), value, kinds) for key, value in values.items()}
    return found | {key: str(path.parent / found[key]) for key in PATHS if found.get(key)}


def _value(path: Path, key: str, value: Any, kinds: Mapping[str, Any]) -> Any:
    if key not in kinds:
        raise UserError(f"{path}: {key!r} is unknown; {near_miss(key, kinds)}")
    if kinds[key] is str and isinstance(value, str):
        return value
    if kinds[key] == tuple[str, ...] and isinstance(value, list | tuple):
        if texts := [item for item in value if not isinstance(item, str | int | float)]:
            raise UserError(f"{path}: {key} must be a list of texts or numbers, without {texts[0]!r}.")
        return tuple(map(str, value))
    if kinds[key] == bool | None and isinstance(value, bool | NoneType):
        return value
    wanted = "a text" if kinds[key] is str else "true or false" if kinds[key] == bool | None else "a list"
    raise UserError(f"{path}: {key} must be {wanted}, not {value!r}.")


def _json_values(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=object_of_pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: broken JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error}).") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def _python_values(path: Path) -> Any:
    try:
        return runpy.run_path(str(path)).get("TASK")
    except FileNotFoundError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except Exception as error:  # it may raise anything
        raise UserError(f"{path} fails with {type(error).__name__}: {error}.") from error

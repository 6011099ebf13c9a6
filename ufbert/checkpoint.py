"""Training state on disk. The only file that imports orbax.

A checkpoint is a folder `checkpoints/<step>`; orbax writes it under a temporary name and renames it when it is whole.
"""

import shutil
from pathlib import Path
from typing import Any

from ufbert.errors import UserError


def save_checkpoint(folder: Path, step: int, state: Any, keep: int = 2) -> None:
    """Write `state`, a tree of arrays, as checkpoint `step`, then delete all but the newest `keep`.

    Raises UserError if the disk refuses.
    """
    from orbax.checkpoint import v1 as ocp

    try:
        ocp.save(str((folder / str(step)).absolute()), state, overwrite=True)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot write checkpoint {step} in {folder}: {error}.") from error
    for old in checkpoint_steps(folder)[:-keep]:
        shutil.rmtree(folder / str(old), ignore_errors=True)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def load_checkpoint(folder: Path, abstract: Any) -> tuple[int, Any] | None:
    """The newest readable checkpoint as (step, state) shaped like `abstract`, or None where there is none.

    Damaged ones are passed over. Raises UserError if there are checkpoints and none can be read.
    """
    from orbax.checkpoint import v1 as ocp

    problems = []
    for step in reversed(checkpoint_steps(folder)):
        try:
            return step, ocp.load(str((folder / str(step)).absolute()), abstract)
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged folder
            problems.append(f"{step}: {str(error).splitlines()[0]}")
    if problems:
        raise UserError(f"No checkpoint in {folder} can be read ({'; '.join(problems)}).")
    return None

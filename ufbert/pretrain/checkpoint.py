"""Training state on disk. The only file that imports orbax.

A checkpoint is a folder `checkpoints/<step>`, written in the background under a temporary name and renamed when it is whole.
The newest few stay, and the one with the lowest held-out loss. Each says of which configuration, tokenizer and data it is, and
what its files hold: `sizes.json` has the bytes and the CRC-32 of each.
"""

import logging
import math
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from msgspec import Meta

from ufbert.errors import UserError, first_line
from ufbert.runtime import distributed
from ufbert.runtime.files import write_json
from ufbert.runtime.typed import read_typed

Identity = dict[str, str]
"""The run that a checkpoint belongs to, {"configuration": hash, ...}: it is restored only if all values are equal."""


SIZES = "sizes.json"
_TEMPORARY = ("*.orbax-checkpoint-tmp*", "*.removed")
"""Leftovers of a checkpoint whose writing or removal was cut short by a kill."""


class Restored(NamedTuple):
    """A checkpoint in memory."""

    step: int
    state: Any
    spent: float
    """Seconds of the budget that were spent when it was saved."""


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, folder: Path, identity: Identity, keep: int) -> None:
        """Raises UserError if the folder cannot be made."""
        self.folder, self._identity, self._keep = folder, identity, keep
        # What these log as an error is raised as well, and no traceback must stand beside our sentence.
        for name in ("absl", "asyncio", "concurrent.futures"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if distributed.is_main():
                for path in (path for pattern in _TEMPORARY for path in folder.glob(pattern)):
                    _remove(path)
        except OSError as error:
            raise UserError(f"Cannot use the checkpoint folder {folder}: {error.strerror or error}.") from error
        self._watcher = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[float] | None = None
        self._damaged: set[int] = set()

    def save(self, step: int, state: Any, heldout_loss: float, spent: float) -> None:
        """Start to write `state`, a tree of arrays, as checkpoint `step`; the arrays may be donated afterwards.

        Waits for the save before it. Raises UserError if the disk refuses, at this save or the next call.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        began = time.monotonic()
        loss = heldout_loss if math.isfinite(heldout_loss) else sys.float_info.max  # JSON has no other word for it
        about: Any = {"identity": self._identity, "spent": spent, "heldout_loss": loss}
        context = ocp.Context()
        # Its writing threads wait five minutes for a folder that is made beside them, even where it could not be made.
        context.asynchronous.create_directories_asynchronously = False
        with _refusal(self.folder), context:
            if (self.folder / str(step)).is_file() and distributed.is_main():  # of which orbax would make nothing
                _remove(self.folder / str(step))
            under_way = ocp.save_async(
                str(self.folder.absolute() / str(step)), _without_empty(state), overwrite=True, custom_metadata=about
            )
        self._pending = self._watcher.submit(self._settle, step, under_way, began)

    def _settle(self, step: int, under_way: Any, began: float) -> float:
        """When a checkpoint is on disk, note what its files hold beside them, and remove those that it succeeds. Returns the
        seconds since `began`."""
        under_way.result()
        if distributed.is_main():
            write_json(self.folder / str(step) / SIZES, _contents(self.folder / str(step)))
            self._damaged.discard(step)
            self._prune()
        return time.monotonic() - began

    def _prune(self) -> None:
        """Remove all but the newest and the best. What could not be used counts for nothing and goes as well."""
        good = self.steps()
        best = min(good, key=lambda step: _loss(self.folder / str(step)))
        for step in self._stored():
            if step not in (*good[-self._keep :], best):
                _remove((self.folder / str(step)).rename(self.folder / f"{step}.removed"))

    def wait(self) -> float | None:
        """Return when everything is on disk: the seconds that the save under way took, or None where there is none.

        Raises UserError if it cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        with _refusal(self.folder):
            return pending.result()

    def close(self) -> None:
        """Finish the save under way; what it could not write is lost, as with a kill."""
        try:
            self.wait()
        finally:
            self._watcher.shutdown()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint which is not known to be damaged, oldest first."""
        return [step for step in self._stored() if step not in self._damaged]

    def _stored(self) -> list[int]:
        """Steps that have a checkpoint, good or not, oldest first."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir())
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def restore(self, abstract: Any, say: Callable[[str], None]) -> Restored | None:
        """The newest good checkpoint, shaped and placed like `abstract` (arrays with shardings), or None where there is none.

        Those that are damaged or belong to something else are passed over, each with a sentence to `say`. Raises UserError
        if there are checkpoints and none is good.
        """
        self.wait()
        refused = []
        for step in reversed(self._stored()):
            about = _about(self.folder / str(step)) if _is_whole(self.folder / str(step)) else None
            other = [name for name, value in self._identity.items() if about and about.identity.get(name) != value]
            if other:
                refused.append(f"checkpoint {step} is of another {' and '.join(other)}")
                continue
            state = self._load(step, abstract) if about else None
            if not distributed.highest(
                about is None or state is None
            ):  # what one cannot read is of no use to the others
                for reason in refused:
                    say(f"{reason}; the one of step {step} is used")
                return Restored(step, state, about.spent if about else 0.0)
            self._damaged.add(step)
            refused.append(f"checkpoint {step} is damaged or cut short")
        if refused:
            raise UserError(f"No checkpoint in {self.folder} can be used: {'; '.join(refused)}.")
        return None

    def _load(self, step: int, abstract: Any) -> Any:
        """The state of a checkpoint, or None if it cannot be read."""
        from orbax.checkpoint import v1 as ocp

        try:
            found = ocp.load(str(self.folder.absolute() / str(step)), _without_empty(abstract))
            return jax.tree.map(lambda like, leaf: _empty(like) if leaf is None else leaf, abstract, found)
        except Exception:  # orbax and tensorstore raise many kinds
            return None


def _without_empty(state: Any) -> Any:
    """Leave out arrays without numbers, such as the nodes of a tree of depth 0, which orbax does not write."""
    return jax.tree.map(lambda leaf: leaf if math.prod(leaf.shape) else None, state)


def _empty(like: Any) -> jax.Array:
    return jax.device_put(jnp.zeros(like.shape, like.dtype), like.sharding)


@dataclass(frozen=True)
class _About:
    """The metadata of a checkpoint, noted when it is saved."""

    identity: Identity
    spent: Annotated[float, Meta(ge=0, le=1e15)]
    heldout_loss: float | None = None


@dataclass(frozen=True)
class _Metadata:
    """The part of orbax's `_CHECKPOINT_METADATA` that is ours."""

    custom_metadata: _About


@dataclass(frozen=True)
class _Metrics:
    """`metrics/metrics`, where checkpoints once had their loss."""

    heldout_loss: float


def _about(folder: Path) -> _About | None:
    """Read what was noted with a checkpoint; None if it cannot be read."""
    with suppress(UserError):
        return read_typed(folder / "_CHECKPOINT_METADATA", _Metadata).custom_metadata
    return None


def _loss(folder: Path) -> float:
    """The held-out loss that a checkpoint was saved with; infinite if it cannot be read."""
    about = _about(folder)
    if about is not None and about.heldout_loss is not None:
        return about.heldout_loss
    with suppress(UserError):
        return read_typed(folder / "metrics" / "metrics", _Metrics).heldout_loss
    return math.inf


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _files(folder: Path) -> dict[str, Path]:
    """Every file of a checkpoint by its name, but for the list of them."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SIZES)
    return {path.relative_to(folder).as_posix(): path for path in files}


def _contents(folder: Path) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every file of a checkpoint, at about five gigabytes a second."""
    return {name: [path.stat().st_size, _crc(path)] for name, path in _files(folder).items()}


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def _is_whole(folder: Path) -> bool:
    """Check that a checkpoint's files hold what was written. Orbax notices some of that, but of the reads it has begun side by
    side it drops those that do not fail, and each complains on standard error when it ends. Earlier versions noted sizes alone,
    and a checkpoint whose writer was killed before it could note anything is left to Orbax."""
    try:
        if not (folder / SIZES).exists():
            return folder.is_dir()
        noted = read_typed(folder / SIZES, dict[str, int | list[int]])
        if noted and all(isinstance(value, int) for value in noted.values()):
            return noted == {name: (folder / name).stat().st_size for name in noted}
        contents = _contents(folder)  # what others put there is no damage
        return bool(noted) and noted == {name: contents.get(name) for name in noted}
    except (OSError, ValueError, UserError):
        return False


@contextmanager
def _refusal(folder: Path) -> Generator[None]:
    """Turns what orbax raises while it writes into one sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"Cannot write a checkpoint in {folder}: {first_line(error)}; earlier ones are kept."
        ) from error

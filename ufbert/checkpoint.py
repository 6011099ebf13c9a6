"""Training state on disk. The only file that imports orbax.

A checkpoint is a folder `checkpoints/<step>`, written in the background under a temporary name and renamed when it is whole.
The newest few stay, and the one with the lowest held-out loss. Each says of which configuration, tokenizer and data it is.
"""

import json
import logging
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ufbert import processes
from ufbert.errors import UserError
from ufbert.writers import write_json

Identity = dict[str, str]
"""What a checkpoint belongs to, {"configuration": hash, "tokenizer": hash, ...}: it is restored only where all are equal."""


SIZES = "sizes.json"


class Restored(NamedTuple):
    """A checkpoint in memory."""

    step: int
    state: Any
    spent: float
    """Seconds of the budget that were spent when it was saved."""


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, folder: Path, identity: Identity, keep: int) -> None:
        from orbax.checkpoint import v1 as ocp

        policies = ocp.training.preservation_policies
        best: Any = policies.BestN(get_metric_fn=lambda metrics: metrics["heldout_loss"], n=1, reverse=True)
        newest: Any = policies.LatestN(keep)
        either: Any = policies.AnyPreservationPolicy([newest, best])
        # What it logs as an error it raises as well, and no traceback must stand beside our sentence.
        for name in ("absl", "asyncio", "concurrent.futures"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        context = ocp.Context()
        # Its writing threads wait five minutes for a folder that is made beside them, even where it could not be made.
        context.asynchronous.create_directories_asynchronously = False
        self.folder, self._identity = folder, identity
        try:
            self._writer = ocp.training.Checkpointer(
                str(folder.absolute()),
                preservation_policy=either,
                cleanup_tmp_directories=True,
                context=context,
            )
        except OSError as error:
            raise UserError(f"Cannot use the checkpoint folder {folder}: {error.strerror or error}.") from error
        self._watcher = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[float] | None = None

    def save(self, step: int, state: Any, heldout_loss: float, spent: float) -> None:
        """Start to write `state`, a tree of arrays, as checkpoint `step`; the arrays may be donated afterwards.

        Waits for the save before it. Raises UserError if the disk refuses, at this save or the next call.
        """
        self.wait()
        began = time.monotonic()
        about: Any = {"identity": self._identity, "spent": spent}
        with _refusal(self.folder):
            under_way = self._writer.save_async(
                step, state, force=True, overwrite=True, metrics={"heldout_loss": heldout_loss}, custom_metadata=about
            )
        self._pending = self._watcher.submit(self._settle, step, under_way, began)

    def _settle(self, step: int, under_way: Any, began: float) -> float:
        """When a checkpoint is on disk, note the sizes of its files beside them. Returns the seconds since `began`."""
        under_way.result()
        if processes.is_main():
            folder = self.folder / str(step)
            write_json(folder / SIZES, _sizes(folder))
        return time.monotonic() - began

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
            with suppress(Exception):  # it raises once more what the save raised
                self._writer.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def restore(self, abstract: Any, say: Callable[[str], None]) -> Restored | None:
        """The newest good checkpoint, shaped and placed like `abstract` (arrays with shardings), or None where there is none.

        Those that are damaged or belong to something else are passed over, each with a sentence to `say`. Raises UserError
        if there are checkpoints and none is good.
        """
        self.wait()
        refused = []
        for step in reversed(self.steps()):
            try:
                about: Any = self._writer.metadata(step).custom_metadata or {}
            except Exception:  # orbax and tensorstore raise many kinds for a damaged folder
                about = {}
            other = [name for name, value in self._identity.items() if about.get("identity", {}).get(name) != value]
            if not about or not _whole(self.folder / str(step)):
                refused.append(f"checkpoint {step} is damaged or cut short")
            elif other:
                refused.append(f"checkpoint {step} is of another {' and '.join(other)}")
            else:
                state = self._load(step, abstract)
                if not processes.highest(state is None):  # what one cannot read is of no use to the others
                    for reason in refused:
                        say(f"{reason}; the one of step {step} is used")
                    return Restored(step, state, float(about["spent"]))
                refused.append(f"checkpoint {step} is damaged or cut short")
        if refused:
            raise UserError(f"No checkpoint in {self.folder} can be used: {'; '.join(refused)}.")
        return None

    def _load(self, step: int, abstract: Any) -> Any:
        """The state of a checkpoint, or None if it cannot be read."""
        try:
            return self._writer.load(step, abstract)
        except Exception:  # orbax and tensorstore raise many kinds
            return None


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a checkpoint, but for the list of them."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SIZES)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _whole(folder: Path) -> bool:
    """Whether a checkpoint's files have the sizes they were written with. Orbax would notice too, but of the reads it has begun
    side by side it drops those that do not fail, and each complains on standard error when it ends. A checkpoint whose
    writer was killed before it could note the sizes is left to Orbax."""
    try:
        return json.loads((folder / SIZES).read_text(encoding="utf-8")) == _sizes(folder)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


@contextmanager
def _refusal(folder: Path) -> Generator[None]:
    """Turns what orbax raises while it writes into one sentence."""
    try:
        yield
    except Exception as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"Cannot write a checkpoint in {folder}: {cause}; earlier ones are kept.") from error

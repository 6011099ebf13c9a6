"""Keeping an eye on a run: requests to stop, updates that are not finite, and the curve it should be on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ufbert.config.presets import preset_folder
from ufbert.errors import UserError
from ufbert.runtime.metrics import EvaluationRecord
from ufbert.runtime.run_folder import read_summary
from ufbert.runtime.typed import read_lines, read_typed


class Point(NamedTuple):
    """A held-out evaluation of a reference run."""

    share: float
    """Of the budget."""
    tokens: float
    gain: float
    """Nats below the loss of guessing by word frequency."""


class Reference(NamedTuple):
    """The curve of a run that went well."""

    name: str
    points: tuple[Point, ...]

    def complaint(self, now: Point) -> str | None:
        """A sentence if a run at `now` is far below this curve; None if it is not, or if it has seen too little to tell.

        The gain at a share of the budget grows with the number of tokens, so a run is held to a reference that had seen no
        more, from a tenth of the budget on. Far below is less than three quarters of the gain, and by at least 0.3 nats.
        """
        shares = [point.share for point in self.points]
        if not shares or now.share < 0.1:
            return None
        tokens, gain = (
            float(np.interp(now.share, shares, [getattr(p, name) for p in self.points])) for name in ("tokens", "gain")
        )
        if now.tokens < tokens or now.gain >= gain - max(0.3, 0.25 * gain):
            return None
        return (
            f"off track: at {now.share:.0%} of its budget {self.name} was {gain:.2f} nats below word frequency after "
            f"{tokens / 1e6:.1f} M tokens, this run is {now.gain:.2f} below after {now.tokens / 1e6:.1f} M; consider another "
            "learning rate (--train.peak-lr) or a look at the text"
        )


def no_reference_complaint(now: Point) -> str | None:
    """Return a sentence if a run has learnt no more than word frequency in half of its budget, else None."""
    if now.share < 0.5 or now.gain > 0.1:
        return None
    return f"off track: half of the budget is spent and the loss is only {now.gain:.2f} nats below word frequency"


def packaged_reference(config: str, scale: str, recipe: str) -> Reference | None:
    """The curve that was measured for a preset, or None."""
    path = preset_folder() / "reference_curves.json"
    known = read_typed(path, dict[str, tuple[Point, ...]]) if path.is_file() else {}
    name = f"{config} {scale} {recipe}"
    return Reference(name, known[name]) if name in known else None


def reference_from_run(folder: Path) -> Reference:
    """The curve of a finished run. Raises UserError if the folder holds none."""
    try:
        unigram = read_summary(folder).unigram_loss
        evals = read_lines(folder / "metrics.jsonl", EvaluationRecord)
        return Reference(str(folder), tuple(Point(r.fraction, r.tokens, unigram - r.heldout_loss) for r in evals))
    except UserError as error:
        raise UserError(f"{folder} does not hold a finished run to compare with: {error}") from error

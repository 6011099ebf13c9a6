"""The page of a run while it trains, drawn only as often as it costs next to nothing."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ufbert.errors import UserError, first_line
from ufbert.report.run_report import write_report

SHARE = 0.01
"""Largest share of a session's time that its pages may take."""
FIRST_GUESS = 2.0
"""Seconds that a page is taken to cost before one has been drawn. Of a long run, reading the metrics takes the most."""
LAST = 0.95
"""Share of the budget after which no page is drawn, for the last one comes at the end. A page takes at most a hundredth of the
time spent, which is less than what is left before: so none can delay the end of the budget."""


def draw_running(folder: Path) -> Path:
    """Draw the page of a run that this process trains. Raises UserError if the disk refuses."""
    return write_report(folder, at_work=True)


class RunningPage:
    """Draws `report.html` again and again while a run trains.

    A page that takes `c` seconds is drawn when at least 100 c have passed since the last one, or since the session began.
    """

    def __init__(
        self,
        folder: Path,
        draw: Callable[[Path], Any] = draw_running,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._draw, self._now = folder, draw, now
        self._cost, self._last = FIRST_GUESS, now()

    def refresh(self, fraction: float, say: Callable[[str], None]) -> bool:
        """Draw the page, if that is cheap enough at this share of the budget. Returns true if it was drawn.

        A page that cannot be drawn is said once, to `say`, and no other is tried: the run goes on.
        """
        began = self._now()
        if fraction > LAST or self._cost > SHARE * (began - self._last):
            return False
        try:
            self._draw(self._folder)
        except (UserError, OSError, ValueError, RuntimeError, ImportError) as error:
            say(f"report.html is not drawn while the run trains: {first_line(error)}")
            self._cost = float("inf")
            return False
        self._last = self._now()
        self._cost = self._last - began
        return True

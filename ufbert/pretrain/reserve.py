"""What the end of a run will cost, told from what its parts have cost so far.

Pure arithmetic on measured seconds: nothing here asks a clock, so tests drive it with made-up ones. Two things must hold at
once. The end costs more on a machine that has become slow. So a cost is remembered in seconds and in units of work (the time
that a token of a step took at that moment), and counts as the larger of its seconds and its units at the present pace. And one
stall says nothing about the end: the pace is a median over pieces of work, a cost the lower median of its last three.

No estimate can foresee a machine that slows down or stops after the last step has begun: a run is late by what that adds to
its end. One that slows down for good is known to be slow after three pieces of work. A stall in the first piece of all looks
like a slow machine.
"""

from collections import deque
from statistics import median_low

PIECE = 0.5
"""Seconds of steps that make a piece of work: time slices last some milliseconds, as do a small model's steps."""
PIECES = 5
MEASURED = 3
ALWAYS = 1.0
"""Seconds kept in any case, for what is never measured: writing the summary, waiting for a time slice."""


def guessed_save_seconds(n_bytes: int | float) -> float:
    """Guess what saving a training state of `n_bytes` bytes takes, until it is measured."""
    return 0.5 + n_bytes / 200e6


class Cost:
    """A part of the end: its last few measured seconds, and the pace at which each was measured."""

    def __init__(self) -> None:
        self._measured: deque[tuple[float, float | None]] = deque(maxlen=MEASURED)

    @property
    def is_known(self) -> bool:
        return bool(self._measured)

    def measured(self, seconds: float, pace: float | None) -> None:
        """Note what it has cost; `pace` is None before the first step is measured."""
        self._measured.append((seconds, pace))

    def expected(self, pace: float | None) -> float:
        """Return the seconds it will cost at the present pace; 0 before it is measured."""
        if not self._measured:
            return 0.0
        # What was measured before the first step is taken to have been measured at the first known pace.
        self._measured = deque(((seconds, then or pace) for seconds, then in self._measured), MEASURED)
        seconds = median_low([seconds for seconds, _ in self._measured])
        if pace is None:
            return seconds
        return max(seconds, pace * median_low([seconds / (then or pace) for seconds, then in self._measured]))


class EndCosts:
    """What the end of a run is expected to cost."""

    def __init__(self, save_guess: float, evaluations: int = 1) -> None:
        """Begin with a guess of what a save takes, in seconds; the end has that many evaluations."""
        self._save_guess, self._evaluations = save_guess, evaluations
        self._paces: deque[float] = deque(maxlen=PIECES)
        self._seconds, self._tokens, self._step_tokens = 0.0, 0, 0
        self._evaluation, self._save = Cost(), Cost()

    @property
    def pace(self) -> float | None:
        """Seconds that a token of a step takes at present, or None before the first step is measured."""
        return median_low(self._paces) if self._paces else None

    @property
    def knows_saves(self) -> bool:
        """True once a save is measured."""
        return self._save.is_known

    def stepped(self, seconds: float, tokens: int) -> None:
        """Note a step."""
        self._seconds, self._tokens, self._step_tokens = self._seconds + seconds, self._tokens + tokens, tokens
        if self._seconds >= PIECE or not self._paces:
            self._paces.append(max(self._seconds, 1e-6) / self._tokens)
            self._seconds, self._tokens = 0.0, 0

    def evaluated(self, seconds: float) -> None:
        """Note a held-out evaluation, without what compiling it took."""
        self._evaluation.measured(seconds, self.pace)

    def saved(self, seconds: float) -> None:
        """Note a checkpoint, from its beginning to the last byte on disk."""
        self._save.measured(seconds, self.pace)

    def reserve(self) -> float:
        """Return the seconds to keep for the end: steps in flight, the last evaluations, the last checkpoint, and the model
        folder, which is a part of one. The factors leave room for a pace that varies."""
        pace = self.pace
        step = (pace or 0.0) * self._step_tokens
        save = self._save.expected(pace) if self.knows_saves else self._save_guess
        return ALWAYS + 2.0 * step + 1.5 * self._evaluations * self._evaluation.expected(pace) + 1.5 * save

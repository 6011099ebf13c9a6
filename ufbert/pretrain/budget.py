"""The budget of a run and the clock that spends it.

Everything that changes during a run (learning rate, batch size, evaluations, checkpoints) is a function of
`clock.fraction(step)`: steps over all steps, or the seconds spent over those that are left without the end. The end is
`clock.done(step)`.
"""

import contextlib
import json
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Annotated

from msgspec import Meta

from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.runtime import console, distributed
from ufbert.runtime.typed import read_lines

_UNITS = {"w": 604_800.0, "d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_NUMBER = r"(\d+(?:\.\d+)?)"
MOST_SECONDS, MOST_STEPS = 1e9, 1e12
"""Largest budgets."""


@dataclass(frozen=True)
class Budget:
    """Seconds or steps; exactly one is set."""

    seconds: float | None = None
    steps: int | None = None


def parse_budget(text: str) -> Budget:
    """Parse `1d`, `24h`, `90m`, `300s`, `1d12h` (units from the largest down, of w, d, h, m, s) or `200steps`.

    Raises UserError for anything else, and for a budget of nothing.
    """
    steps = re.fullmatch(rf"{_NUMBER}steps?", text.strip())
    times = re.fullmatch("".join(rf"(?:{_NUMBER}{unit})?" for unit in _UNITS), text.strip())
    if steps is not None:
        amount = float(steps[1])
    elif times is not None and any(times.groups()):
        amount = sum(float(n or 0) * unit for n, unit in zip(times.groups(), _UNITS.values(), strict=True))
    else:
        raise UserError(
            f"{shown(text)} is not a budget; write weeks, days, hours, minutes, seconds or updates: 1w, 1d, 24h, 90m, 300s, "
            "1d12h, 200steps."
        )
    if amount > (MOST_SECONDS if steps is None else MOST_STEPS):
        raise UserError(
            f"A budget of {shown(text)} is too large; it may have {MOST_SECONDS:.0e} s or {MOST_STEPS:.0e} steps."
        )
    if amount <= 0:
        raise UserError(f"A budget of {text} trains nothing; give it at least a second or a step.")
    if steps is None:
        return Budget(seconds=amount)
    if amount != int(amount):
        raise UserError(f"{text!r} is not a whole number of steps.")
    return Budget(steps=int(amount))


class Clock(ABC):
    """The time of a run. It starts at its construction, or at `started`, a time.monotonic() reading."""

    def __init__(
        self,
        seconds: float | None,
        spent_before: float,
        started: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seconds`: the whole budget, if it is one of time. `spent_before`: what earlier sessions of the run used of it."""
        self.seconds, self.spent_before, self._now = seconds, spent_before, now
        self._started, self._reserve = now() if started is None else started, 0.0

    @abstractmethod
    def fraction(self, step: int) -> float:
        """Return the share of the training budget spent when `step` begins, in [0, 1]; it never decreases."""

    @abstractmethod
    def done(self, step: int) -> bool:
        """Tell whether `step` must not begin."""

    @abstractmethod
    def left(self, step: int) -> str:
        """Say what is left of the budget."""

    def reserve(self, seconds: float) -> None:
        """Keep this much of the end for the last evaluation and the last save."""
        self._reserve = seconds

    def spent(self) -> float:
        """Return the seconds used so far, earlier sessions of the run included."""
        return self.spent_before + self._now() - self._started


class StepClock(Clock):
    """A budget of steps: the same numbers on every run, however fast the machine is.

    It ends early at `deadline`, a time.monotonic() reading, less what is reserved.
    """

    def __init__(self, steps: int, spent_before: float = 0.0, deadline: float | None = None) -> None:
        super().__init__(None, spent_before)
        self.steps, self._deadline = steps, deadline

    def fraction(self, step: int) -> float:
        return min(1.0, step / self.steps)

    def done(self, step: int) -> bool:
        late = self._deadline is not None and self._now() >= self._deadline - self._reserve
        return late or step >= self.steps

    def left(self, step: int) -> str:
        return f"{max(0, self.steps - step):,} steps left"


class WallClock(Clock):
    """A budget of seconds, to the end of the last save; restarts go on from `spent_before`.

    If `deadline`, a time.monotonic() reading, comes first, the budget is what can be spent until then, so that the learning
    rate is at its end by that time.
    """

    def __init__(
        self,
        seconds: float,
        spent_before: float = 0.0,
        started: float | None = None,
        deadline: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(seconds, spent_before, started, now)
        if deadline is not None:
            seconds = min(seconds, spent_before + deadline - self._started)
        self.seconds = self._budget = seconds
        self._furthest = 0.0

    def fraction(self, step: int) -> float:
        trainable = max(1e-9, self._budget - self._reserve)
        self._furthest = max(self._furthest, min(1.0, self.spent() / trainable))
        return self._furthest

    def done(self, step: int) -> bool:
        return self.spent() >= self._budget - self._reserve

    def left(self, step: int) -> str:
        return f"{console.clock(max(0, int(self._budget - self.spent())))} left"


class AgreedClock(Clock):
    """The clock of process 0, on every process. All must ask it the same questions in the same order."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(None if clock.seconds is None else distributed.from_main(clock.seconds), clock.spent_before)
        self._clock = clock

    def fraction(self, step: int) -> float:
        return distributed.from_main(self._clock.fraction(step))

    def done(self, step: int) -> bool:
        return bool(distributed.from_main(float(self._clock.done(step))))

    def left(self, step: int) -> str:
        return self._clock.left(step)

    def reserve(self, seconds: float) -> None:
        self._clock.reserve(seconds)

    def spent(self) -> float:
        return self._clock.spent()


class Ledger:
    """`ledger.jsonl`: a line a second with what the current session has spent, so that a kill loses a second at most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sessions = _read_sessions(path)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def spent_before(self) -> float:
        """Seconds that all earlier sessions used."""
        return sum(self.sessions.values(), 0.0)

    def charge(self, seconds: float) -> None:
        """Note what an earlier session spent whose own lines are lost."""
        session = max(self.sessions, default=0) + 1
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"session": session, "spent": round(seconds, 3)}) + "\n")
        self.sessions[session] = seconds

    def start(self, clock: Clock) -> None:
        """Write the current session's time by `clock` every second from now on, until `close`."""
        session, before = max(self.sessions, default=0) + 1, self.spent_before

        def write() -> None:
            while True:
                last = self._stop.is_set()
                line = json.dumps({"session": session, "spent": round(clock.spent() - before, 3)})
                # A full disk stops the run elsewhere, with a sentence; here the next second may find room again.
                with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
                if last:
                    return
                self._stop.wait(1.0)

        self._thread = threading.Thread(target=write, name="ledger", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write a last line and stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


@dataclass(frozen=True)
class _Line:
    """A line of the ledger."""

    session: Annotated[int, Meta(ge=1, lt=2**31)]
    spent: Annotated[float, Meta(ge=0, le=MOST_SECONDS)]
    """Seconds."""


def _read_sessions(path: Path) -> dict[int, float]:
    sessions: dict[int, float] = {}
    for line in read_lines(path, _Line):  # without what a kill has cut short
        sessions[line.session] = max(line.spent, sessions.get(line.session, 0.0))
    return sessions


# The end of a run costs an evaluation and a save, which must fit into the budget. Two things must hold at once. The end costs
# more on a machine that has become slow: so a cost is remembered in seconds and in units of work (the time that a token of a
# step took at that moment), and counts as the larger of its seconds and its units at the present pace. And one stall says
# nothing about the end: the pace is a median over pieces of work, a cost the lower median of its last three. No estimate can
# foresee a machine that slows down after the last step has begun: a run is late by what that adds to its end.

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
    """The expected costs of the end of a run."""

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

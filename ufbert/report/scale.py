"""Axes: which numbers stand at which place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

Real = float | int


class Tick(NamedTuple):
    """A number on an axis, and how it is written."""

    value: Real
    words: str


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`."""

    low: Real
    high: Real
    ticks: Sequence[Tick]
    log: bool = False

    def at(self, value: Real) -> float:
        """Return the place of a value in percent of the axis."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return 100.0 * (value - low) / (high - low)

    def wider(self, share: float) -> "Scale":
        """Return the axis with more room at both ends."""
        if self.log:
            more = (self.high / self.low) ** share
            return replace(self, low=self.low / more, high=self.high * more)
        more = share * (self.high - self.low)
        return replace(self, low=self.low - more, high=self.high + more)

    @property
    def percents(self) -> list[tuple[float, str]]:
        """Place in percent and words of every tick."""
        return [(self.at(tick.value), tick.words) for tick in self.ticks]


def linear_scale(values: Sequence[Real], most: int = 5) -> Scale:
    """Return an axis that holds all values, with at most about `most` round numbers."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low, high, [Tick(k * step, short(k * step)) for k in range(first, last + 1)])


def log_scale(values: Sequence[Real]) -> Scale:
    """Return a logarithmic axis that holds all values, which are above 0."""
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    if not high > low:
        low, high = low / 1.5, high * 1.5
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for parts in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), tuple(map(float, range(1, 10)))):
        ticks = [v for k in decades for m in parts if low <= (v := m * 10.0**k) * (1 + 1e-12) <= high * (1 + 2e-12)]
        if len(ticks) >= 3:
            break
    if len(ticks) < 2:  # within less than a step of the finest
        return replace(linear_scale([low, high], 4), log=True)
    ticks = ticks[:: math.ceil(len(ticks) / 6)]
    return Scale(low, high, [Tick(v, short(v)) for v in ticks], log=True)


def short(value: Real) -> str:
    """Write a number in as few characters as four digits need: `12,300`, `0.25`, `2e-05`."""
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        digits = 0 if abs(value) >= 1000 else max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        words = f"{value:,.{digits}f}"
        return words.rstrip("0").rstrip(".") if "." in words else words
    return f"{value:.3g}"

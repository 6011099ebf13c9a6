"""One line of progress: a bar, what has been done, how fast, and what is left."""

import time

from ufbert.data.text_files import Meter

_WIDTH = 24


class Progress:
    """Progress of one pass over a corpus, by bytes read, or by tokens where only `max_tokens` says how many will be."""

    def __init__(self, meter: Meter | None, max_tokens: int) -> None:
        self._meter, self._max_tokens, self._began = meter, max_tokens, time.monotonic()

    def share(self, tokens: int) -> float | None:
        """The share that is done, or None if nobody can know."""
        shares = []
        if self._meter is not None and self._meter.total:
            shares.append(self._meter.read / self._meter.total)
        if self._max_tokens:
            shares.append(tokens / self._max_tokens)
        return min(1.0, max(shares)) if shares else None

    def line(self, documents: int, tokens: int) -> str:
        """The line to show after `documents` documents and `tokens` tokens."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        done = f"{documents:,} documents, {tokens / 1e6:,.1f} M tokens, {tokens / seconds / 1e3:,.0f} k tokens/s"
        share = self.share(tokens)
        if share is None:
            return f"tokenising: {done}"
        bar = "#" * round(share * _WIDTH)
        left = f", {_clock(seconds * (1 - share) / share)} left" if share > 0 else ""
        of = f" of {self._meter.total / 1e6:,.1f} MB" if self._meter is not None and self._meter.total else ""
        return f"tokenising [{bar:.<{_WIDTH}}] {share:.0%}{of}: {done}{left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

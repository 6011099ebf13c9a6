"""Tokenised documents between the two passes: ids in one file on disk, two numbers a document in memory."""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 14
"""Spans that are looked at together."""
_READ_TOKENS = 1 << 22
"""Tokens that are read together."""


class Spans(NamedTuple):
    """Stretches of the stored ids, in the order in which they are to be read."""

    starts: np.ndarray
    """Position of the first id of each, (spans,) int64."""
    lengths: np.ndarray
    """Ids in each, (spans,) int64."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def pick(self, which: np.ndarray) -> "Spans":
        """Select spans by a mask or by their numbers."""
        return Spans(self.starts[which], self.lengths[which])

    def cut(self, tokens: int) -> tuple["Spans", "Spans"]:
        """Split off the first `tokens` ids; the span at the edge is divided."""
        ends = np.cumsum(self.lengths)
        at = int(np.searchsorted(ends, tokens))
        inside = tokens - int(ends[at] - self.lengths[at])
        head = Spans(self.starts[: at + 1].copy(), self.lengths[: at + 1].copy())
        tail = Spans(self.starts[at:].copy(), self.lengths[at:].copy())
        head.lengths[-1] = inside
        tail.starts[0] += inside
        tail.lengths[0] -= inside
        return head, tail


class DocumentStore:
    """A file of documents, each as `[CLS] ids [SEP]`, 2 bytes an id."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._lengths, self._characters = array("I"), array("I")
        self.tokens = 0
        """Ids stored."""

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, ids: np.ndarray, lengths: np.ndarray, characters: np.ndarray) -> None:
        """Add documents: their ids end to end, (total,) uint16, and the number of ids and characters of each."""
        self._file.write(ids.tobytes())
        self._lengths.frombytes(lengths.astype(np.uint32).tobytes())
        self._characters.frombytes(characters.astype(np.uint32).tobytes())
        self.tokens += len(ids)

    def finish(self) -> tuple[Spans, np.ndarray]:
        """Return a span for each document, and each document's number of characters, (docs,) uint32."""
        self._file.flush()
        lengths = np.array(self._lengths, np.int64)
        return Spans(np.cumsum(lengths) - lengths, lengths), np.array(self._characters, np.uint32)

    def read(self, spans: Spans) -> Iterator[np.ndarray]:
        """Read the ids of the spans, end to end, in pieces of about `_READ_TOKENS`."""
        # Spans that follow one another on disk are read together. The file is not mapped into memory, because the pages of a
        # map would count as resident memory.
        for first in range(0, len(spans.lengths), _CHUNK):
            starts, lengths = (part[first : first + _CHUNK] for part in spans)
            breaks = np.flatnonzero(starts[1:] != starts[:-1] + lengths[:-1]) + 1
            run_starts = starts[np.concatenate([[0], breaks])]
            run_lengths = np.add.reduceat(lengths, np.concatenate([[0], breaks]))
            pieces: list[np.ndarray] = []
            waiting = 0
            for start, length in zip(run_starts.tolist(), run_lengths.tolist(), strict=True):
                for at in range(start, start + length, _READ_TOKENS):
                    size = min(_READ_TOKENS, start + length - at)
                    pieces.append(np.frombuffer(os.pread(self._file.fileno(), 2 * size, 2 * at), np.uint16))
                    waiting += size
                    if waiting >= _READ_TOKENS:
                        yield np.concatenate(pieces)
                        pieces, waiting = [], 0
            if pieces:
                yield np.concatenate(pieces)

    def close(self) -> None:
        self._file.close()

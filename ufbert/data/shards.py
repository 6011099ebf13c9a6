"""Rows of ids on disk, in files of at most 256 MiB that are mapped into memory, and the order in which a run reads them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from ufbert.errors import UserError
from ufbert.runtime.typed import Count

SHARD_BYTES = 256 * 2**20
"""Largest size of a shard, unless a single row is larger."""


@dataclass(frozen=True)
class Shard:
    """A file of 2-byte little-endian ids, row after row."""

    name: str
    rows: Count
    sha256: str

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise UserError(f"the shard {self.name!r} is not a file of the folder itself.")


class RowWriter:
    """Writes a stream of ids as rows of `seq_len`, shard after shard. A tail that does not fill a row is dropped."""

    def __init__(self, folder: Path, stem: str, seq_len: int) -> None:
        self.folder, self.stem, self.seq_len = folder, stem, seq_len
        self.rows_per_shard = max(1, SHARD_BYTES // (2 * seq_len))
        self.shards: list[Shard] = []
        self._left = np.zeros(0, "<u2")
        self._file, self._rows, self._digest = None, 0, hashlib.sha256()

    def append(self, ids: np.ndarray) -> None:
        """Add ids, (any,) uint16, to the stream."""
        ids = np.concatenate([self._left, ids]) if len(self._left) else ids
        whole = len(ids) // self.seq_len * self.seq_len
        self._left = ids[whole:].copy()
        rows = ids[:whole].reshape(-1, self.seq_len)
        while len(rows):
            if self._file is None:
                self._file = (self.folder / self._name).open("wb")
            part, rows = np.split(rows, [self.rows_per_shard - self._rows])
            block = part.astype("<u2", copy=False).tobytes()
            self._file.write(block)
            self._digest.update(block)
            self._rows += len(part)
            if self._rows == self.rows_per_shard:
                self._finish_shard()

    @property
    def _name(self) -> str:
        return f"{self.stem}-{len(self.shards):05}.bin"

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self.shards.append(Shard(self._name, self._rows, self._digest.hexdigest()))
        self._file, self._rows, self._digest = None, 0, hashlib.sha256()

    def close(self) -> list[Shard]:
        """Finish the last shard and return all of them."""
        self._finish_shard()
        return self.shards

    def abandon(self) -> None:
        """Close the file that is being written, unless it is finished."""
        if self._file is not None:
            self._file.close()


class Rows:
    """The rows of several shards as one sequence. Nothing is read until rows are taken."""

    def __init__(self, folder: Path, shards: Sequence[Shard], seq_len: int) -> None:
        """Raises UserError if a shard is missing or has another size than it should."""
        self.seq_len = seq_len
        self._maps = [_map(folder / shard.name, shard.rows, seq_len) for shard in shards]
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: Int[np.ndarray, " n"]) -> Int32[np.ndarray, "n t"]:
        """Read the rows of these numbers, in this order."""
        if len(self._maps) == 1:
            return self._maps[0][rows].astype(np.int32)
        ids = np.empty((len(rows), self.seq_len), np.int32)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shards):
            picks = np.flatnonzero(shards == shard)
            ids[picks] = self._maps[shard][rows[picks] - self._starts[shard]]
        return ids

    def __getitem__(self, rows: Int[np.ndarray, " n"]) -> Int32[np.ndarray, "n t"]:
        return self.take(rows)

    def blocks(self, rows: int = 65536) -> Iterator[np.ndarray]:
        """Read all rows in order, as arrays (at most `rows`, t) of 2-byte ids."""
        for shard in self._maps:
            for start in range(0, len(shard), rows):
                yield shard[start : start + rows]


class RowOrder:
    """Row numbers in training order: a seeded shuffle of every epoch, or the order in which rows are stored.

    Position p of the endless order is a function of (n_rows, seed, shuffled, p) alone, so that a run resumes from p.
    """

    def __init__(self, n_rows: int, seed: int, shuffled: bool = True) -> None:
        self.n_rows, self.seed, self.shuffled = n_rows, seed, shuffled
        self._epoch, self._permutation = -1, np.zeros(0, np.int64)

    def take(self, position: int, count: int) -> np.ndarray:
        """Return the row numbers at positions position ... position + count - 1, shape (count,)."""
        parts = []
        while count > 0:
            epoch, start = divmod(position, self.n_rows)
            if self.shuffled and epoch != self._epoch:
                self._epoch = epoch
                self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            stop = min(start + count, self.n_rows)
            parts.append(self._permutation[start:stop] if self.shuffled else np.arange(start, stop))
            position, count = position + stop - start, count - (stop - start)
        return np.concatenate(parts)


def _map(path: Path, rows: int, seq_len: int) -> np.ndarray:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; delete its folder to prepare the data anew.") from error
    if size != rows * seq_len * 2:
        raise UserError(
            f"{path} has {size} bytes instead of {rows * seq_len * 2}; delete its folder to prepare the data anew."
        )
    return np.memmap(path, "<u2", "r", shape=(rows, seq_len))


def verify(folder: Path, shards: Sequence[Shard]) -> None:
    """Read every shard, several at a time, and compare its checksum. Raises UserError for the first that differs."""

    def digest(shard: Shard) -> str:
        with (folder / shard.name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for shard, checksum in zip(shards, pool.map(digest, shards), strict=True):
            if checksum != shard.sha256:
                raise UserError(
                    f"{folder / shard.name} is damaged (its checksum differs); delete its folder to prepare the data anew."
                )

"""The order in which rows are seen, which one integer can resume: a seeded shuffle of every epoch, or as they are stored."""

import numpy as np


class RowOrder:
    """Row numbers in training order. Position p of the endless order is a function of (n_rows, seed, shuffled, p) alone."""

    def __init__(self, n_rows: int, seed: int, shuffled: bool = True) -> None:
        self.n_rows, self.seed, self.shuffled = n_rows, seed, shuffled
        self._epoch, self._shuffled = -1, np.zeros(0, np.int64)

    def take(self, position: int, count: int) -> np.ndarray:
        """Row numbers at positions position ... position + count - 1, shape (count,)."""
        picked = []
        while count > 0:
            epoch, start = divmod(position, self.n_rows)
            if self.shuffled and epoch != self._epoch:
                self._epoch = epoch
                self._shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
            stop = min(start + count, self.n_rows)
            part = self._shuffled[start:stop] if self.shuffled else np.arange(start, stop)
            picked.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(picked)

"""How far chance alone moves the difference of two models: draws of dev rows and of seeds, with replacement.

Rows and seeds are drawn independently of each other, which is Owen's "pigeonhole bootstrap" (2007): where both matter, its
intervals are a little too wide rather than too narrow. The interval is the percentile one (Efron and Tibshirani 1993, ch. 13).
"""

from collections.abc import Callable, Sequence

import numpy as np

DRAWS = 1000


def resampled_scores(
    metric: Callable[[np.ndarray, np.ndarray], float],
    predicted: Sequence[np.ndarray],
    labels: np.ndarray,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Scores (draws, seeds) on bootstrap samples of the dev rows, for each of several predictions (seeds, rows).

    One draw is the same rows for all of them.
    """
    found = [np.empty((DRAWS, len(each))) for each in predicted]
    for draw in range(DRAWS):
        picks = rng.integers(len(labels), size=len(labels))
        for scores, each in zip(found, predicted, strict=True):
            scores[draw] = [metric(row[picks], labels[picks]) for row in each]
    return found


def interval(first: np.ndarray, other: np.ndarray, paired: bool, rng: np.random.Generator) -> tuple[float, float]:
    """The middle 95 % of median(other) - median(first) over draws, each with seeds drawn with replacement.

    `first` and `other` are scores (draws, seeds); `paired` says that their seeds are the same, and then so are the drawn ones.
    """
    picks = rng.integers(first.shape[1], size=first.shape)
    others = picks if paired else rng.integers(other.shape[1], size=other.shape)
    medians = [np.median(np.take_along_axis(*pair, axis=1), axis=1) for pair in ((first, picks), (other, others))]
    low, high = np.quantile(medians[1] - medians[0], [0.025, 0.975])
    return float(low), float(high)

"""GLUE's metrics, as numbers between -1 and 1, and how far chance alone moves the difference of two models."""

from collections.abc import Callable, Sequence

import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of equal entries."""
    return float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall of class 1; 0 without a true positive."""
    hits = float(np.sum((predicted == 1) & (labels == 1)))
    return 2 * hits / (np.sum(predicted == 1) + np.sum(labels == 1)) if hits else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the Matthews correlation of two binary vectors; 0 if one of them is constant."""
    return pearson((predicted == 1).astype(float), (labels == 1).astype(float))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the linear correlation; 0 if one vector is constant."""
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    a, b = predicted - np.mean(predicted), labels - np.mean(labels)
    norm = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / norm) if norm > 0 else 0.0


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the Pearson correlation of ranks, ties at their mean rank."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def score(names: tuple[str, ...], predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute the named metrics of predictions (class numbers, or values for regression)."""
    return {name: METRICS[name](predicted, labels) for name in names}


DRAWS = 1000
"""Bootstrap draws."""


def resampled_scores(
    metric: Callable[[np.ndarray, np.ndarray], float],
    predicted: Sequence[np.ndarray],
    labels: np.ndarray,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Score bootstrap samples of the dev rows: (draws, seeds) for each model's predictions (seeds, rows).

    A draw has the same rows for all models. Rows and seeds are drawn independently of each other, which is Owen's
    "pigeonhole bootstrap" (2007): its intervals are a little too wide rather than too narrow.
    """
    scores = [np.empty((DRAWS, len(seeds))) for seeds in predicted]
    for draw in range(DRAWS):
        picks = rng.integers(len(labels), size=len(labels))
        for model_scores, seeds in zip(scores, predicted, strict=True):
            model_scores[draw] = [metric(answers[picks], labels[picks]) for answers in seeds]
    return scores


def interval(first: np.ndarray, other: np.ndarray, paired: bool, rng: np.random.Generator) -> tuple[float, float]:
    """Return the middle 95 % of median(other) - median(first) over draws, each with seeds drawn with replacement.

    `first` and `other` are scores (draws, seeds). `paired` models have the same seeds, which are then drawn together. This is
    the percentile interval (Efron and Tibshirani 1993, ch. 13).
    """
    picks = rng.integers(first.shape[1], size=first.shape)
    others = picks if paired else rng.integers(other.shape[1], size=other.shape)
    medians = [np.median(np.take_along_axis(*pair, axis=1), axis=1) for pair in ((first, picks), (other, others))]
    low, high = np.quantile(medians[1] - medians[0], [0.025, 0.975])
    return float(low), float(high)

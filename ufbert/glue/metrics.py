"""GLUE's metrics, as numbers between -1 and 1."""

import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries."""
    return float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where there is no true positive."""
    hits = float(np.sum((predicted == 1) & (labels == 1)))
    return 2 * hits / (np.sum(predicted == 1) + np.sum(labels == 1)) if hits else 0.0


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two binary vectors; 0 where one of them is constant."""
    return pearson((predicted == 1).astype(float), (labels == 1).astype(float))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation; 0 where one vector is constant."""
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    a, b = predicted - np.mean(predicted), labels - np.mean(labels)
    norm = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / norm) if norm > 0 else 0.0


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of ranks, ties at their mean rank."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def score(names: tuple[str, ...], predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The named metrics of predictions (class numbers, or values for regression)."""
    return {name: METRICS[name](predicted, labels) for name in names}

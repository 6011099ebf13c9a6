"""Metrics against closed forms and SciPy."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance

from ufbert.glue.metrics import score


def test_binary_metrics_are_the_closed_forms():
    predicted, labels = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 1, 0, 0])
    tp, fp, fn, tn = 2, 2, 1, 3
    found = score(("accuracy", "f1", "matthews"), predicted, labels)
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    wanted = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx(wanted)


def test_constant_predictions_score_zero_not_nan():
    zeros, labels = np.zeros(4), np.array([0, 1, 0, 1])
    assert score(("f1", "matthews", "pearson", "spearman"), zeros, labels) == {
        "f1": 0.0, "matthews": 0.0, "pearson": 0.0, "spearman": 0.0,
    }  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_binary_metrics_equal_scipy(pairs):
    predicted, labels = np.array(pairs).T
    found = score(("accuracy", "f1", "matthews"), predicted, labels)
    assert found["accuracy"] == pytest.approx(1 - distance.hamming(predicted, labels))
    if predicted.any() or labels.any():
        assert found["f1"] == pytest.approx(1 - distance.dice(predicted.astype(bool), labels.astype(bool)))
    if np.ptp(predicted) and np.ptp(labels):
        table = scipy.stats.contingency.crosstab(predicted, labels).count
        chi2 = scipy.stats.chi2_contingency(table, correction=False).statistic
        assert found["matthews"] ** 2 == pytest.approx(chi2 / len(labels), abs=1e-9)
        assert found["matthews"] == pytest.approx(scipy.stats.kendalltau(predicted, labels).statistic, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_accuracy_of_many_classes_is_the_share_on_the_diagonal(pairs):
    predicted, labels = np.array(pairs).T
    wanted = sum(p == y for p, y in pairs) / len(pairs)
    assert score(("accuracy",), predicted, labels)["accuracy"] == pytest.approx(wanted)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=40))
def test_correlations_equal_scipy_with_ties(pairs):
    a, b = np.array(pairs, float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return
    found = score(("pearson", "spearman"), a, b)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)

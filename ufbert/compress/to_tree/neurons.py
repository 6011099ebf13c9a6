"""Few of a layer's neurons in place of all: which to keep, and output weights that answer for those left out.

A dense feedforward answers W_out^T a + b to the activations a of its f neurons. Of a sample of tokens, the mean and the
covariance of a say all that matters here: how much of the answers each neuron contributes, and by how much of it a few others
can speak for it, since neurons that are active together are correlated.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ufbert.options.compress import Refit

TINY = 1e-6


class Neurons(NamedTuple):
    """The weights of a dense feedforward of f neurons."""

    w_in: Float[np.ndarray, "d f"]
    b_in: Float[np.ndarray, " f"]
    w_out: Float[np.ndarray, "f o"]
    b_out: Float[np.ndarray, " o"]


class Moments(NamedTuple):
    """What is known of a layer on a sample of tokens: of the answers, and of the activations of c candidates to be kept."""

    candidates: Int[np.ndarray, " c"]
    """Their numbers in the layer, those that contribute most first."""
    active_mean: Float[np.ndarray, " c"]
    active: Float[np.ndarray, "c c"]
    """Covariance of their activations."""
    answer_mean: Float[np.ndarray, " o"]
    answer: Float[np.ndarray, "c o"]
    """Their covariance with the answers."""


class Outputs(NamedTuple):
    """The weights by which the neurons that are kept answer."""

    w_out: Float[np.ndarray, "k o"]
    b_out: Float[np.ndarray, " o"]


def moments(
    active: Float[np.ndarray, "n f"],
    answers: Float[np.ndarray, "n o"],
    tokens: Float[np.ndarray, " n"],
    weight: Float[np.ndarray, " f"],
    c: int,
) -> Moments:
    """Measure a sample whose tokens count so much, for the c neurons of the largest mean |a| * weight."""
    share = (tokens / max(float(tokens.sum()), 1e-30))[:, None]
    candidates = np.argsort(-(np.abs(active) * share).sum(axis=0) * weight, kind="stable")[:c]
    own = active[:, candidates]
    active_mean, answer_mean = (own * share).sum(axis=0), (answers * share).sum(axis=0)
    own, answers = (own - active_mean) * np.sqrt(share), (answers - answer_mean) * np.sqrt(share)
    return Moments(candidates, active_mean, own.T @ own, answer_mean, own.T @ answers)


def most_useful(sample: Moments, gauge: Float[np.ndarray, " o"], k: int) -> Int[np.ndarray, " k"]:
    """Choose k of the candidates, one after the other: always that which lets a least squares fit lose most of its error.

    This is orthogonal least squares (Chen, Billings & Luo 1989), as a Cholesky factorisation of the covariance. `gauge` weights
    the error of each output. Returns places among the candidates.
    """
    columns = np.zeros((k, len(sample.candidates)), sample.active.dtype)
    variance = sample.active.diagonal().copy()  # what the neurons chosen so far leave unexplained of each candidate
    with_answer = sample.answer * gauge  # and of its covariance with the answers
    floor = TINY * max(float(variance.max(initial=0.0)), TINY)
    order, free = np.zeros(k, int), np.ones(len(variance), bool)
    for i in range(k):
        gain = np.where(variance > floor, np.square(with_answer).sum(axis=1) / np.maximum(variance, floor), 0.0)
        order[i] = j = int(np.argmax(np.where(free, gain, -1.0)))
        free[j] = False
        if variance[j] <= floor:
            continue  # it never changes, or others say the same
        root = np.sqrt(variance[j])
        columns[i] = (sample.active[j] - columns[:i].T @ columns[:i, j]) / root
        with_answer -= np.outer(columns[i], with_answer[j] / root)
        variance -= np.square(columns[i])
    return order


def refitted(
    sample: Moments, w_out: Float[np.ndarray, "f o"], places: Int[np.ndarray, " k"], how: Refit, ridge: float
) -> Outputs:
    """Return output weights of the candidates at these places, so that they answer for all others, too.

    `ridge` is over the mean variance of the neurons that are kept.
    `none` leaves their weights as they are, `mean` adds to the bias what the others contribute on average. `ridge` also adds to
    the weights the ridge regression of what the others contribute on the neurons kept: on the sample, its error is never above
    that of `mean`, nor that above `none`.
    """
    w_out = w_out[sample.candidates[places]]
    if how == "none":
        return Outputs(w_out, np.zeros_like(sample.answer_mean))
    if how == "ridge" and len(places):
        gram = sample.active[np.ix_(places, places)].astype(np.float64)
        others = sample.answer[places] - gram @ w_out
        gram[np.diag_indices_from(gram)] += ridge * max(float(gram.diagonal().mean()), TINY)
        w_out = (w_out + np.linalg.solve(gram, others)).astype(w_out.dtype)
    return Outputs(w_out, sample.answer_mean - sample.active_mean[places] @ w_out)

"""Unstructured pruning: the smallest weights become zero. It is here for the science, and makes nothing faster."""

from dataclasses import replace
from typing import Any

import numpy as np

from ufbert import nn
from ufbert.compress.job import Job, finish
from ufbert.compress.tune import Lesson, Masks, even_pairs, masked, tuned, with_clock
from ufbert.errors import UserError
from ufbert.hub.folder import flatten, unflatten


def magnitude(job: Job) -> None:
    """Set the smallest weights of the encoder's matrices to zero, tune the others, and report.

    Embeddings, norms and biases stay, and so do heads. Raises UserError for a share that keeps nothing.
    """
    keep = job.options.keep
    if not 0 < keep <= 1:
        raise UserError(f"--keep is {keep:g}; it is the share of the weights that stays, above 0 and at most 1.")
    masks = smallest_masks(job.model.params, keep)
    child = replace(job.model, params=masked(job.model.params, masks))
    if job.tunes:
        assert job.material is not None
        n = job.model.config.n_layers
        lesson = Lesson(
            student=child, material=job.material, options=job.options, teacher=job.model, pairs=even_pairs(n, n)
        )
        child = with_clock(job.options, job.folder, lambda clock: tuned(lesson, clock, job.folder, masks))
    zeros = {
        path: np.mean(np.asarray(array) == 0) for path, array in flatten(child.params).items() if _counts(path, array)
    }
    share = float(np.mean(list(zeros.values())))
    finish(
        job,
        child,
        [
            f"{share:.0%} of the weights of the encoder's matrices are zero. They are stored and multiplied like any others: "
            "nothing is smaller or faster."
        ],
    )


def smallest_masks(params: nn.Params, keep: float) -> Masks:
    """Return masks that keep the share `keep` of largest weights of each matrix of the layers (Han et al. 2015)."""
    flat = flatten(params)
    masks: dict[str, Any] = {}
    for path, array in flat.items():
        if _counts(path, array):
            size = np.abs(array).reshape(-1)
            kept = max(1, round(keep * size.size))
            mask = np.zeros(size.size, np.float32)
            mask[np.argsort(-size, kind="stable")[:kept]] = 1.0
            masks[path] = mask.reshape(array.shape)
    return unflatten(masks)


def _counts(path: str, array: Any) -> bool:
    """True for a matrix, or a stack of them, of a layer."""
    return path.startswith("encoder.layer_") and np.ndim(array) >= 2

"""No feedforward at all: the control that says what the feedforwards of a model are worth."""

from dataclasses import replace

from ufbert.compress.job import Job, finish
from ufbert.compress.tune import Lesson, even_pairs, tuned, with_clock
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder


def drop_feedforward(job: Job) -> None:
    """Take every feedforward out of a model, tune what is left, and report. Raises UserError if there is none."""
    child = without_feedforward(job.model)
    if job.tunes:
        assert job.material is not None
        n = child.config.n_layers
        lesson = Lesson(
            student=child, material=job.material, options=job.options, teacher=job.model, pairs=even_pairs(n, n)
        )
        child = with_clock(job.options, job.folder, lambda clock: tuned(lesson, clock, job.folder))
    finish(job, child, ["The child has no feedforward: every layer is its mixer alone. It is a control."])


def without_feedforward(model: ModelFolder) -> ModelFolder:
    """Return a model whose layers are mixers alone. Raises UserError if they are so already."""
    config = model.config
    kinds = {kind for _, kind in config.layers} - {"none"}
    if not kinds:
        raise UserError("The model has no feedforward to drop.")
    encoder = dict(model.params["encoder"])
    for i, (_, kind) in enumerate(config.layers):
        name = f"layer_{i:02d}"
        encoder[name] = {
            part: params for part, params in encoder[name].items() if part not in (kind, "feedforward_norm")
        }
    config = replace(config, feedforward=("none",), layer_hidden=())
    return replace(model, config=config, params={**model.params, "encoder": encoder})

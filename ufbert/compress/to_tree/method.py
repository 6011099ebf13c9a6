"""`ufbert compress --method to-tree`: children whose feedforwards are trees, and the controls that they are compared with."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from ufbert import nn
from ufbert.compress.job import Candidate, Job, compare
from ufbert.compress.material import Material
from ufbert.compress.to_tree.children import Child, TreeSettings, to_trees, without
from ufbert.compress.tune import Lesson, even_pairs, tuned, with_clock
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.options.compress import CompressOptions
from ufbert.runtime.console import phase, show


def trees(job: Job) -> None:
    """Make trees of the dense feedforwards, and the controls; tune each by the budget, and report.

    Raises UserError without rows to look at, and as `to_trees` does.
    """
    if job.material is None:
        raise UserError(
            "--method to-tree looks at what the layers read: give the model's task (--tasks) or text (--corpus)."
        )
    options = job.options
    if len(set(options.neurons)) < max(1, len(options.neurons)):
        raise UserError(
            f"--neurons {' '.join(map(str, options.neurons)) or '(none)'} must name a number, and none twice."
        )
    made = list(_children(job.model, job.material, options))
    candidates = []
    for i, (name, (config, params)) in enumerate(made):
        folder = job.folder if i == 0 else job.folder / name
        model = replace(job.model, config=config, params=params)
        if job.tunes:
            folder.mkdir(exist_ok=True)
            model = _tuned(job, model, folder)
        save_model(folder / "model", model)
        candidates.append(Candidate(name, model, folder / "model"))
    compare(job, candidates, _notes(job, made))


def _children(model: ModelFolder, material: Material, options: CompressOptions) -> Iterator[tuple[str, Child]]:
    """Yield the children and their names, those that are asked for first."""
    settings = TreeSettings(
        neurons=options.neurons, depth=options.tree_depth, shared=options.shared_neurons, split=options.split,
        choice=options.choice, refit=options.refit, ridge=options.ridge, seed=options.seed,
    )  # fmt: skip
    controls = {
        "narrow": replace(
            settings, depth=0, shared=0, choice="greedy" if options.choice == "cluster" else options.choice
        ),
        "pruned": replace(settings, depth=0, shared=0, choice="contribution", refit="none"),
    }
    samples = layer_inputs(model, material, options.calibration_tokens)
    with phase("fitting the trees"):
        made = to_trees(model.config, model.params, samples, settings)
    yield from zip((f"tree_{n}" for n in options.neurons), made, strict=True)
    for name in dict.fromkeys(options.controls):
        with phase(f"fitting the control {name}"):
            if name == "none":
                yield "none", without(model.config, model.params, samples)
                continue
            made = to_trees(model.config, model.params, samples, controls[name])
        yield from zip((f"{name}_{n}" for n in options.neurons), made, strict=True)


def layer_inputs(model: ModelFolder, material: Material, count: int) -> list[Float[np.ndarray, "n d"]]:
    """Collect what the feedforward of each layer reads for about `count` tokens of the training rows, without padding."""
    inputs = jax.jit(lambda params, batch: nn.feedforward_inputs(params, model.config, *batch))
    batches: list[list[np.ndarray]] = []
    tokens, step = 0, 0
    with phase("reading what the layers read", stays=False):
        while tokens < count:
            batch = material.tokens(step)
            real = np.asarray(batch.segment_ids) != 0
            batches.append([np.asarray(x)[real] for x in inputs(model.params, batch)])
            tokens, step = tokens + int(real.sum()), step + 1
            show(f"{tokens:,} of {count:,} tokens")
    return [np.concatenate(of_layer)[:count] for of_layer in zip(*batches, strict=True)]


def _tuned(job: Job, student: ModelFolder, folder: Path) -> ModelFolder:
    """Teach a child what the dense model says, in hidden states and in answers."""
    assert job.material is not None
    n = student.config.n_layers
    lesson = Lesson(
        student=student, material=job.material, options=job.options, teacher=job.model, pairs=even_pairs(n, n)
    )
    return with_clock(job.options, folder, lambda clock: tuned(lesson, clock, folder))


def _notes(job: Job, made: list[tuple[str, Child]]) -> list[str]:
    """Say what the children are."""
    options, hidden = job.options, job.model.config.d_hidden
    sentences = [
        f"A token uses {', '.join(map(str, options.neurons))} neurons of a feedforward instead of {hidden:,}: "
        f"{options.tree_depth} decisions, {options.shared_neurons} neurons that all tokens use, and those of one of "
        f"{2**options.tree_depth} leaves."
    ]
    texts = {
        "narrow": "Narrow children have dense feedforwards of as many neurons, chosen and refitted like a leaf's.",
        "pruned": "Pruned children have the neurons that contribute most, as they were.",
        "none": "The child `none` has feedforwards that answer all tokens alike.",
    }
    return sentences + [texts[name] for name in dict.fromkeys(options.controls)]

"""`ufbert compress --method quantize`: int8 weights chosen on text, and what they changed."""

from pathlib import Path

import jax
import numpy as np

from ufbert.compress.job import Candidate, Job, compare
from ufbert.compress.material import Material, TaskMaterial, TextMaterial
from ufbert.data.encode import Encoded, encode_texts
from ufbert.data.text_files import read_lines
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, load_model, save_model
from ufbert.hub.quantized import Quantization
from ufbert.inference.calibrate import LayerError, hurting, layer_errors, quantized, widened
from ufbert.inference.engine import Engine
from ufbert.inference.predictor import changed_shares
from ufbert.ops import native
from ufbert.runtime.console import phase, say

TEXTS = 128
"""Texts on which factors are chosen and errors measured."""


def quantize(job: Job) -> None:
    """Round the weights of a model to int8, and report the points lost, the milliseconds, and each layer's error.

    Raises UserError on a machine without the native kernels, without text, for a model that is quantised already, and for
    layers that it does not have.
    """
    options, model = job.options, job.model
    why = native.unavailable() if jax.default_backend() == "cpu" else "they are for CPUs (--device cpu)"
    if why:
        raise UserError(f"--method quantize computes with the native kernels, and there are none: {why}.")
    if load_model(options.folder, lazily=True).quantized is not None:
        raise UserError(f"{options.folder} is quantised already; start from the model that it was made of.")
    how = Quantization(
        options.activations, named_layers(options.keep_wide), not options.wide_tables, options.exact_routing
    )
    rows = calibration_rows(job)
    with phase("choosing the factors", stays=False):
        child = quantized(model, how, rows)
    with phase("measuring the errors of the layers", stays=False):
        errors = layer_errors(model, child, rows)
    notes = [f"Factors were chosen on {len(rows.ids)} texts of {sum(map(len, rows.ids)):,} tokens."]
    if options.keep_wide == "auto" and (wide := hurting(errors)):
        child = widened(child, model, wide)
        errors = layer_errors(model, child, rows)
    assert child.quantized is not None
    if child.quantized.wide:
        notes.append(f"Layers {', '.join(map(str, child.quantized.wide))} stay float32.")
    notes += error_notes(errors)
    save_model(job.child, child)
    stored = load_model(job.child, lazily=True)
    if "tree" in model.config.feedforward:
        notes.append(
            f"{_changed(stored, model, rows):.2%} of the tokens take another way through a tree than by float32."
        )
    if isinstance(job.material, TextMaterial):
        notes.append("Scores are those of the rounded weights; inputs are not rounded in them.")
    notes.append("The model after is timed as it is stored; int8 of the model before is rounded when it is loaded.")
    for note in notes:
        say(note)
    compare(job, [Candidate("after", stored, job.child, ("int8",))], notes)


def named_layers(text: str) -> tuple[int, ...]:
    """Read `--keep-wide`: none and auto name no layer. Raises UserError for another word."""
    if text in ("none", "auto"):
        return ()
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--keep-wide is {text[:40]!r}; it must be none, auto, or numbers of layers as 0,5.")
    return tuple(sorted({int(word) for word in words}))


def calibration_rows(job: Job) -> Encoded:
    """Return some rows of the files of `--texts`, or of the task or corpus. Raises UserError without any."""
    options, model, material = job.options, job.model, job.material
    if options.texts:
        texts = [line for path in options.texts for line in read_lines(Path(path)) if line.strip()]
        if not texts:
            raise UserError(f"{options.texts[0]} has no text to choose the factors on.")
        picks = _some(len(texts), options.seed)
        return encode_texts(model.tokenizer, [texts[i] for i in picks], None, model.config, options.max_len)
    if material is None:
        raise UserError(
            "There is no text to choose the factors on; name files (--texts), a task (--tasks) or --corpus."
        )
    return _rows_of(material, model, options.seed)


def _rows_of(material: Material, model: ModelFolder, seed: int) -> Encoded:
    config = model.config
    if isinstance(material, TaskMaterial):
        rows = material.rows
        picks = _some(len(rows.ids), seed)
        return rows._replace(ids=[rows.ids[i] for i in picks], type_ids=[rows.type_ids[i] for i in picks])
    batches, ids = -(-TEXTS // 32), []
    for step in range(batches):
        ids += np.asarray(material.batch(step)).tolist()
    ids = ids[:TEXTS]
    return Encoded(ids, [[0] * len(row) for row in ids], config.max_len, config.only_len, config.pad_id, 0)


def _some(count: int, seed: int) -> list[int]:
    """Draw up to TEXTS of `count` numbers."""
    return np.random.default_rng(seed).permutation(count)[:TEXTS].tolist()


def error_notes(errors: list[LayerError]) -> list[str]:
    """Say how far hidden states move, by part."""
    hidden = ", ".join(f"{error.name} {error.hidden:.1%}" for error in errors)
    alone = ", ".join(f"{error.name} {error.alone:.1%}" for error in errors)
    return [
        f"Rounding moves the hidden states that a part gives by (root mean square, of their own size): {hidden}.",
        f"With one part rounded alone, the last hidden states move by: {alone}.",
    ]


@phase("comparing routes", stays=False)
def _changed(child: ModelFolder, model: ModelFolder, rows: Encoded) -> float:
    return changed_shares(Engine(child), model, rows)

"""Distillation: a student of another configuration learns from the model, on its task or on text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ufbert import nn
from ufbert.compress.depth import layer_pairs, with_layers
from ufbert.compress.job import Job, finish
from ufbert.compress.parts import by_magnitude, head_groups, keep_best, neuron_groups, without
from ufbert.compress.tune import Lesson, even_pairs, tuned, with_clock
from ufbert.config import ModelConfig
from ufbert.config.presets import load_preset
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, flat_shapes, flatten, load_model, n_outputs, unflatten
from ufbert.runtime.console import say


def distill(job: Job) -> None:
    """Teach a student, and report. Raises UserError for a student that cannot learn from this model, or without rows."""
    if not job.tunes or job.material is None:
        raise UserError("A student learns from rows: give its task (--tasks) or --corpus, and a --budget.")
    teacher, layers = job.model, from_layers(job.options.from_layers, job.model.config.n_layers)
    student, sentence = start_student(job, layers)
    say(f"  student: {student.config.architecture()}; {sentence}")
    n = student.config.n_layers
    pairs = layer_pairs(layers, teacher.config.n_layers) if layers else even_pairs(n, teacher.config.n_layers)
    lesson = Lesson(student=student, material=job.material, options=job.options, teacher=teacher, pairs=pairs)
    child = with_clock(job.options, job.folder, lambda clock: tuned(lesson, clock, job.folder))
    finish(job, child, [f"The student {sentence}."])


def from_layers(text: str, n_layers: int) -> list[int]:
    """Read layer numbers separated by commas; [] for "". Raises UserError for others than rising ones of the model."""
    try:
        layers = [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UserError(f"--from-layers {text[:60]!r} is not a list of whole numbers.") from error
    if layers != sorted(set(layers)) or any(not 0 <= i < n_layers for i in layers):
        raise UserError(f"--from-layers {text[:60]} must name layers from 0 to {n_layers - 1}, the lowest first.")
    return layers


def start_student(job: Job, layers: list[int]) -> tuple[ModelFolder, str]:
    """Return the student with the weights that it starts from, and say which these are.

    Raises UserError if its rows or its vocabulary would be other than its teacher's.
    """
    options, teacher = job.options, job.model
    changes = {name.removeprefix("model."): value for name, value in job.given.items() if name.startswith("model.")}
    own = None
    if options.student and (options.student.startswith("hf:") or Path(options.student).is_dir()):
        if changes or layers:
            raise UserError(
                f"--student {options.student} is a model with weights of its own; --model options and --from-layers go with a "
                "preset, or without --student."
            )
        own = load_model(options.student)
        if own.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            raise UserError(
                f"{options.student} has another vocabulary than {options.folder}; both must have one tokenizer."
            )
        config = own.config
    elif options.student:
        shared = {name: getattr(teacher.config, name) for name in ("vocab_size", "max_len", "pad_id", "pooling")}
        config = replace(load_preset(options.student).model, **shared)
    else:
        config = with_layers(teacher, layers).config if layers else teacher.config
        if not changes and not layers:
            raise UserError("The student would be its teacher: give --student, --model options or --from-layers.")
    config = replace(config, **({"n_layers": len(layers)} if layers else {}), **_settled(changes, config))
    if layers and config.n_layers != len(layers):
        raise UserError(f"--from-layers names {len(layers)} layers, and the student has {config.n_layers}.")
    if config.only_len != teacher.config.only_len:
        raise UserError("Teacher and student must read rows of the same lengths, and one of them mixes padding in.")
    if config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"The student would have {config.vocab_size:,} word pieces and its teacher has {teacher.config.vocab_size:,}."
        )
    fresh = _fresh(config, teacher, options.seed)
    if own is not None:
        params, kept = _filled(fresh, flatten(own.params))
        return replace(teacher, config=config, params=params), f"starts from {options.student}, {kept}"
    if not layers:
        return replace(teacher, config=config, params=fresh), "starts from random weights"
    params, kept = _filled(fresh, flatten(narrowed(with_layers(teacher, layers), config)))
    return replace(
        teacher, config=config, params=params
    ), f"starts from layers {options.from_layers} of its teacher, {kept}"


def _settled(changes: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Add to changed fields those that they would contradict: widths of single layers, and heads that keep their width."""
    settled = dict(changes)
    if "n_layers" in changes or "d_hidden" in changes or "n_heads" in changes:
        settled = {"layer_heads": (), "layer_hidden": (), **settled}
    width = config.width_of_head
    if "d_model" in changes and "n_heads" not in changes and changes["d_model"] % width == 0:
        settled |= {"n_heads": changes["d_model"] // width, "head_width": 0, "layer_heads": ()}
    return settled


def _fresh(config: ModelConfig, teacher: ModelFolder, seed: int) -> dict[str, Any]:
    """Draw a student's parameters, with the heads of its teacher."""
    key = jax.random.key(seed)
    params = nn.init(config, key, tuple(head for head in teacher.heads if head != "classifier"))
    if "classifier" in teacher.heads:
        params["classifier"] = nn.init_classifier(config, key, n_outputs(teacher.heads, teacher.task))
    return params


def _filled(fresh: dict[str, Any], known: dict[str, np.ndarray]) -> tuple[dict[str, Any], str]:
    """Put known parameters of the same path and shape in place of fresh ones, and say how many weights these are."""
    flat = flatten(fresh)
    taken = {path for path, array in flat.items() if path in known and known[path].shape == array.shape}
    share = sum(flat[path].size for path in taken) / sum(array.size for array in flat.values())
    params = unflatten({path: known[path] if path in taken else array for path, array in flat.items()})
    params |= {name: {} for name in fresh if name not in params}
    return jax.tree.map(jax.numpy.asarray, params), f"{share:.0%} of its weights"


def narrowed(teacher: ModelFolder, config: ModelConfig) -> nn.Params:
    """Return the parameters of a teacher cut to a student's widths, as far as both have the same parts.

    Heads and hidden neurons stay that have the largest norms; of the residual stream those channels in which word embeddings
    are largest (as Samragh et al. 2023, arXiv 2312.09299, choose neurons). What fits then is the student's start.
    """
    ours = teacher.config
    groups, counts = [], {}
    for group in (*head_groups(ours), *neuron_groups(ours)):
        own = config.of_layer(group.layer)
        if group.kind not in config.layers[group.layer]:
            continue
        if group.kind == "attention":
            count = own.n_heads if own.width_of_head == group.width else group.count
        else:
            count = config.leaf_width if group.kind in ("leaf_tree", "routed_tree") else own.d_hidden
        if count < group.count:
            groups.append(group)
            counts[group.out] = count
    params = teacher.params
    if groups:
        params, ours = without(params, ours, keep_best(by_magnitude(params, groups), groups, counts), groups)
    if config.d_model >= ours.d_model:
        return params
    norms = np.linalg.norm(np.asarray(params["encoder"]["embeddings"]["tokens"]), axis=0)
    channels = np.sort(np.argsort(-norms, kind="stable")[: config.d_model])
    outputs = n_outputs(teacher.heads, teacher.task)
    wanted, flat = flat_shapes(config, teacher.heads, outputs), flatten(params)
    for path, array in flat.items():
        for axis, size in enumerate(wanted.get(path, ())):
            if axis < array.ndim and (array.shape[axis], size) == (ours.d_model, config.d_model):
                flat[path] = array = np.take(array, channels, axis=axis)
    return unflatten(flat)

"""`ufbert compress`: the frame around a method, from options to the child's folder and the report."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ufbert.compress.distill import distill
from ufbert.compress.drop import drop_feedforward
from ufbert.compress.job import Job
from ufbert.compress.magnitude import magnitude
from ufbert.compress.material import read_material
from ufbert.compress.prune import prune
from ufbert.compress.quantize import quantize
from ufbert.compress.report import CONFIG_FILE, RESULTS_FILE, CompressFile
from ufbert.compress.speed import parse_shape
from ufbert.compress.to_tree.method import trees
from ufbert.errors import UserError
from ufbert.hub.download import model_folder
from ufbert.hub.folder import flatten, folder_sha256, load_model
from ufbert.hub.tensors import first_few
from ufbert.options.compress import FREE_ON_RESUME, METHOD_OPTIONS, CompressOptions
from ufbert.options.given import Given
from ufbert.pretrain.budget import parse_budget
from ufbert.runtime.claim import LOCK, claimed, claimed_new
from ufbert.runtime.console import say
from ufbert.runtime.device import use_device
from ufbert.runtime.files import write_json
from ufbert.runtime.last_command import last_commands
from ufbert.runtime.typed import read_typed

METHODS: dict[str, Callable[[Job], Any]] = {
    "prune": prune,
    "distill": distill,
    "drop-feedforward": drop_feedforward,
    "magnitude": magnitude,
    "to-tree": trees,
    "quantize": quantize,
}
"""The function of each method."""


def compress(options: CompressOptions, given: Given) -> None:
    """Compress a model folder by the method of `options`.

    Raises UserError for wrong options, files or models, and Interrupted when a signal has stopped the tuning and all is saved.
    """
    refuse_others(options, given)
    if options.budget != "none":
        parse_budget(options.budget)
    folder = Path(options.out)
    with ExitStack() as held:
        held.enter_context((claimed if options.resume else claimed_new)(folder))
        if options.resume:
            _check_resumed(folder, options, given)
        use_device(options.device, threads=options.threads)
        model = load_model(options.folder)
        bad = [path for path, array in flatten(model.params).items() if not jnp.isfinite(array).all()]
        if bad:
            raise UserError(f"{options.folder} has weights that are no finite numbers: {first_few(bad)}.")
        parse_shape(options.shape, model.config)
        job = Job(options, given, folder, model, read_material(options, model))
        say(f"{options.method} of {options.folder}: {model.config.architecture()}")
        say(f"  {job.material.describe()}" if job.material else "  no task and no --corpus: nothing is tuned or scored")
        if not options.resume:
            sha256 = folder_sha256(model_folder(options.folder))
            asked = asked_options(options, given)
            write_json(folder / CONFIG_FILE, asdict(CompressFile("ufbert-compress-run", 1, asked, sha256)))
        with last_commands(options.last_commands, folder, held.close):
            try:
                METHODS[options.method](job)
            except UserError:
                if not options.resume and {path.name for path in folder.iterdir()} <= {CONFIG_FILE, LOCK}:
                    (folder / CONFIG_FILE).unlink()  # nothing was begun: the mended command may name the folder again
                raise


def asked_options(options: CompressOptions, given: Given) -> dict[str, Any]:
    """Return all options by name, and of a student's fields those that were named."""
    fields = {name: value for name, value in given.items() if name.startswith("model.")}
    return {name: value for name, value in asdict(options).items() if name != "model"} | fields


def refuse_others(options: CompressOptions, given: Given) -> None:
    """Raise UserError if an option was given that belongs to other methods only."""
    special = {name for names in METHOD_OPTIONS.values() for name in names}
    for name in given:
        group = name.partition(".")[0]
        if group in special and group not in METHOD_OPTIONS[options.method]:
            methods = [method for method, names in METHOD_OPTIONS.items() if group in names]
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} belongs to --method {' or '.join(methods)}; --method {options.method} has no use for it."
            )


def _check_resumed(folder: Path, options: CompressOptions, given: Given) -> None:
    """Raise UserError if a folder holds no compression to go on with, a finished one, or one of other options or weights."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"There is no compression in {folder} to resume.")
    stored = read_typed(folder / CONFIG_FILE, CompressFile)
    if (folder / RESULTS_FILE).exists():
        raise UserError(f"The compression in {folder} is finished; its model is in {folder / 'model'}.")
    asked = _json(asked_options(options, given))
    for name in {**stored.options, **asked}:
        value = asked.get(name)
        before = stored.options.get(name, None if "." in name else value)  # an option that is newer had its default
        if name not in FREE_ON_RESUME and before != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{folder} was started with {flag}={before}; it cannot go on with {flag}={value}.")
    if stored.sha256 != folder_sha256(model_folder(options.folder)):
        raise UserError(f"{options.folder} has changed since the compression in {folder} began; start a new one.")


def _json(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples are lists."""
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, tuple | list) else value

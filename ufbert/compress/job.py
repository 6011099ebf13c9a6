"""What every method is given, and how every method ends: models scored and timed side by side, and the report."""

import importlib.metadata
import platform as host
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ufbert.bench.harness import paired_ratio
from ufbert.compress.material import Material
from ufbert.compress.report import CompressResults, Row, Spread, write_results
from ufbert.compress.speed import milliseconds, parse_shape, time_models
from ufbert.cost.flops import forward_flops_per_token
from ufbert.hub.download import model_folder
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.inference.engine import Dtype
from ufbert.nn.registry import FEEDFORWARDS
from ufbert.ops import native
from ufbert.options.compress import CompressOptions
from ufbert.options.given import Given
from ufbert.runtime.console import phase, say
from ufbert.runtime.device import usable_threads
from ufbert.runtime.machine import commit, machine_facts
from ufbert.runtime.typed import Count, read_lines


@dataclass(frozen=True)
class Job:
    """The inputs of a method."""

    options: CompressOptions
    given: Given
    """The options that were named."""
    folder: Path
    """The output folder, which this process has claimed."""
    model: ModelFolder
    """The model to compress."""
    material: Material | None
    """The rows to tune and to score on; None if there are none, so that nothing is tuned or scored."""

    @property
    def tunes(self) -> bool:
        """True if there are rows, and a budget for them."""
        return self.material is not None and self.options.budget != "none"

    @property
    def child(self) -> Path:
        """The folder of the child."""
        return self.folder / "model"


class Candidate(NamedTuple):
    """A model that the report compares."""

    name: str
    model: ModelFolder
    place: Path
    """Its folder, whose size is reported."""
    types: tuple[Dtype, ...] | None = None
    """Types of the weights that it is timed with; None for those of the options."""


def finish(job: Job, child: ModelFolder, notes: Sequence[str] = ()) -> CompressResults:
    """Save the child, compare it with the model, and write and print the report. Raises UserError if the disk refuses."""
    save_model(job.child, child)
    return compare(job, [Candidate("after", child, job.child)], notes)


def compare(job: Job, children: Sequence[Candidate], notes: Sequence[str] = ()) -> CompressResults:
    """Score and time the model and its saved children in one run; write and print the report, and return the results."""
    before = Candidate("before", job.model, model_folder(job.options.folder))
    candidates, options, material = [before, *children], job.options, job.material
    scores = [material.score(candidate.model) if material else {} for candidate in candidates]
    types, missing = usable_types(options)
    timings = _timings(job, candidates, types)
    first = scores[0]
    rows = [_row(job, candidate, timings) for candidate in candidates]
    if material is not None:
        main = material.metrics[0]
        rows = [
            replace(row, scores=score, lost=material.lost(first[main], score[main]))
            for row, score in zip(rows, scores, strict=True)
        ]
    updates = list(read_lines(job.folder / "metrics.jsonl", _Update))
    results = CompressResults(
        method=options.method,
        model=options.folder,
        rows=rows,
        metrics=material.metrics if material else (),
        unit=material.unit if material else "",
        material=material.describe() if material else "",
        shape=options.shape,
        updates=updates[-1].step if updates else 0,
        spent_seconds=updates[-1].spent if updates else 0.0,
        notes=[*notes, *missing],
        options={name: value for name, value in asdict(options).items() if name != "model"} | _student_fields(job),
        environment=environment(options),
    )
    with phase("drawing the report"):
        text = write_results(job.folder, results)
    print(text)
    say(f"report {job.folder / 'report.html'}\nmodel  {job.child}")
    return results


def _student_fields(job: Job) -> dict[str, Any]:
    return {name: value for name, value in job.given.items() if name.startswith("model.")}


@dataclass(frozen=True)
class _Update:
    step: Count
    spent: float


def usable_types(options: CompressOptions) -> tuple[tuple[Dtype, ...], list[str]]:
    """Return the types to time, and a sentence for those that this machine has no kernels for."""
    why = native.unavailable() if jax.default_backend() == "cpu" else "they are for CPUs"
    wanted = tuple(dict.fromkeys(options.types))
    if not why or set(wanted) <= {"float32"}:
        return wanted, []
    return ("float32",), [f"Only float32 was timed: the others need the native kernels, and there are none: {why}."]


def _timings(job: Job, candidates: Iterable[Candidate], types: Sequence[Dtype]) -> dict[str, Any]:
    """Time every candidate with every type, in one run: {"name type": seconds of a call in each block}."""
    models = {
        f"{candidate.name} {dtype}": (candidate.model, dtype)
        for candidate in candidates
        for dtype in candidate.types or types
    }
    return time_models(models, job.options.shape, job.options.blocks, job.options.seed)


def _row(job: Job, candidate: Candidate, timings: dict[str, Any]) -> Row:
    config, tokens = candidate.model.config, parse_shape(job.options.shape, candidate.model.config)[1]
    mine = {
        key.removeprefix(f"{candidate.name} "): t for key, t in timings.items() if key.startswith(f"{candidate.name} ")
    }
    faster: dict[str, Spread] = {}
    for dtype, seconds in mine.items():
        base = timings.get(f"before {dtype}")
        if candidate.name != "before" and base is not None:
            ratio = paired_ratio(seconds.tolist(), base.tolist())
            faster[dtype] = (ratio.low, ratio.median, ratio.high)
    layers = enumerate(kind for _, kind in config.layers)
    return Row(
        name=candidate.name,
        neurons=max(FEEDFORWARDS[kind].neurons(config.of_layer(i))[0] for i, kind in layers),
        architecture=config.architecture(),
        parameters=sum(int(leaf.size) for leaf in jax.tree.leaves(dict(candidate.model.params))),
        bytes=(candidate.place / "model.safetensors").stat().st_size,
        flops=forward_flops_per_token(config, tokens, masked_trees=False, training=False),
        milliseconds={dtype: milliseconds(seconds) for dtype, seconds in mine.items()},
        faster=faster,
    )


def environment(options: CompressOptions) -> dict[str, Any]:
    """Name the machine, the versions of what computed, and the commit of a checkout."""
    machine = machine_facts()
    versions = {name: importlib.metadata.version(name) for name in ("ufbert", "jax", "flax", "optax")}
    return {
        **machine, "threads": usable_threads(options.threads), "device": str(jax.devices()[0].device_kind),
        "kernels": native.instruction_set() if not native.unavailable() else "none", "python": host.python_version(),
        "system": host.platform(), "commit": commit(), **versions,
    }  # fmt: skip

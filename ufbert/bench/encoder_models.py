"""How long do trained models take for an answer on this CPU, from ids to hidden states? `ufbert bench encoder --model A B`.

All models are timed by the engine behind `Predictor`, in one process, blocks in turns, on random ids that differ in every call.
A ratio is taken of two neighbouring blocks, which see the same machine. Before a model is timed, its answers are compared with
those of its training graph on three batches. The middle one counts: a decision that turns by a hair's breadth may spoil one.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ufbert.bench.encoder_job import RELATIVE, TOLERANCE, Shape, parse_shape, write_ids
from ufbert.bench.harness import (
    Entry,
    Times,
    WorkerProcess,
    load,
    our_program,
    paired_ratio,
    quartiles,
    start_processes,
    time_rounds,
)
from ufbert.bench.report import figures, header, machine_lines, type_of, write_files
from ufbert.config import ModelConfig
from ufbert.config.checks import shown
from ufbert.errors import UserError, near_miss
from ufbert.hub.folder import load_model
from ufbert.ops import native
from ufbert.options.bench import BenchEncoderOptions
from ufbert.report.page import markdown_grid
from ufbert.runtime.console import phase
from ufbert.runtime.device import usable_threads
from ufbert.runtime.machine import machine_facts
from ufbert.runtime.typed import read_typed

BATCHES_CHECKED = 3
CHECKED_TOKENS = 128
"""Tokens of the text on which a model is checked, if it reads as many."""


@dataclass(frozen=True)
class Timed:
    """A model with weights of one type, at one shape. Seconds are those of a call."""

    model: str
    type: str
    median: float
    low: float
    high: float
    """The quartiles over blocks."""
    tokens_per_second: float
    ratio: float | None = None
    """The baseline's time over this one's, the same type: above 1 it is faster. A median over pairs of neighbouring blocks."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    """Its quartiles."""


@dataclass(frozen=True)
class ShapeTimes:
    """A call of `batch` texts of `tokens` tokens each."""

    shape: str
    batch: int
    tokens: int
    timed: list[Timed]


@dataclass(frozen=True)
class Loaded:
    """A model folder's first answer, in a process that has compiled it before."""

    seconds: float
    bytes: int
    """Of the packed weights."""
    memory: int
    """Bytes that the process has more of afterwards; 0 where the system does not say."""


@dataclass(frozen=True)
class ModelTimes:
    """The file of `--json`: trained models timed on a CPU."""

    machine: dict[str, Any]
    job: dict[str, Any]
    facts: str
    baseline: str
    folders: dict[str, str]
    """By the model's name."""
    checked: dict[str, dict[str, float]]
    """Of NAME-TYPE: how far its answers are from the training graph's, and the share of its leaves in use."""
    shapes: list[ShapeTimes]
    loaded: dict[str, Loaded]
    """By NAME-TYPE."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why a NAME-TYPE was not timed."""


def read_model_times(path: Path) -> ModelTimes:
    """Read the file of `--json`. Raises UserError if it is missing or damaged."""
    return read_typed(path, ModelTimes)


def run_models(options: BenchEncoderOptions) -> None:
    """Print a table for each shape, and write a JSON file and a picture if asked.

    Raises UserError for a folder that is no model, and, once all others are timed, for models with wrong answers.
    """
    folders = named_folders(options.model)
    baseline = options.baseline or next(iter(folders))
    if baseline not in folders:
        raise UserError(f"--baseline {shown(baseline)} is none of the models; {near_miss(baseline, folders)}")
    times = measure_models(options, folders, baseline)
    print(models_text(times))
    write_files(asdict(times), options, draw)
    if times.refused:
        refused = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in times.refused.items())
        raise UserError(f"Not timed: {refused}.")


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Return the folders of `FOLDER` or `NAME=FOLDER` by name. A folder RUN/model is called RUN.

    Raises UserError for a name that stands twice.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, is_named, place = word.partition("=")
        path = Path(place if is_named else word)
        if not is_named:
            whole = path.resolve()
            name = whole.parent.name if whole.name == "model" else whole.name
        if name in folders:
            raise UserError(f"Two models are called {shown(name)}; name them apart, as in --model a=FOLDER b=FOLDER.")
        folders[name] = path
    return folders


def measure_models(options: BenchEncoderOptions, folders: Mapping[str, Path], baseline: str) -> ModelTimes:
    """Check, then time every model; return the report. Raises UserError for a folder that is no model."""
    machine, threads = machine_facts(), usable_threads(options.threads)
    if reason := native.unavailable():
        raise UserError(f"The engine needs the native kernels, and there are none: {reason}.")
    configs = {name: load_model(folder, lazily=True).config for name, folder in folders.items()}
    short = {f"m{i}": name for i, name in enumerate(folders)}  # what the process calls them
    entries = [f"{key}-{kind}" for key in short for kind in options.types]
    named = {f"{key}-{kind}": f"{name}-{kind}" for key, name in short.items() for kind in options.types}
    shapes = [parse_shape(shape) for shape in dict.fromkeys(options.shapes)]
    checks = {
        name: Shape(1, config.only_len or min(CHECKED_TOKENS, config.max_len)) for name, config in configs.items()
    }
    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as place, ExitStack() as running:
        job = Path(place)
        for key, name in short.items():
            (job / key).symlink_to(folders[name].resolve(), target_is_directory=True)
        vocab_size = min(config.vocab_size for config in configs.values())
        write_ids(job, vocab_size, list(dict.fromkeys([*shapes, *checks.values()])), options.seed)
        processes, _ = start_processes({"ufbert": our_program("encoder_ours")}, job, threads, running, entries)
        ours = processes["ufbert"]
        checked = check_models(ours, {entry: str(checks[short[entry.split("-")[0]]]) for entry in entries})
        refused = {named[entry]: reason for entry, reason in checked.items() if isinstance(reason, str)}
        fit = [entry for entry in entries if named[entry] not in refused]
        if not fit:
            raise UserError(f"No model was timed. {next(iter(refused.values()))}")
        machine |= ours.ask("machine", "read")
        cases = []
        for shape in shapes:
            reading = [entry for entry in fit if reads(configs[short[entry.split("-")[0]]], shape.tokens)]
            if reading:
                load([Entry(ours, entry) for entry in reading], f"{shape}.npy", shape.batch)
                wanted = [Entry(ours, entry) for entry in reading]
                times, _ = time_rounds(wanted, {"call": options.seconds_a_block}, options.blocks, str(shape))
                cases.append(shape_times(times, shape, short, baseline))
        with phase("timing the start from a model folder"):
            loaded = {named[entry]: Loaded(**ours.ask("load_time", "seconds", name=entry)) for entry in fit}
        facts = ours.facts
    passed = {named[entry]: gate for entry, gate in checked.items() if not isinstance(gate, str)}
    where = {name: str(folder) for name, folder in folders.items()}
    return ModelTimes(
        **header(options, machine, threads), facts=facts, baseline=baseline, folders=where, checked=passed, shapes=cases,
        loaded=loaded, refused=refused,
    )  # fmt: skip


def reads(config: ModelConfig, tokens: int) -> bool:
    """Tell whether a model reads texts of so many tokens."""
    return config.only_len in (0, tokens) and tokens <= config.max_len


@phase("checking the models")
def check_models(ours: WorkerProcess, entries: Mapping[str, str]) -> dict[str, dict[str, float] | str]:
    """Return the gates' measurements of every entry at its shape, medians over batches, or why it is not to be timed."""
    checked: dict[str, dict[str, float] | str] = {}
    for entry, shape in entries.items():
        gates = [ours.ask("gate", "relative", name=entry, shape=shape, batch=i) for i in range(BATCHES_CHECKED)]
        gate = {name: statistics.median(float(one[name]) for one in gates) for name in gates[0]}
        kind = type_of(entry)
        checked[entry] = gate
        if kind == "float32" and not gate["error"] <= TOLERANCE * max(1.0, gate["size"]):
            checked[entry] = f"its answers are off by {gate['error']:.1e} from the training graph's"
        elif not gate["relative"] <= RELATIVE[kind]:
            checked[entry] = f"its answers are off by {gate['relative']:.1%} from the training graph's"
    return checked


def shape_times(times: Times, shape: Shape, names: Mapping[str, str], baseline: str) -> ShapeTimes:
    """Sum up the blocks of one shape."""
    key_of = {name: key for key, name in names.items()}
    timed = []
    for entry, blocks in times.items():
        key, kind = entry.split("-")
        low, median, high = quartiles(blocks["call"])
        base, ratio = times.get(f"{key_of[baseline]}-{kind}"), (None, None, None)
        if base and key != key_of[baseline]:
            ratio = paired_ratio(blocks["call"], base["call"])[:3]
        speed = shape.batch * shape.tokens / median
        timed.append(Timed(names[key], kind, median, low, high, speed, *ratio))
    return ShapeTimes(str(shape), shape.batch, shape.tokens, timed)


def models_text(times: ModelTimes) -> str:
    """Return the whole report in Markdown."""
    lines = [*machine_lines(times.machine), f"{times.facts}; {times.job['used_threads']} threads"]
    for name, gate in times.checked.items():
        leaves = f"; {gate['leaves']:.0%} of the leaves that even turns would use" if gate["leaves"] != 1 else ""
        lines.append(f"{name}: off by {gate['relative']:.1e} from the training graph, median over tokens{leaves}.")
    lines += [f"{name}: NOT TIMED: {reason.rstrip('.')}." for name, reason in times.refused.items()]
    tables = [
        f"### {case.shape}: texts x tokens of a call\n\n{speed_grid(case, times.baseline)}" for case in times.shapes
    ]
    head = ["", "first answer, s", "MB of weights", "MB of memory"]
    starts = [
        [name, f"{one.seconds:.2f}", figures(float(one.bytes), 1e-6), figures(float(one.memory), 1e-6)]
        for name, one in times.loaded.items()
    ]
    tables.append(f"### From a model folder\n\n{markdown_grid(head, starts, range(1, 4))}")
    notes = (
        "Ratios are medians and quartiles of the ratios of neighbouring blocks. Ids are random, so that trees take other\n"
        "ways than on text, of as many neurons."
    )
    return "\n".join([*lines, "", "\n\n".join(tables), "", notes])


def speed_grid(case: ShapeTimes, baseline: str) -> str:
    """Return the table of one shape in Markdown."""
    head = ["model", "weights", "ms a call", "quartiles", "tokens/s", f"times as fast as {baseline}"]
    rows = []
    for one in case.timed:
        low, high = figures(one.low, 1e3), figures(one.high, 1e3)
        ratio = "-" if one.ratio is None else f"{one.ratio:.2f} ({one.ratio_low:.2f} to {one.ratio_high:.2f})"
        speed = f"{one.tokens_per_second:,.0f}"
        rows.append([one.model, one.type, figures(one.median, 1e3), f"{low} to {high}", speed, ratio])
    return markdown_grid(head, rows, range(2, len(head)))


def draw(figure: Any, report: dict[str, Any]) -> None:
    """Draw a bar for each model and type at each shape into a matplotlib figure."""
    cases = report["shapes"]
    most = max((len(case["timed"]) for case in cases), default=1)
    figure.set_size_inches(4.2 * max(1, len(cases)), 1.2 + 0.3 * most)
    for axis, case in zip(figure.subplots(1, max(1, len(cases)), squeeze=False)[0], cases, strict=False):
        timed = case["timed"][::-1]
        for y, one in enumerate(timed):
            axis.barh(y, 1e3 * one["median"], color="C0" if one["type"] == "float32" else "C1", height=0.7)
            axis.text(1e3 * one["median"], y, f" {figures(one['median'], 1e3)}", va="center", fontsize=8)
        axis.set_yticks(range(len(timed)), [f"{one['model']}, {one['type']}" for one in timed], fontsize=8)
        axis.set_xlabel("milliseconds a call")
        axis.set_title(case["shape"], fontsize=10)

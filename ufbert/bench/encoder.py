"""How many times as fast are our encoders on this CPU, from ids to hidden states, as the dense BERT that others
compute?

Ours are BERT, BERT with trees, and that with Fourier mixing, by the engine behind `Predictor`; the peers are BERT in
ONNX Runtime and PyTorch. All weights are random, so a ratio between different models says what their arithmetic is
worth and nothing about quality. How to read the answer: each shape has a table of times and ratios, and one of where
our time goes. Compare our dense BERT with a peer for the engine alone, and our trees with our dense BERT for the trees
alone.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.bench.encoder_job import (
    RELATIVE,
    TOLERANCE,
    UNCLEAR,
    Shape,
    configs,
    parse_shape,
    relative_error,
    work,
    write_job,
)  # fmt: skip
from ufbert.bench.encoder_models import run_models
from ufbert.bench.harness import Entry, WorkerProcess, load, our_program, start_processes, time_rounds
from ufbert.bench.layer_gates import LEAVES
from ufbert.bench.report import case_report, check_folders, figures, header, page, table, type_of, write_files
from ufbert.errors import UserError
from ufbert.ops import native
from ufbert.options.bench import BenchEncoderOptions
from ufbert.report.page import markdown_grid
from ufbert.runtime.console import phase
from ufbert.runtime.device import usable_threads, use_device
from ufbert.runtime.machine import machine_facts

PEER_SCRIPT = Path(__file__).parent / "encoder_peer.py"


def run_encoder(options: BenchEncoderOptions) -> None:
    """Print tables, and write a JSON file and a picture if asked. Raises UserError as `measure` or `run_models` does."""
    check_folders(options.json, options.plot)
    use_device("cpu")
    if options.model:
        return run_models(options)
    report = measure(options)
    print(text(report))
    write_files(report, options, draw)


def measure(options: BenchEncoderOptions) -> dict[str, Any]:
    """Check, then time every entry; return the report. Raises UserError, and times nothing, if a process is wrong."""
    machine, threads = machine_facts(), usable_threads(options.threads)
    gate_shape = Shape(1, options.fourier_len)
    shapes = [parse_shape(shape) for shape in dict.fromkeys(options.shapes)]
    names = list(dict.fromkeys(options.ours))
    if reason := native.unavailable():
        raise UserError(f"The engine needs the native kernels, and there are none: {reason}.")
    peer_program = (options.peer_python or sys.executable, options.peer_script or str(PEER_SCRIPT))
    programs = {"ufbert": our_program("encoder_ours"), **dict.fromkeys(options.peers, peer_program)}
    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as name, ExitStack() as running:
        folder = Path(name)
        write_job(folder, configs(options), list(dict.fromkeys([*shapes, gate_shape])), options.seed)
        # Peers are compared with our dense BERT, which is therefore computed even if it is not timed.
        entries = list(dict.fromkeys([*names, "dense-float32"]))
        processes, missing = start_processes(programs, folder, threads, running, entries)
        facts = {name: process.facts for name, process in processes.items()}
        ours = processes.pop("ufbert")
        peers = [Entry(process, name) for name, process in processes.items()]
        checked = check_ours(ours, names, str(gate_shape)) | check_peers(folder, ours, peers, gate_shape)
        machine |= ours.ask("machine", "read")
        cases = [time_case(ours, peers, shape, options, machine) for shape in shapes]
        with phase("timing the start from a model folder"):
            starts = {name: ours.ask("load_time", "seconds", name=name) for name in names}
    measured = {"facts": facts, "missing": missing, "checked": checked, "starts": starts, "shapes": cases}
    return header(options, machine, threads) | measured


@phase("checking our encoders")
def check_ours(ours: WorkerProcess, names: Sequence[str], shape: str) -> dict[str, dict[str, float]]:
    """Return the gates' measurements by name. Raises UserError if an engine is wrong, or if tokens take few routes."""
    checked: dict[str, dict[str, float]] = {}
    for name in names:
        gate = ours.ask("gate", "relative", name=name, shape=shape)
        if type_of(name) == "float32" and not gate["error"] <= TOLERANCE:
            raise UserError(f"{name} is off by {gate['error']:.1e} from the training graph. Nothing was timed.")
        if not gate["relative"] <= RELATIVE[type_of(name)]:
            raise UserError(f"{name} is off by {gate['relative']:.1%} from the training graph. Nothing was timed.")
        if gate["unclear"] > UNCLEAR:
            raise UserError(f"{gate['unclear']:.1%} of {name}'s tokens turn by a hair's breadth. Nothing was timed.")
        if gate["leaves"] < LEAVES:
            share = f"{gate['leaves']:.0%} of the leaves that even turns would use"
            raise UserError(f"{name}'s tokens end in {share}; that would time a cache. Nothing was timed.")
        checked[name] = gate
    return checked


@phase("checking the peers")
def check_peers(folder: Path, ours: WorkerProcess, peers: Sequence[Entry], shape: Shape) -> dict[str, dict[str, float]]:
    """Return how far the peers are from our dense BERT, by name. Raises UserError if a peer computes another model."""
    wanted = first_hidden(folder, Entry(ours, "dense-float32"), shape)
    checked = {}
    for peer in peers:
        y = first_hidden(folder, peer, shape)
        if y.shape != wanted.shape:
            raise UserError(f"{peer.name} answers {y.shape}, not {wanted.shape}. Nothing was timed.")
        relative = relative_error(y, wanted)
        if not relative <= RELATIVE[type_of(peer.name)]:
            raise UserError(f"{peer.name} computes another model: it is off by {relative:.1%}. Nothing was timed.")
        checked[peer.name] = {"relative": relative}
    return checked


def first_hidden(folder: Path, entry: Entry, shape: Shape) -> np.ndarray:
    """Return an entry's hidden states (b, t, d) of the first batch."""
    load([entry], f"{shape}.npy", shape.batch)
    sample = list(range(shape.batch))
    answer = entry.process.ask("check", "file", name=entry.name, work="call", batches=1, sample=sample)
    return np.load(folder / answer["file"])


def time_case(
    ours: WorkerProcess, peers: Sequence[Entry], shape: Shape, options: BenchEncoderOptions, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Time one shape; return its report in seconds a call, with the `parts` of ours."""
    models, fixed = configs(options), shape.tokens == options.fourier_len
    names = [name for name in dict.fromkeys(options.ours) if fixed or not name.startswith("fourier")]
    entries = [*(Entry(ours, name) for name in names), *peers]
    load(entries, f"{shape}.npy", shape.batch)
    times, _ = time_rounds(entries, {"call": options.seconds_a_block}, options.blocks, str(shape))
    encoders = {name: models[name.split("-")[0] if name in names else "dense"] for name in times}
    works = {name: work(config, type_of(name), shape) for name, config in encoders.items()}
    report = case_report(times, works, names, machine)
    tokens = shape.batch * shape.tokens
    for name, contestant in report["contestants"].items():
        contestant["tokens_per_second"], contestant["parts"] = tokens / contestant["call"]["median"], {}
        if name in names:
            with phase(f"timing the parts of {name}"):
                contestant["parts"] = ours.ask("parts", "parts", name=name, shape=str(shape))["parts"]
    return {"shape": str(shape), "tokens": tokens, **report}


def parts_table(case: Mapping[str, Any]) -> str:
    """Return the table of where our time goes: each part computed alone, and the rest."""
    ours = {name: case["contestants"][name] for name in case["ratios"]}
    kinds = list(dict.fromkeys(part for contestant in ours.values() for part in contestant["parts"]))
    lines = []
    for name, contestant in ours.items():
        parts, call = contestant["parts"], contestant["call"]["median"]
        cells = [f"{figures(parts[kind], 1e3)} ({parts[kind] / call:.0%})" if kind in parts else "" for kind in kinds]
        lines.append([name, *cells, f"{1 - sum(parts.values()) / call:.0%}"])
    return markdown_grid(["ms (share)", *kinds, "the rest"], lines, range(1, 2 + len(kinds)))


def check_line(name: str, checked: Mapping[str, float]) -> str:
    """Return the gates' measurements of one entry as a sentence."""
    if "error" not in checked:
        return f"{name}: off by {checked['relative']:.1e} from our dense float32 BERT, median over tokens."
    line = f"{name}: off by {checked['relative']:.1e} from the training graph, median over tokens"
    if type_of(name) == "float32":
        line += f", at most {checked['error']:.0e} where turns are clear (all but {checked['unclear']:.2%})"
    elif checked["changed"]:
        line += f"; {checked['changed']:.2%} of the tokens take another way through a layer's tree"
    leaves = checked["leaves"]
    return line + (f"; {leaves:.0%} of the leaves that even turns would use." if leaves != 1 else ".")


def start_line(name: str, start: Mapping[str, float]) -> str:
    """Return how soon a model folder answers, and how much memory it takes."""
    memory = f", {start['memory'] / 1e6:,.0f} MB of memory" if start["memory"] else ""
    seconds, weights = f"{start['seconds']:.2f} s", f"{start['bytes'] / 1e6:,.0f} MB of weights"
    return f"{name}: {seconds} from its folder to a first answer, {weights}{memory}."


def text(report: dict[str, Any]) -> str:
    """Return the whole report in Markdown."""
    job = report["job"]
    sizes = (
        f"Encoders of {job['layers']} layers x {job['d_model']}; trees of {2 ** (job['tree_depth'] + 1) - 1} neurons, "
        f"{job['tree_depth'] + 1} used; {job['used_threads']} threads."
    )
    checks = [check_line(name, checked) for name, checked in report["checked"].items()]
    starts = [start_line(name, start) for name, start in report["starts"].items()]
    tables = []
    for case in report["shapes"]:
        speeds = table(case, "call", "ms a call", 1e3, "tokens/s", lambda c: f"{c['tokens_per_second']:,.0f}")
        tables.append(f"### {case['shape']}: texts x tokens of a call\n\n{speeds}\n\n{parts_table(case)}")
    return page(report, sizes, [*checks, *starts], tables)


def draw(figure: Any, report: dict[str, Any]) -> None:
    """Draw a bar for each contestant at each shape, ours with their parts, into a matplotlib figure."""
    import matplotlib.patches

    cases = report["shapes"]
    figure.set_size_inches(4.2 * len(cases), 4.2)
    kinds = list(dict.fromkeys(k for case in cases for c in case["contestants"].values() for k in c["parts"]))
    colors = {kind: f"C{i}" for i, kind in enumerate(kinds)} | {"the rest": "0.75", "a peer": "0.45"}
    for axis, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        names = list(case["contestants"])[::-1]
        for y, name in enumerate(names):
            parts, left = case["contestants"][name]["parts"], 0.0
            whole = 1e3 * case["contestants"][name]["call"]["median"]
            scale = min(1.0, whole / max(1e-9, 1e3 * sum(parts.values())))
            for kind, seconds in parts.items():
                axis.barh(y, 1e3 * seconds * scale, left=left, color=colors[kind], height=0.7)
                left += 1e3 * seconds * scale
            axis.barh(y, whole - left, left=left, color=colors["the rest" if parts else "a peer"], height=0.7)
            axis.text(whole, y, f" {figures(whole, 1)}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("milliseconds a call")
        axis.set_title(case["shape"], fontsize=10)
    handles = [matplotlib.patches.Patch(color=color, label=kind) for kind, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)

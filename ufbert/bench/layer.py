"""How many times as fast is a tree layer on this CPU as the best dense layer that anyone offers?

A chain of layers goes forward on new random rows at every call: ours by several paths, dense ones by jax, NumPy and
PyTorch. How to read the answer: for each number of rows the last table names the fastest dense layer of a type, and how
many times as fast each path of ours is. Compare a narrow path with float32 only if the narrow dense layer is no faster.
`--zeros` and `--claims` are there to judge the figures of others, not ours: rows and weights of zeros walk one path,
whose few nodes stay in the cache.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ufbert.bench.harness import Entry, load, our_program, start_processes, time_rounds
from ufbert.bench.layer_gates import check_everything
from ufbert.bench.layer_job import work, write_job
from ufbert.bench.report import (
    case_report,
    check_folders,
    figures,
    header,
    page,
    ratio_text,
    table,
    type_of,
    write_files,
)
from ufbert.errors import UserError
from ufbert.ops import native
from ufbert.options.bench import BenchLayerOptions
from ufbert.report.page import markdown_grid
from ufbert.runtime.device import usable_threads, use_device
from ufbert.runtime.machine import machine_facts

PEER_SCRIPT = Path(__file__).parent / "layer_torch_peer.py"
SINGLE_SHARE = 0.25
"""Time for calls of a single layer over that for calls of the chain."""
CLAIMS = """Published, or implied by what was published, of one tree layer of UltraFastBERT 1x11 (12 of 4,095 neurons):

- 48x and 78x: the paper's figures for one layer on a CPU, against its own dense layer. The benchmark released with them never
  writes its weights or rows, so that every row walks one path; which code gave the printed figures is not known. Built with
  MKL and run as released on 1 thread of an EPYC (Zen 4) at 4,096 rows, against its own MKL products, it printed 113x, 127x
  and 180x; with random numbers, and with output weights that it reads, 38x, 34x and 32x.
- 34x: what its PyTorch benchmark printed there on 1 thread at 128 rows, against a dense layer that gathers its weights like
  the tree; against PyTorch's ordinary dense layer the same tree layer was 6.2 times as fast.
- 341x, and 256x against BERT's 3,072 neurons: not measured; the ratio of operations, hence the ceiling of any claim.

None is of a whole model: the released one computes every neuron, and was never faster."""


def run_layer(options: BenchLayerOptions) -> None:
    """Print tables, and write a JSON file and a picture if asked. Raises UserError as `measure` does."""
    if options.claims:
        print(CLAIMS)
        return
    check_folders(options.json, options.plot)
    use_device("cpu")
    report = measure(options, zeros=False)
    print(text(report))
    if options.zeros:
        report["zeros_not_a_result"] = measure(options, zeros=True)
        print("\n" + "\n".join(zeros_lines(report)))
    write_files(report, options, draw)


def measure(options: BenchLayerOptions, zeros: bool) -> dict[str, Any]:
    """Check, then time every entry, and return the report. With `zeros`, weights and rows are zeros, and nothing is checked.

    Raises UserError if a process fails or computes something else; then nothing has been timed.
    """
    machine, threads = machine_facts(), usable_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as name, ExitStack() as running:
        folder = Path(name)
        write_job(folder, options, zeros)
        ours, peers, missing = line_up(folder, options, threads, running)
        checked = {} if zeros else check_everything(folder, options, ours, peers)
        machine |= ours[0].process.ask("machine", "read")
        cases = [time_case([*ours, *peers], rows, options, machine) for rows in options.rows]
        facts = {process.name: process.facts for process, _ in [ours[0], *peers]}
    report = header(options, machine, threads)
    report["job"]["zeros"] = zeros
    return report | {"facts": facts, "missing": missing, "checked": checked, "rows": cases}


def line_up(
    folder: Path, options: BenchLayerOptions, threads: int, running: ExitStack
) -> tuple[list[Entry], list[Entry], dict[str, str]]:
    """Start all processes, which end with `running`; return ours, the peers, and the reasons of those that are missing.

    Raises UserError if a process fails, or if none of our paths can be used.
    """
    reason = native.unavailable() if any(path != "gather" for path in options.our_paths) else ""
    missing = {path: f"no native kernels: {reason}" for path in options.our_paths if reason and path != "gather"}
    paths = [path for path in options.our_paths if path not in missing]
    if not paths:
        raise UserError(f"None of the paths can be used; there are {next(iter(missing.values()))}.")
    programs: dict[str, Sequence[str]] = {"ufbert": our_program("layer_ours")}
    for name in options.peers:
        if not name.startswith("torch"):
            programs[name] = our_program("layer_dense")
        elif options.peer_python:
            programs[name] = (options.peer_python, options.peer_script or str(PEER_SCRIPT))
        else:
            missing[name] = "no interpreter that has torch was named (--peer-python)"
    processes, not_installed = start_processes(programs, folder, threads, running, paths)
    ours = processes.pop("ufbert")
    peers = [Entry(process, name) for name, process in processes.items()]
    return [Entry(ours, path) for path in paths], peers, missing | not_installed


def time_case(
    entries: Sequence[Entry], rows: int, options: BenchLayerOptions, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Time one number of rows; return its report with seconds a layer.

    `chain` is a layer within the chain, `layer` a call of one layer. `best` is the fastest dense layer by type, or `any`.
    """
    load(entries, "inputs.npy", rows)
    seconds = {"chain": options.seconds_a_block, "layer": SINGLE_SHARE * options.seconds_a_block}
    times, calls = time_rounds(entries, seconds, options.blocks, f"{rows} rows a call")
    for blocks in times.values():
        blocks["chain"] = [call / options.layers for call in blocks["chain"]]
    works = {name: work(name, rows, options) for name in times}
    report = case_report(times, works, options.our_paths, machine)
    contestants, best = report["contestants"], {}
    peers = [name for name in contestants if name not in report["ratios"]]
    for peer in sorted(peers, key=lambda name: contestants[name]["chain"]["median"], reverse=True):
        best[type_of(peer)] = best["any"] = peer  # the fastest comes last
    for name, contestant in contestants.items():
        contestant["calls"] = calls[name]
    return {"rows": rows, **report, "best": best}


def headline_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the ratios of ours to the best dense layer: in float32, in a narrow path's own type, and in any type.

    The last is there since a narrow type may be the slower one.
    """
    ours = list(cases[0]["ratios"])
    kinds = dict.fromkeys(("float32", *map(type_of, ours), "any"))
    lines = []
    for case in cases:
        for kind in kinds:
            peer = case["best"].get(kind)
            compared = [path for path in ours if peer and kind in ("float32", "any", type_of(path))]
            cells = [ratio_text(case["ratios"][path][peer]) if path in compared else "" for path in ours]
            against = "best dense layer of any type" if kind == "any" else f"best dense {kind}"
            lines.append([str(case["rows"]), f"{against}: {peer or 'none was there'}", *cells])
    return markdown_grid(["rows", "against", *ours], lines, (0, *range(2, 2 + len(ours))))


def check_lines(checked: Mapping[str, Any]) -> list[str]:
    """Return the gates' measurements, a sentence each."""
    errors = ", ".join(f"{name} {error:.0e}" for name, error in checked["errors"].items())
    changed = ", ".join(f"{name} {share:.2%}" for name, share in checked["changed"].items())
    return [
        f"Largest errors against float64, of what the layers add: {errors}.",
        f"Rows of which a turn differs from that of float32 weights, mean over layers: {changed}.",
        f"Rows ended in at least {checked['leaves']:.0%} of the leaves of every tree.",
    ]


def text(report: dict[str, Any]) -> str:
    """Return the whole report in Markdown."""
    job = report["job"]
    neurons = job["n_trees"] * (2 ** (job["tree_depth"] + 1) - 1)
    sizes = (
        f"Trees: {job['n_trees'] * (job['tree_depth'] + 1)} of {neurons} neurons a row; dense layers: {job['dense']}; width "
        f"{job['d_model']}; {job['layers']} layers of different weights in a call, {job['used_threads']} threads."
    )
    single = "one call of one layer, µs"
    tables = [
        f"### {case['rows']} rows a call\n\n"
        + table(case, "chain", "µs a layer", 1e6, single, lambda c: figures(c["layer"]["median"], 1e6))
        for case in report["rows"]
    ]
    tables.append(f"### Times as fast as the best dense layer\n\n{headline_table(report['rows'])}")
    return page(report, sizes, check_lines(report["checked"]), tables)


def zeros_lines(report: dict[str, Any]) -> list[str]:
    """Return the ratios of ours to the best dense float32 layer with zeros, beside those with random numbers."""
    lines = ["### NOT A RESULT: weights and rows of zeros, every row walks one path", ""]
    for true, false in zip(report["rows"], report["zeros_not_a_result"]["rows"], strict=True):
        peer = true["best"].get("float32")
        for path, ratios in true["ratios"].items() if peer else ():
            wrong = false["ratios"][path][peer]["median"]
            lines.append(
                f"- {true['rows']} rows: {path} over {peer} would seem {wrong:.1f} with zeros, and is "
                f"{ratios[peer]['median']:.1f} with random numbers (NOT A RESULT)"
            )
    return lines


def draw(figure: Any, report: dict[str, Any]) -> None:
    """Draw times against rows, and ratios of the best dense float32 layer to each of ours, into a matplotlib figure."""
    import matplotlib.ticker

    figure.set_size_inches(11, 4.5)
    left, right = figure.subplots(1, 2)
    cases = report["rows"]
    rows = [case["rows"] for case in cases]
    for i, name in enumerate(cases[0]["contestants"]):
        ours = name in cases[0]["ratios"]
        line = {"ls": "-" if ours else "--", "color": f"C{i % 10}", "marker": "o", "ms": 3, "lw": 1.2}
        left.plot(rows, [1e6 * case["contestants"][name]["chain"]["median"] for case in cases], label=name, **line)
        ratios = [case["ratios"][name].get(case["best"].get("float32")) for case in cases] if ours else [None]
        if all(ratios):
            right.plot(rows, [ratio["median"] for ratio in ratios], **line)
            bounds = ([ratio[side] for ratio in ratios] for side in ("low", "high"))
            right.fill_between(rows, *bounds, alpha=0.12, color=line["color"])
    left.set_ylabel("microseconds a layer")
    right.set_ylabel("times as fast as the best dense float32 layer")
    for axis in (left, right):
        axis.loglog()
        axis.set_xticks(rows, [f"{b:,}" for b in rows])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.set_xlabel("rows a call")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)

"""Tables and pictures of times, ratios and the distance to what this machine can do, for all benchmarks.

How to read them: a time is the median over blocks. The limit is the longer of reading the weights once from memory and
doing the arithmetic, at the speeds measured here just before, so "over limit" says how much is still to be gained.
Weights that a cache still holds are read faster than memory allows, and few rows can therefore be below the limit.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ufbert.bench.harness import Times, paired_ratio, quartiles
from ufbert.errors import UserError
from ufbert.options.bench import ForwardOptions
from ufbert.report.page import markdown_grid
from ufbert.runtime.files import write_json

BUSY = 0.5
"""Load at the start, in processes, from which a report says that it is not to be trusted."""

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}

PLACES = ("peer_python", "peer_script", "json", "plot")
"""Options that say where something lies, which a report need not tell."""


class Work(NamedTuple):
    """The least that a call must read, write and compute."""

    bytes: float
    operations: float
    """A multiply-add counts two."""
    arithmetic: str
    """Type of the products."""


def type_of(name: str) -> Literal["float32", "bfloat16", "int8"]:
    """Return the type of an entry's weights (the narrower, if it has two), which its name tells."""
    return "bfloat16" if "bf16" in name or "bfloat16" in name else "int8" if "int8" in name else "float32"


def distinct_nodes(rows: int, depth: int) -> float:
    """Return the nodes of a tree that rows visit if every turn is even: the sum over levels of 2^l (1 - (1 - 2^-l)^rows)."""
    return sum(2**level * (1 - (1 - 2.0**-level) ** rows) for level in range(depth + 1))


def limit(work: Work, machine: Mapping[str, Any]) -> float | None:
    """Return the least seconds that the work can take here; None if the speed of its products was not measured (int8)."""
    if work.arithmetic not in machine:
        return None
    return max(work.bytes / machine["read"], work.operations / machine[work.arithmetic])


def header(options: ForwardOptions, machine: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Return the `machine` and the `job` of a report, once all is timed."""
    job = {name: value for name, value in asdict(options).items() if name not in PLACES}
    return {"machine": {**machine, "load_after": os.getloadavg()[0]}, "job": job | {"used_threads": threads}}


def case_report(
    times: Times, works: Mapping[str, Work], ours: Sequence[str], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Report one case (a number of rows, a shape), seconds throughout.

    `contestants` holds the spread of every work, its blocks, `bytes`, `operations` and `limit`; `ratios` peers over ours.
    """
    contestants: dict[str, dict[str, Any]] = {}
    for name, blocks in times.items():
        spreads = {work: dict(zip(("low", "median", "high"), quartiles(t), strict=True)) for work, t in blocks.items()}
        facts = {"bytes": works[name].bytes, "operations": works[name].operations, "limit": limit(works[name], machine)}
        contestants[name] = {**spreads, "blocks": blocks, **facts}
    first = {name: next(iter(blocks.values())) for name, blocks in times.items()}
    ours, peers = [name for name in times if name in ours], [name for name in times if name not in ours]
    ratios = {name: {peer: paired_ratio(first[name], first[peer])._asdict() for peer in peers} for name in ours}
    return {"contestants": contestants, "ratios": ratios}


def figures(seconds: float | None, unit: float) -> str:
    """Return a time in units a second with three figures that count, "-" for None."""
    if seconds is None:
        return "-"
    value = unit * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(ratio: Mapping[str, float]) -> str:
    """Return a ratio and its quartiles with three figures that count: level and five percent faster are not the same."""
    digits = 0 if ratio["median"] >= 100 else 1 if ratio["median"] >= 10 else 2
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def table(
    case: Mapping[str, Any], work: str, heading: str, unit: float, extra: str, cell: Callable[[dict[str, Any]], str]
) -> str:
    """Return a line for each contestant: its time of `work`, an `extra` column, the limit, and, of ours, the ratios."""
    peers = [name for name in case["contestants"] if name not in case["ratios"]]
    symbol = heading.split()[0]
    head = ["", heading, "quartiles", extra, f"limit, {symbol}", "over limit", *(f"faster than {p} by" for p in peers)]
    lines = []
    for name, contestant in case["contestants"].items():
        spread, bound = contestant[work], contestant["limit"]
        low, median, high = (figures(spread[key], unit) for key in ("low", "median", "high"))
        over = f"{spread['median'] / bound:.1f}" if bound else "-"
        ratios = [ratio_text(case["ratios"][name][peer]) if name in case["ratios"] else "" for peer in peers]
        lines.append([name, median, f"{low} to {high}", cell(contestant), figures(bound, unit), over, *ratios])
    return markdown_grid(head, lines, range(1, len(head)))


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """Return the processor and how busy it was, with a warning if other work ran here."""
    lines = ["{cpu}, {cores} cores, load {load:.1f} before and {load_after:.1f} after".format(**machine)]
    if machine["load"] > BUSY:
        lines.append(
            f"OTHER WORK RAN HERE (load {machine['load']:.1f} at the start): threads that wait for each other suffer most "
            "from that, as those of some peers do. Do not quote these ratios."
        )
    return lines


def page(report: Mapping[str, Any], sizes: str, checks: Sequence[str], tables: Sequence[str]) -> str:
    """Return the whole report in Markdown: machine, sizes, who took part and who is missing, checks, tables."""
    machine = report["machine"]
    lines = [
        *machine_lines(machine),
        f"Measured: reads {machine['read'] / 1e9:.1f} GB/s, float32 products {machine['float32'] / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {machine['bfloat16'] / 1e9:.0f} GFLOP/s.",
        sizes,
        *(f"{name}: {facts}" for name, facts in report["facts"].items()),
        *(f"{name}: missing: {reason}" for name, reason in report["missing"].items()),
        *checks,
    ]
    notes = [
        "Ratios are medians and quartiles of the ratios of neighbouring blocks.",
        "The limit is the longer of reading the weights once from memory and the arithmetic, at the speeds measured.",
    ]
    return "\n".join([*lines, "", "\n\n".join(tables), "", *notes])


def check_folders(*files: str) -> None:
    """Raise UserError if a file that will be written has no folder to lie in."""
    for name in files:
        if name and not Path(name).parent.is_dir():
            raise UserError(f"There is no folder {Path(name).parent} to write {Path(name).name} in.")


def write_files(report: dict[str, Any], options: ForwardOptions, draw: Callable[[Any, dict[str, Any]], None]) -> None:
    """Write the JSON file and the picture, if they are wanted. `draw` fills a matplotlib figure."""
    if options.json:
        write_json(Path(options.json), report)
    picture = options.plot or (str(Path(options.json).with_suffix(".svg")) if options.json else "")
    if not picture:
        return
    import matplotlib.figure

    figure = matplotlib.figure.Figure(layout="constrained")
    draw(figure, report)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    busy = "; OTHER WORK RAN HERE, do not quote" if machine["load"] > BUSY else ""
    figure.suptitle(f"{machine['cpu']}, {report['job']['used_threads']} threads{busy}", fontsize=10)
    figure.savefig(picture)

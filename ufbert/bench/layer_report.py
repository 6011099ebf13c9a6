"""What `ufbert bench layer` says: times, ratios, the distance to the machine's limit, as a table."""

import statistics
from collections.abc import Sequence
from typing import Any

from ufbert.bench.contest import paired_ratio
from ufbert.bench.layer_gates import type_of
from ufbert.bench.layer_job import Layers
from ufbert.report.page import markdown_grid

BUSY = 0.5
"""Load at the start, in processes, from which the report says that it is not to be trusted."""

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def distinct_nodes(rows: int, depth: int) -> float:
    """Nodes of a tree that rows visit if every turn is even: the sum over levels of 2^l (1 - (1 - 2^-l)^rows)."""
    return sum(2**level * (1 - (1 - 2.0**-level) ** rows) for level in range(depth + 1))


def work(name: str, rows: int, shape: Layers) -> tuple[float, float]:
    """(bytes that a layer must read and write, its operations); a multiply-add counts two.

    A tree layer reads the nodes that its rows visit, each once, a dense layer its weights; rows come and go as float32.
    """
    kind, moved = type_of(name), 2 * rows * shape.d * 4
    if name == "gather" or name.startswith("native"):
        w_in = 4 if name.endswith("-exact") else BYTES[kind]
        nodes = shape.trees * distinct_nodes(rows, shape.depth)
        return nodes * shape.d * (w_in + BYTES[kind]) + moved, 4.0 * rows * shape.trees * (shape.depth + 1) * shape.d
    return 2.0 * shape.dense * shape.d * BYTES[kind] + moved, 4.0 * rows * shape.dense * shape.d


def limit(name: str, rows: int, shape: Layers, machine: dict[str, Any]) -> float | None:
    """Seconds below which this machine cannot bring a layer, by what was measured of it: the longer of reading from memory
    and arithmetic. None where the arithmetic's speed was not measured (int8 products)."""
    n_bytes, operations = work(name, rows, shape)
    kind = "float32" if name == "gather" or name.startswith("native") else type_of(name)
    return max(n_bytes / machine["read"], operations / machine[kind]) if kind in machine else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "low": low, "high": high}


def rows_report(
    rows: int, found: dict[str, Any], ours: Sequence[str], peers: Sequence[str], shape: Layers, machine: dict[str, Any]
) -> dict[str, Any]:
    """The report of one number of rows, seconds throughout: contestants, ratios of every peer's time to each of ours from
    neighbouring blocks, and `best`, the fastest dense layer of each type and of `any`."""
    contestants: dict[str, dict[str, Any]] = {}
    for name, times in found.items():
        n_bytes, operations = work(name, rows, shape)
        contestants[name] = {
            "chain": spread(times["chain"]), "layer": spread(times["layer"]), "blocks": times, "bytes": n_bytes,
            "operations": operations, "limit": limit(name, rows, shape, machine),
        }  # fmt: skip
    ratios = {
        path: {peer: paired_ratio(found[path]["chain"], found[peer]["chain"])._asdict() for peer in peers}
        for path in ours
    }
    best = {}
    for peer in sorted(peers, key=lambda name: contestants[name]["chain"]["median"], reverse=True):
        best[type_of(peer)] = best["any"] = peer  # the fastest comes last
    return {"rows": rows, "contestants": contestants, "ratios": ratios, "best": best}


def micro(seconds: float | None) -> str:
    """Microseconds with three figures that count."""
    if seconds is None:
        return "-"
    value = 1e6 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(ratio: dict[str, float]) -> str:
    """A ratio and its quartiles."""
    digits = 0 if ratio["median"] >= 100 else 1
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def table(one: dict[str, Any]) -> str:
    """The table of one number of rows; the last columns say how many times as fast as a line's peer ours are."""
    ours = list(one["ratios"])
    head = ["", "µs a layer", "quartiles", "one call of one layer, µs", "limit, µs", "over limit"]
    lines = []
    for name, found in one["contestants"].items():
        chain, bound = found["chain"], found["limit"]
        cells = [name, micro(chain["median"]), f"{micro(chain['low'])} to {micro(chain['high'])}"]
        cells += [micro(found["layer"]["median"]), micro(bound)]
        cells.append(f"{chain['median'] / bound:.1f}" if bound else "-")
        lines.append([*cells, *("" if name in ours else times(one["ratios"][path][name]) for path in ours)])
    return markdown_grid([*head, *(f"{path} faster by" for path in ours)], lines, range(1, 6 + len(ours)))


def headline_table(rows: Sequence[dict[str, Any]]) -> str:
    """For every number of rows, how many times as fast ours are as the best dense layer: in float32, in the type of narrow
    paths of ours, and in any type, since a narrow type may be the slower one."""
    ours = list(rows[0]["ratios"])
    kinds = dict.fromkeys(("float32", *map(type_of, ours), "any"))
    lines = []
    for one in rows:
        for kind in kinds:
            peer = one["best"].get(kind)
            compared = [path for path in ours if peer and kind in ("float32", "any", type_of(path))]
            cells = [times(one["ratios"][path][peer]) if path in compared else "" for path in ours]
            against = "best dense layer of any type" if kind == "any" else f"best dense {kind}"
            lines.append([str(one["rows"]), f"{against}: {peer or 'none was there'}", *cells])
    return markdown_grid(["rows", "against", *ours], lines, (0, *range(2, 2 + len(ours))))


def checks(report: dict[str, Any]) -> list[str]:
    """What the gates found."""
    found, lines = report["checked"], []
    errors = ", ".join(f"{name} {error:.0e}" for name, error in found["errors"].items())
    lines.append(f"Largest errors against float64, of what the layers add: {errors}.")
    changed = ", ".join(f"{name} {share:.2%}" for name, share in found["changed"].items())
    lines.append(f"Rows of which a turn differs from that of float32 weights, mean over layers: {changed}.")
    lines.append(f"Rows ended in at least {found['leaves']:.0%} of the leaves of every tree.")
    return lines


def text(report: dict[str, Any]) -> str:
    """Everything, in Markdown."""
    machine, job = report["machine"], report["job"]
    neurons = job["n_trees"] * (2 ** (job["tree_depth"] + 1) - 1)
    used = job["n_trees"] * (job["tree_depth"] + 1)
    lines = [
        "{cpu}, {cores} cores, load {load:.1f} before and {load_after:.1f} after".format(**machine),
        f"Measured: reads {machine['read'] / 1e9:.1f} GB/s, float32 products {machine['float32'] / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {machine['bfloat16'] / 1e9:.0f} GFLOP/s.",
        f"Trees: {used} of {neurons} neurons a row; dense layers: {job['dense']}; width {job['d_model']}; {job['layers']} "
        f"layers of different weights in a call, {job['used_threads']} threads.",
        *(f"{name}: {facts}" for name, facts in report["facts"].items()),
        *(f"{name}: missing: {why}" for name, why in report["missing"].items()),
        *(checks(report) if report["checked"] else []),
    ]
    if machine["load"] > BUSY:
        lines.append(
            f"OTHER WORK RAN HERE (load {machine['load']:.1f} at the start): threads that wait for each other suffer most from "
            "that, as those of some peers do. Do not quote these ratios."
        )
    for one in report["rows"]:
        lines += ["", f"### {one['rows']} rows a call", "", table(one)]
    lines += ["", "### Times as fast as the best dense layer", "", headline_table(report["rows"]), ""]
    lines.append("Ratios are medians and quartiles of the ratios of neighbouring blocks.")
    lines.append(
        "The limit is the longer of reading the weights once from memory and the arithmetic, at the speeds measured."
    )
    lines.append("Weights that a cache still holds are read faster, so that few rows can be below it.")
    return "\n".join(lines)

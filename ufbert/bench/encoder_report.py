"""What `ufbert bench encoder` says: times, ratios, where the time goes, the distance to the machine's limit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ufbert.bench.contest import paired_ratio
from ufbert.bench.encoder_job import Shape
from ufbert.bench.layer_gates import type_of
from ufbert.bench.layer_report import BUSY, BYTES, distinct_nodes, spread, times
from ufbert.config import ModelConfig
from ufbert.cost.flops import forward_flops_per_token
from ufbert.report.page import markdown_grid


def work(config: ModelConfig, kind: str, shape: Shape) -> tuple[float, float]:
    """(bytes of the weights that a call reads, each once; its operations, a multiply-add counting two)."""
    tokens, d = shape.batch * shape.tokens, config.d_model
    operations = tokens * forward_flops_per_token(config, shape.tokens, masked_trees=False, training=False)
    weights = 0.0
    for mixer, feedforward in config.layers:
        weights += 4 * d * d if mixer == "attention" else 0
        nodes = config.n_trees * distinct_nodes(tokens, config.tree_depth)
        weights += 2 * d * (nodes if feedforward == "tree" else config.d_hidden)
    return weights * BYTES[kind], operations


def limit(config: ModelConfig, kind: str, shape: Shape, machine: dict[str, Any]) -> float | None:
    """Seconds below which this machine cannot bring a call, by what was measured of it: the longer of reading the weights from
    memory and the arithmetic. None where the arithmetic's speed was not measured (int8 products)."""
    n_bytes, operations = work(config, kind, shape)
    return max(n_bytes / machine["read"], operations / machine[kind]) if kind in machine else None


def shape_report(
    shape: Shape,
    found: dict[str, list[float]],
    parts: dict[str, dict[str, float]],
    models: dict[str, ModelConfig],
    ours: Sequence[str],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The report of one shape, seconds throughout."""
    contestants: dict[str, Any] = {}
    for name, blocks in found.items():
        config = models[name.split("-")[0]] if name in ours else models["dense"]
        n_bytes, operations = work(config, type_of(name), shape)
        contestants[name] = {
            "call": spread(blocks), "blocks": blocks, "bytes": n_bytes, "operations": operations,
            "limit": limit(config, type_of(name), shape, machine), "parts": parts.get(name, {}),
        }  # fmt: skip
    ratios = {
        name: {peer: paired_ratio(found[name], found[peer])._asdict() for peer in found if peer not in ours}
        for name in ours
        if name in found
    }
    return {"shape": str(shape), "tokens": shape.batch * shape.tokens, "contestants": contestants, "ratios": ratios}


def milli(seconds: float | None) -> str:
    """Milliseconds with three figures that count."""
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"


def table(one: dict[str, Any]) -> str:
    """The table of one shape; the last columns say how many times as fast as a peer ours are."""
    peers = [name for name in one["contestants"] if name not in one["ratios"]]
    head = [
        "",
        "ms a call",
        "quartiles",
        "tokens/s",
        "limit, ms",
        "over limit",
        *(f"faster than {name} by" for name in peers),
    ]
    lines = []
    for name, found in one["contestants"].items():
        call, bound = found["call"], found["limit"]
        cells = [name, milli(call["median"]), f"{milli(call['low'])} to {milli(call['high'])}"]
        cells += [
            f"{one['tokens'] / call['median']:,.0f}",
            milli(bound),
            f"{call['median'] / bound:.1f}" if bound else "-",
        ]
        lines.append([*cells, *(times(one["ratios"][name][peer]) if name in one["ratios"] else "" for peer in peers)])
    return markdown_grid(head, lines, range(1, 6 + len(peers)))


def parts_table(one: dict[str, Any]) -> str:
    """Where the time of ours goes: each part computed alone, and what is left."""
    names = list(one["ratios"])
    kinds = list(dict.fromkeys(part for name in names for part in one["contestants"][name]["parts"]))
    lines = []
    for name in names:
        found, call = one["contestants"][name]["parts"], one["contestants"][name]["call"]["median"]
        cells = [f"{milli(found[kind])} ({found[kind] / call:.0%})" if kind in found else "" for kind in kinds]
        lines.append([name, *cells, f"{1 - sum(found.values()) / call:.0%}"])
    return markdown_grid(["ms (share)", *kinds, "the rest"], lines, range(1, 2 + len(kinds)))


def gate_line(name: str, found: dict[str, float]) -> str:
    """What the gates found of one contestant."""
    if "error" not in found:
        return f"{name}: off by {found['relative']:.1e} from our dense float32 BERT, median over tokens."
    said = f"{name}: off by {found['relative']:.1e} from the training graph, median over tokens"
    if type_of(name) == "float32":
        said += f", at most {found['error']:.0e} where turns are clear (all but {found['unclear']:.2%})"
    elif found["changed"]:
        said += f"; {found['changed']:.2%} of the tokens take another way through a layer's tree"
    return said + (f"; {found['leaves']:.0%} of the leaves that even turns would use." if found["leaves"] != 1 else ".")


def text(report: dict[str, Any]) -> str:
    """Everything, in Markdown."""
    machine, job = report["machine"], report["job"]
    lines = [
        "{cpu}, {cores} cores, load {load:.1f} before and {load_after:.1f} after".format(**machine),
        f"Measured: reads {machine['read'] / 1e9:.1f} GB/s, float32 products {machine['float32'] / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {machine['bfloat16'] / 1e9:.0f} GFLOP/s.",
        f"Encoders of {job['layers']} layers x {job['d_model']}; trees of {2 ** (job['tree_depth'] + 1) - 1} neurons, "
        f"{job['tree_depth'] + 1} used; {job['used_threads']} threads.",
        *(f"{name}: {facts}" for name, facts in report["facts"].items()),
        *(f"{name}: missing: {why}" for name, why in report["missing"].items()),
        *(gate_line(name, found) for name, found in report["checked"].items()),
        *(
            f"{name}: {found['seconds']:.2f} s from its folder to a first answer, {found['bytes'] / 1e6:,.0f} MB of weights"
            + (f", {found['memory'] / 1e6:,.0f} MB of memory." if found["memory"] else ".")
            for name, found in report["starts"].items()
        ),
    ]
    if machine["load"] > BUSY:
        lines.append(f"OTHER WORK RAN HERE (load {machine['load']:.1f} at the start). Do not quote these ratios.")
    for one in report["shapes"]:
        lines += ["", f"### {one['shape']}: texts x tokens of a call", "", table(one), "", parts_table(one)]
    lines += [
        "",
        "Ratios are medians and quartiles of the ratios of neighbouring blocks. Parts were timed alone, at their best.",
    ]
    lines.append(
        "The limit is the longer of reading the weights once from memory and the arithmetic, at the speeds measured."
    )
    return "\n".join(lines)


def draw(report: dict[str, Any], to: Path) -> None:
    """A bar for each contestant at each shape, ours with their parts, to an .svg or .png file."""
    import matplotlib.figure
    import matplotlib.patches

    shapes = report["shapes"]
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(shapes), 4.2), layout="constrained")
    kinds = list(dict.fromkeys(k for one in shapes for c in one["contestants"].values() for k in c["parts"]))
    colors = {kind: f"C{i}" for i, kind in enumerate(kinds)} | {"the rest": "0.75", "a peer": "0.45"}
    for axis, one in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        names = list(one["contestants"])[::-1]
        for y, name in enumerate(names):
            found, left = one["contestants"][name], 0.0
            whole = 1e3 * found["call"]["median"]
            scale = min(1.0, whole / max(1e-9, 1e3 * sum(found["parts"].values())))
            for kind, seconds in found["parts"].items():
                axis.barh(y, 1e3 * seconds * scale, left=left, color=colors[kind], height=0.7)
                left += 1e3 * seconds * scale
            axis.barh(y, whole - left, left=left, color=colors["the rest" if found["parts"] else "a peer"], height=0.7)
            axis.text(whole, y, f" {whole:.3g}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("milliseconds a call")
        axis.set_title(one["shape"], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [matplotlib.patches.Patch(color=color, label=kind) for kind, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    machine = report["machine"]
    busy = "; OTHER WORK RAN HERE, do not quote" if machine["load"] > BUSY else ""
    figure.suptitle(f"{machine['cpu']}, {report['job']['used_threads']} threads{busy}", fontsize=10)
    figure.savefig(to)

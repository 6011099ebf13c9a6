"""The picture of `ufbert bench layer`."""

from pathlib import Path
from typing import Any


def draw(report: dict[str, Any], to: Path) -> None:
    """Times against rows, and ratios of the best dense float32 layer to each of ours, to an .svg or .png file."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = report["rows"]
    rows = [one["rows"] for one in found]
    for name in found[0]["contestants"]:
        style = "-" if name in found[0]["ratios"] else "--"
        spreads = [one["contestants"][name]["chain"] for one in found]
        left.plot(rows, [1e6 * spread["median"] for spread in spreads], style, marker="o", ms=3, lw=1.2, label=name)
    left.set_ylabel("microseconds a layer")
    for path in found[0]["ratios"]:
        ratios = [one["ratios"][path].get(one["best"].get("float32")) for one in found]
        if all(ratios):
            (line,) = right.plot(rows, [ratio["median"] for ratio in ratios], marker="o", ms=3, lw=1.2, label=path)
            bounds = ([ratio[side] for ratio in ratios] for side in ("low", "high"))
            right.fill_between(rows, *bounds, alpha=0.15, color=line.get_color())
    right.set_ylabel("times as fast as the best dense float32 layer")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("rows a call")
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(to)

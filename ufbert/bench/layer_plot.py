"""The picture of `ufbert bench layer`."""

from pathlib import Path
from typing import Any

from ufbert.bench.layer_report import BUSY


def draw(report: dict[str, Any], to: Path) -> None:
    """Times against rows, and ratios of the best dense float32 layer to each of ours, to an .svg or .png file."""
    import matplotlib.figure
    import matplotlib.ticker

    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = report["rows"]
    rows = [one["rows"] for one in found]
    ours = list(found[0]["ratios"])
    colors = dict(
        zip(found[0]["contestants"], [f"C{i % 10}" for i in range(len(found[0]["contestants"]))], strict=True)
    )
    for name, color in colors.items():
        line = {"ls": "-" if name in ours else "--", "color": color, "marker": "o", "ms": 3, "lw": 1.2}
        left.plot(rows, [1e6 * one["contestants"][name]["chain"]["median"] for one in found], label=name, **line)
        ratios = [one["ratios"][name].get(one["best"].get("float32")) for one in found] if name in ours else [None]
        if all(ratios):
            right.plot(rows, [ratio["median"] for ratio in ratios], **line)
            bounds = ([ratio[side] for ratio in ratios] for side in ("low", "high"))
            right.fill_between(rows, *bounds, alpha=0.12, color=color)
    left.set_ylabel("microseconds a layer")
    right.set_ylabel("times as fast as the best dense float32 layer")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(rows, [f"{b:,}" for b in rows])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.set_xlabel("rows a call")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    busy = "; OTHER WORK RAN HERE, do not quote" if machine["load"] > BUSY else ""
    figure.suptitle(f"{machine['cpu']}, {report['job']['used_threads']} threads{busy}", fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(to)

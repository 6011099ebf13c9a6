"""What a benchmark prints and writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def show(report: dict[str, Any], verb: str, speed: Callable[[dict[str, Any]], str], to: str) -> None:
    """Print the table (machine, speeds, ratios), where `speed` says a contestant's and `verb` what it did; write everything
    to the JSON file `to`, unless it is ""."""
    print("{cpu}, {cores} cores, load {load:.1f} before and {load_after:.1f} after".format(**report["machine"]))
    for one in report["contestants"]:
        print(f"{one['name']:<14} {speed(one)}  ({one['facts']})")
    for name, ratio in report["ratios"].items():
        loss = "another model" if ratio["loss_difference"] is None else f"losses within {ratio['loss_difference']:.0e}"
        print(
            f"ufbert {verb} {ratio['median']:.2f} times as fast as {name}: median of {ratio['pairs']} pairs of blocks, "
            f"quartiles {ratio['low']:.2f} and {ratio['high']:.2f}, fastest blocks {ratio['fastest']:.2f}; {loss}"
        )
    if to:
        Path(to).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

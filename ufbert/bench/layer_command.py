"""`ufbert bench layer`: options to tables, a JSON file and a picture."""

import json
import tempfile
from pathlib import Path
from typing import Any

from ufbert.bench.layer_options import BenchLayerOptions, parse
from ufbert.errors import UserError
from ufbert.runtime.device import use_device

CLAIMS = """Published, or implied by what was published, of one tree layer of UltraFastBERT 1x11 (12 of 4,095 neurons):

- 48x and 78x: the paper's figures for one layer on a CPU, against its own dense layer. The benchmark released with them never
  writes its weights or rows, so that every row walks one path; which code gave the printed figures is not known. Built with
  MKL and run as released on 1 thread of an EPYC (Zen 4) at 4,096 rows, against its own MKL products, it printed 113x, 127x
  and 180x; with random numbers, and with output weights that it reads, 38x, 34x and 32x.
- 34x: what its PyTorch benchmark printed there on 1 thread at 128 rows, against a dense layer that gathers its weights like
  the tree; against PyTorch's ordinary dense layer the same tree layer was 6.2 times as fast.
- 341x, and 256x against BERT's 3,072 neurons: not measured; the ratio of operations, hence the ceiling of any claim.

None is of a whole model: the released one computes every neuron, and was never faster."""

NOT_A_RESULT = "NOT A RESULT: weights and rows of zeros, every row walks one path"


def layer_command(args: list[str]) -> None:
    """`ufbert bench layer`. Raises UserError if a contestant fails or computes something else."""
    options = parse(args)
    if options.claims:
        print(CLAIMS)
        return
    for name in (options.json, options.plot):
        if name and not Path(name).parent.is_dir():
            raise UserError(f"There is no folder {Path(name).parent} to write {Path(name).name} in.")
    use_device("cpu")
    report = run(options, zeros=False)
    from ufbert.bench.layer_report import text

    print(text(report))
    if options.zeros:
        report["zeros_not_a_result"] = run(options, zeros=True)
        print("\n" + "\n".join(zeros_lines(report)))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    picture = options.plot or (str(Path(options.json).with_suffix(".svg")) if options.json else "")
    if picture:
        from ufbert.bench.layer_plot import draw

        draw(report, Path(picture))


def run(options: BenchLayerOptions, *, zeros: bool) -> dict[str, Any]:
    """A race in a folder that is gone afterwards."""
    from ufbert.bench.layer import race

    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as folder:
        return race(Path(folder), options, zeros)


def zeros_lines(report: dict[str, Any]) -> list[str]:
    """What zeros do to the ratios of ours to the best dense float32 layer of the race with random numbers."""
    lines = [f"### {NOT_A_RESULT}", ""]
    for true, false in zip(report["rows"], report["zeros_not_a_result"]["rows"], strict=True):
        peer = true["best"].get("float32")
        for path, ratios in true["ratios"].items() if peer else ():
            wrong = false["ratios"][path][peer]["median"]
            lines.append(
                f"- {true['rows']} rows: {path} over {peer} would seem {wrong:.1f} with zeros, and is "
                f"{ratios[peer]['median']:.1f} with random numbers (NOT A RESULT)"
            )
    return lines

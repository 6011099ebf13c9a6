"""`ufbert bench encoder`: options to tables, a JSON file and a picture."""

import json
import tempfile
from pathlib import Path

from ufbert.bench.encoder_options import parse
from ufbert.errors import UserError
from ufbert.runtime.device import use_device


def encoder_command(args: list[str]) -> None:
    """`ufbert bench encoder`. Raises UserError if a contestant fails or computes something else."""
    options = parse(args)
    for name in (options.json, options.plot):
        if name and not Path(name).parent.is_dir():
            raise UserError(f"There is no folder {Path(name).parent} to write {Path(name).name} in.")
    use_device("cpu")
    from ufbert.bench.encoder import race
    from ufbert.bench.encoder_report import draw, text

    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as folder:
        report = race(Path(folder), options)
    print(text(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    picture = options.plot or (str(Path(options.json).with_suffix(".svg")) if options.json else "")
    if picture:
        draw(report, Path(picture))

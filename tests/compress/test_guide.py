"""The commands of the guide to compression run as they stand there, on a small model and for an update each."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import COMPRESS, REPO

from ufbert import cli
from ufbert.compress import prune
from ufbert.compress.report import read_results
from ufbert.hub.folder import load_model, save_model


@pytest.mark.long
def test_the_commands_of_the_guide_run(numbered, toy_task, tmp_path, monkeypatch, capsys):
    text = (REPO / "docs" / "compression.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    size = {"d_model": 48, "n_heads": 12, "d_hidden": 160, "n_layers": 6}
    save_model(Path("runs/glue/sst2"), numbered("bert", "classifier", **size))
    save_model(Path("runs/NAME/model"), numbered("bert", "masked_lm", **size))
    rng = np.random.default_rng(0)
    lines = [" ".join(f"word{i}" for i in rng.integers(0, 50, 60)) for _ in range(80)]
    Path("text.txt").write_text("\n\n".join(lines))
    # A head takes a millisecond on this machine.
    times = lambda models, shape, blocks: {"it": [1e-3 * models["it"][0].config.n_heads]}  # noqa: E731
    monkeypatch.setattr(prune, "time_models", times)
    small = {
        "prune": ["--calibration=2"], "to-tree": ["--calibration-tokens=300"], "distill": [],
    }  # fmt: skip
    for command in commands:
        assert command[:3] == ["uv", "run", "ufbert"]
        verb, rest = cli.split_verb(command[3:])
        rest = ["text:text.txt" if word == "demo" else word for word in rest]
        if "--tasks" in rest:  # a task of one's own, which needs no download
            at = rest.index("--tasks")
            rest[at : at + 2] = toy_task
        if verb == "compress":
            rest += [*COMPRESS, "--budget=1steps", *small[rest[rest.index("--method") + 1]]]
        cli.call(verb, rest)
    assert re.search(r"^(yes|no)\b", capsys.readouterr().out, re.MULTILINE), "predict says a label"
    assert read_results(Path("runs/shallow")).unit == "nats", "distilled on text"
    child = {name: load_model(Path("runs") / name / "model").config for name in ("half", "fast", "shallow", "trees")}
    assert (child["half"].d_hidden, child["half"].n_heads) == (80, 8)
    assert child["fast"].n_heads == 10
    assert child["shallow"].n_layers == 3
    assert set(child["trees"].feedforward) == {"routed_tree"}
    names = [row.name for row in read_results(Path("runs/trees")).rows]
    assert names == ["before", "tree_128", "tree_64", "narrow_128", "narrow_64", "none"]

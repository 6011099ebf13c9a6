"""Cells run once, whatever ends the command; one that fails stops no other; what cannot compare is refused before any runs."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import REPO, write_sweep
from made import finish_run, times_of

from ufbert import cli
from ufbert.compare import plan as compare_plan
from ufbert.compare import run as compare_run
from ufbert.compare.results import read_results
from ufbert.cost.speeds import Speeds
from ufbert.errors import Interrupted, UserError
from ufbert.pretrain.resolve import Platform
from ufbert.runtime.files import write_json
from ufbert.study import processes

STAND_IN = """
import os, shutil, signal, sys, time
from pathlib import Path
home, verb, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
flag = "--json=" if verb == "bench" else "--out="
out = Path(next(w for w in words if w.startswith(flag)).removeprefix(flag))
if verb == "train":
    name, key, source = out.parent.name, f"{out.parts[-4]} {out.parent.name}", home / "runs" / out.parent.name[:-6]
elif verb == "finetune":
    key, source = f"glue {out.parts[-3]}", home / "sweep"
else:
    key, source = "speed", home / "speed.json"
with (home / "calls.txt").open("a") as file:
    file.write(key + (" resumed" if "--resume" in words else "") + "\\n")
if verb != "bench":
    out.mkdir(parents=True, exist_ok=True)
if verb == "train":
    shutil.copy(source / "config.json", out)
if (home / f"fail {key}").exists():
    print("error: no luck.", file=sys.stderr)
    sys.exit(2)
if (home / f"wait {key}").exists():
    (home / f"wait {key}").unlink()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        time.sleep(0.01)
if verb == "bench":
    shutil.copy(source, out)
else:
    shutil.copytree(source, out, dirs_exist_ok=True)
"""
"""A stand-in for `ufbert train`, `finetune` and `bench encoder`."""
NAMES = ("ultrafastbert_1x11", "path_dense_1x11", "crammed_bert")


def unmeasured(*_: object):
    raise AssertionError("a budget of tokens asks for no speed")


def glue_folder(folder: Path) -> Path:
    """A folder with a small cut of a task."""
    for split in ("train", "dev"):
        rows = [f"{i}\ta king\ta bird {i}\t{'entailment' if i % 2 else 'not_entailment'}" for i in range(6)]
        (folder / "RTE-small").mkdir(parents=True, exist_ok=True)
        (folder / "RTE-small" / f"{split}.tsv").write_text(
            "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n"
        )
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder of prepared text that these tests share."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def compare(tmp_path, corpus_file, prepared, monkeypatch):
    """Runs `ufbert compare` with the stand-in; `ran` are the cells of the last call."""
    home = tmp_path / "home"
    for number, name in enumerate(NAMES):
        finish_run(home / "runs" / name, name, 3.0 + number / 10)
    write_sweep(home / "sweep", tasks=("RTE-small",), seeds=(0, 1))
    write_json(home / "speed.json", asdict(times_of(list(NAMES), NAMES[0])))
    (home / "stand_in.py").write_text(STAND_IN)
    (home / "calls.txt").touch()
    monkeypatch.setattr(processes, "PROGRAM", (sys.executable, str(home / "stand_in.py"), str(home)))
    monkeypatch.setattr(processes, "POLL", 0.01)
    speeds = Speeds(1e9, 1e9, 1e11, source="a test")
    platform = Platform(True, False, lambda run: speeds, lambda run: "gather")
    monkeypatch.setattr(compare_run, "local_platform", lambda name: platform)
    monkeypatch.setattr(compare_run.native, "unavailable", lambda: "")
    words = [
        "--scale=tiny", "--model.vocab-size=300", "--data.seq-len=32", "--data.eval-rows=16", "--train.micro-rows=8",
        "--shapes", "1x32", f"--corpus=text:{corpus_file}", f"--prepared={prepared}", "--device=cpu",
        f"--glue-dir={glue_folder(tmp_path / 'GLUE')}", "--glue-seeds=0,1", f"--out={tmp_path / 'c'}",
    ]  # fmt: skip

    def call(*more: str, models: tuple[str, ...] = NAMES[:2]) -> list[str]:
        before = len((home / "calls.txt").read_text().splitlines())
        try:
            cli.call("compare", [*models, *words, *(more or ("--tokens=1e3",))])
        finally:
            call.ran = (home / "calls.txt").read_text().splitlines()[before:]
        return call.ran

    call.home, call.folder, call.prepared, call.ran = home, tmp_path / "c", prepared, []
    return call


def test_every_cell_runs_once_and_more_may_be_added(compare, capsys):
    first, second, third = NAMES
    asked = ("--tokens=1e3", "--tasks=rte-small", "--seeds=0,1", f"--first-seed-only={second}")
    assert compare(*asked) == [
        f"tokens {first}-seed0", f"tokens {second}-seed0", f"tokens {first}-seed1", f"glue {first}", f"glue {second}", "speed",
    ]  # fmt: skip
    assert f"{first} has the lowest held-out loss, 3.000 nats" in capsys.readouterr().out
    assert compare(*asked) == []
    assert compare(*asked, "--budget=1m", models=NAMES) == [
        f"tokens {third}-seed0", f"tokens {third}-seed1", f"time {first}-seed0", f"time {second}-seed0", f"time {third}-seed0",
        f"time {first}-seed1", f"time {third}-seed1", f"glue {third}", "speed",
    ]  # fmt: skip
    results = read_results(compare.folder)
    assert [model.name for model in results.models] == list(NAMES)
    assert not results.waiting
    fingerprints = {
        json.loads((compare.folder / axis / "study.json").read_text())["fingerprint"] for axis in ("tokens", "time")
    }
    assert len(fingerprints) == 1
    records = {cell.name: cell for cell in results.cells}
    assert records[f"time: {third}-seed1"].command.startswith("ufbert train --scale=tiny")
    assert f"--config={third}" in records[f"time: {third}-seed1"].command
    assert "--seeds=0,1" in records[f"glue: {third} on rte-small"].command
    assert f"{second}={compare.folder}/tokens/cells/{second}-seed0/run/model" in records["speed"].command
    with pytest.raises(UserError, match="tokens=1000"):
        compare("--tokens=2e3")
    assert compare.ran == []


def test_a_plan_runs_nothing_and_says_hours_and_money(compare, capsys, monkeypatch):
    monkeypatch.setattr("ufbert.study.run.expected_seconds", lambda variant, platform: 1800.0)
    monkeypatch.setattr(compare_plan, "expected_seconds", lambda variant, platform: 1800.0)
    assert compare("--budget=30m", "--plan", "--tasks=rte-small", "--price=3", "--seeds=0,1") == []
    out = capsys.readouterr().out
    assert f"{NAMES[0]}: 2 cell(s), 0 finished; each 30m, 30.0 min (as given)" in out
    assert "fine-tuning: 2 cells, 0 finished" in out
    assert "in all 4.0" in out
    assert "at 3.00 an hour for what is not finished. Nothing was run." in out
    assert not compare.folder.exists()


def test_cells_that_fail_stop_no_other_are_named_and_tried_again(compare):
    first, second, _ = NAMES
    (compare.home / f"fail tokens {first}-seed0").touch()
    (compare.home / f"fail glue {second}").touch()
    asked = ("--tokens=1e3", "--tasks=rte-small")
    with pytest.raises(UserError) as error:
        compare(*asked)
    assert str(error.value) == (
        f"2 cells failed: tokens: {first}-seed0 (no luck); {second} on rte-small (no luck). The same command tries again."
    )
    assert compare.ran == [f"tokens {first}-seed0", f"tokens {second}-seed0", f"glue {second}", "speed"]
    results = read_results(compare.folder)
    assert results.failed == {f"tokens: {first}-seed0": "no luck.", f"glue: {second} on rte-small": "no luck."}
    assert "FAILED" in (compare.folder / "results.md").read_text()
    for path in compare.home.glob("fail *"):
        path.unlink()
    assert compare(*asked) == [f"tokens {first}-seed0 resumed", f"glue {first}", f"glue {second}", "speed"]
    assert not read_results(compare.folder).failed


def test_a_signal_at_any_cell_leaves_the_rest_for_the_same_command(compare):
    cells = [*(f"tokens {name}-seed0" for name in NAMES[:2]), *(f"glue {name}" for name in NAMES[:2]), "speed"]
    ran = []
    for cell in (cells[1], cells[2], cells[4]):
        (compare.home / f"wait {cell}").touch()
        with pytest.raises(Interrupted, match="the same command goes on") as stop:
            compare("--tokens=1e3", "--tasks=rte-small")
        assert stop.value.code == 143
        assert compare.ran[-1].removesuffix(" resumed") == cell
        ran += compare.ran[:-1]
    assert compare("--tokens=1e3", "--tasks=rte-small") == ["speed"]
    assert [name.removesuffix(" resumed") for name in (*ran, "speed")] == cells
    assert f"{cells[1]} resumed" in ran
    results = read_results(compare.folder)
    assert (results.failed, results.waiting) == ({}, [])
    assert {cell.name: cell.restarts for cell in results.cells}[f"tokens: {NAMES[1]}-seed0"] == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--budget=20steps",), "counts steps"),
        (("--tokens=1e3", "--shapes", "1x32", "1x4096"), "ultrafastbert_1x11 reads at most 128 tokens"),
        (("--tokens=1e3", "--tasks=cola"), "does not have all of CoLA"),
        (("--tokens=1e3", "--tasks=rte-small", "--one-seed-tasks=rte"), "RTE"),
        (("--tokens=1e3", "--first-seed-only=fnet"), "--first-seed-only 'fnet' is none of the models"),
        (("--tokens=1e3", "--baseline=path_dense"), "did you mean path_dense_1x11"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(compare, more, words):
    with pytest.raises(UserError, match=words):
        compare(*more)
    assert compare.ran == []
    assert not compare.folder.exists()


def test_models_of_other_vocabularies_are_refused(compare):
    with pytest.raises(UserError, match=r"do not compare: model.vocab_size is 300 and 200"):
        compare(models=(NAMES[0], "other: --config=crammed_bert --model.vocab-size=200"))
    assert compare.ran == []


def test_equal_tokens_are_what_the_first_model_reads_in_the_time(compare, capsys):
    compare("--budget=1m", "--no-speed")
    tokens = json.loads((compare.folder / "comparison.json").read_text())["tokens"]
    assert tokens == float(f"{tokens:.1e}")
    assert json.loads((compare.folder / "tokens" / "study.json").read_text())["tokens"] == tokens
    assert compare("--budget=1m", "--no-speed") == []
    assert read_results(compare.folder).asked.tokens == tokens


@pytest.mark.long
def test_a_comparison_killed_at_random_moments_ends_with_the_same_numbers(corpus_file, tmp_path):
    words = [
        "compare", "ultrafastbert_1x11", "path_dense_1x11", "--scale=tiny", "--model.vocab-size=300", "--model.d-model=32",
        "--model.n-layers=1", "--model.n-heads=2", "--data.seq-len=32", "--data.eval-rows=16", "--train.micro-rows=8",
        "--train.batch-rows=8", "--train.n-evals=3", "--train.n-checkpoints=8", f"--corpus=text:{corpus_file}", "--tokens=2e4",
        f"--prepared={tmp_path / 'prepared'}", "--device=cpu", "--no-speed",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPO)}

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ufbert", *words, f"--out={tmp_path / out}"]
        with (tmp_path / f"{out}.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path)

    whole = start("whole")
    began = time.monotonic()
    assert whole.wait(timeout=600) == 0, (tmp_path / "whole.txt").read_text()
    took, moments = time.monotonic() - began, random.Random(5)
    for _ in range(5):
        process = start("killed")
        time.sleep(moments.uniform(0.1, 0.8) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait(timeout=600) == 0, (tmp_path / "killed.txt").read_text()
    ours, theirs = read_results(tmp_path / "killed"), read_results(tmp_path / "whole")
    assert [cell.name for cell in ours.cells] == [cell.name for cell in theirs.cells]
    for model, other in zip(ours.models, theirs.models, strict=True):
        assert model.by_tokens is not None
        assert other.by_tokens is not None
        assert model.by_tokens.losses == other.by_tokens.losses
    shutil.rmtree(tmp_path / "killed")


@pytest.mark.long
def test_the_commands_of_the_guide_run(compare, tmp_path, monkeypatch, capsys):
    text = (REPO / "docs" / "comparison.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    assert len(commands) == 6
    monkeypatch.chdir(tmp_path)
    words = [f"{a}{b}{c}" for a in ("ba", "ko", "mi") for b in ("la", "re", "su") for c in ("n", "r", "t")]
    for seed, name in enumerate(("a.txt", "b.txt")):
        draw = random.Random(seed)
        Path(name).write_text("\n\n".join(" ".join(draw.choices(words, k=90)) + "." for _ in range(60)) + "\n")
    shutil.move("GLUE/RTE-small", "GLUE/RTE")
    timed = []
    monkeypatch.setattr("ufbert.bench.encoder.run_models", timed.append)
    for name in ("routed_tree", "control", "trees_1x9", "trees_8x6", "trees_64x3", "trees_all"):
        finish_run(compare.home / "runs" / name, "routed_tree", 3.0)
    for command in commands:
        assert command[:3] == ["uv", "run", "ufbert"]
        verb, rest = cli.split_verb(command[3:])
        rest = [word.replace("SST-2,RTE", "RTE") for word in rest]
        small = ["--train.micro-rows=8", "--data.eval-rows=16", f"--prepared={compare.prepared}"]
        cli.call(verb, [*rest, *(small if "--report" not in rest and verb == "compare" else [])])
    assert "hours" in capsys.readouterr().out
    assert [options.model[0].partition("=")[0] for options in timed] == ["tree"]
    for folder in ("compare", "routed", "sweep"):
        assert not read_results(Path("runs") / folder).waiting, folder

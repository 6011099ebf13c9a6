"""Run folders: of one process at a time, damaged, of another version, from a stranger."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, RUN, SMALL

from ufbert.cli import call
from ufbert.errors import UserError
from ufbert.runtime.claim import LOCK, claimed
from ufbert.runtime.metrics import read_records


@pytest.fixture
def copied(run_folder, tmp_path):
    """A finished run as if it had been killed in its last moment."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("summary.json", "model", "report.html"))
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def test_a_folder_in_use_is_left_as_it_is_by_whoever_comes_second(copied, corpus_file):
    before = contents(copied)
    with claimed(copied):
        for args in (["--resume", f"--out={copied}"], [*RUN, f"--corpus=text:{corpus_file}", f"--out={copied}"]):
            with pytest.raises(UserError, match=f"{copied} is in use by process {os.getpid()} on"):
                call("train", args)
    assert contents(copied) == before


def test_a_run_that_fails_before_it_has_begun_leaves_no_folder(tmp_path, corpus_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ([], [f"--out={tmp_path / 'run'}"]):
        with pytest.raises(UserError, match="There is no preset"):
            call("train", ["--config=tinny", f"--corpus=text:{corpus_file}", *out])
        with pytest.raises(UserError, match="does not exist"):
            call("train", [*SMALL, "--budget=3steps", "--corpus=text:absent.txt", *out])
    assert [path for path in tmp_path.rglob("*") if path.name != "runs"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "has format version 2; this ufbert reads 1"),
        ({"format_version": None}, "has format version None"),
        ({"format": "other"}, "is not a run folder of ufbert"),
        ({"colour": 1}, "a setting this version does not know: colour"),
        ({"budget": 5}, "budget is 5; it must be text"),
        ({"seed": "x"}, 'seed is "x"; it must be a whole number'),
        ({"tensorboard": 1}, "tensorboard is 1; it must be true or false"),
        ({"seed": True}, "seed is true"),
        ({"run": None}, "run is null; it must be an object"),
        ({"run": {"model": 5}}, "run.model is 5"),
        ({"started_at": "x"}, 'started_at is "x"; it must be a finite number'),
        ({"started_at": float("nan")}, "started_at.*NaN"),
        ({"prepared_data": {"folder": 5}}, "prepared_data.folder is 5"),
        ({"prepared_data": "x"}, 'prepared_data is "x"'),
    ],
)
def test_a_config_of_another_version_or_kind_is_a_sentence(copied, changes, words):
    values = {**json.loads((copied / "config.json").read_text()), **changes}
    (copied / "config.json").write_text(json.dumps(values))
    before = contents(copied)
    with pytest.raises(UserError, match=words):
        call("train", ["--resume", f"--out={copied}"])
    assert contents(copied) == before


@pytest.mark.parametrize("text", ["", "[]", "{", "5", '"x"', "null"])
def test_a_config_that_is_no_config_is_a_sentence(copied, text):
    (copied / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json (is not readable JSON|holds)"):
        call("train", ["--resume", f"--out={copied}"])


def test_a_folder_of_a_stranger_runs_and_overwrites_nothing(copied, tmp_path, capsys):
    """Damage, a stored command, a path to elsewhere, and links: the run goes on where it lies, or a sentence comes."""
    values = json.loads((copied / "config.json").read_text())
    values |= {"when_done": f"touch {tmp_path / 'owned'}", "out": str(tmp_path / "elsewhere")}
    (copied / "config.json").write_text(json.dumps(values))
    (copied / "summary.json").write_text("")
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('5\n{"step": "x"}\n{"step": 81, "spent": 123.0}\n{"step": 80, "lo')
    (copied / "ledger.jsonl").write_text('5\n{"session": 1, "spent": NaN}\n{"session": "x", "spent": 5}\n{"session"')
    letter = tmp_path / "letter"
    letter.write_text("kept")
    (copied / ".summary.json.partial").symlink_to(letter)
    with pytest.raises(UserError, match=r"\.summary\.json\.partial is a link, to"):
        call("train", ["--resume", f"--out={copied}"])
    (copied / ".summary.json.partial").unlink()
    assert letter.read_text() == "kept"
    summary = call("train", ["--resume", f"--out={copied}"])
    assert summary["steps"] == 80
    assert json.loads((copied / "summary.json").read_text()) == summary
    assert (copied / "report.html").is_file()
    out = capsys.readouterr().out
    assert "ledger.jsonl is damaged: 123.0 s that metrics.jsonl knows of are not in it; they are charged" in out
    assert summary["spent_seconds"] > 123.0
    assert [r["spent"] for r in read_records(copied / "ledger.jsonl") if r.get("session") == 1][-1] == 123.0
    assert "summary.json is damaged; it is written anew from the last checkpoint" in out
    assert f"not run at the end: the stored --when-done 'touch {tmp_path / 'owned'}'" in out
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "elsewhere").exists()
    assert json.loads((copied / "config.json").read_text())["when_done"] == values["when_done"]  # named next time, too


def strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_run_that_has_diverged_fails_and_leaves_no_model(corpus_file, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    options = [
        f"--corpus=text:{corpus_file}",
        f"--out={folder}",
        *SMALL,
        "--train.max-skipped=50",
        "--train.peak-lr=1e36",
    ]
    last = f"ls {folder} >> {log}; echo status $UFBERT_EXIT_CODE >> {log}"
    with pytest.raises(UserError, match=r"has diverged: its held-out loss at step 6 is nan, so no model is written"):
        call("train", ["--budget=6steps", *options, f"--when-done={last}"])
    assert log.read_text().endswith("status 2\n")  # a rented machine must stop all the same
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "config.json", "ledger.jsonl", "metrics.jsonl", "report.html"
    }  # fmt: skip
    assert "has diverged" in (folder / "report.html").read_text()
    assert list((folder / "checkpoints").iterdir()) == []
    records = [strictly(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["heldout_loss"] for r in records if "heldout_loss" in r][-1] is None


@pytest.mark.long
def test_a_short_race_drill_mixes_nothing(tmp_path):
    """Three tries of two and of ten light processes; the drill itself (`race_drill.py`) does a hundred, and whole runs."""
    drill = [sys.executable, str(REPO / "tests" / "pretrain" / "race_drill.py"), f"--folder={tmp_path / 'drill'}"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    found = subprocess.run([*drill, "--tries=3", "--whole=0"], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 failed" in found.stdout

"""Whole runs: determinism, kill and resume, budgets kept, files left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPO, SMALL
from safetensors.numpy import load_file

from ufbert.hub.folder import load_model
from ufbert.pretrain.run import pretrain_command
from ufbert.writers import read_jsonl


def losses(folder):
    return [record["loss"] for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record]


def heldout(folder):
    return [record["heldout_loss"] for record in read_jsonl(folder / "metrics.jsonl") if "heldout_loss" in record]


def test_a_run_learns_and_leaves_what_it_promises(run_folder):
    for name in ("config.json", "metrics.jsonl", "ledger.jsonl", "checkpoints", "summary.json", "report.html", "model"):
        assert (run_folder / name).exists(), name
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["steps"] == 80
    assert summary["heldout_loss"] == heldout(run_folder)[-1] == min(heldout(run_folder))
    assert summary["gain_over_unigram"] > 0.1
    assert len(heldout(run_folder)) == 11
    rates = [r["lr"] for r in read_jsonl(run_folder / "metrics.jsonl") if "lr" in r]
    assert rates[0] == pytest.approx(0.25 * max(rates), rel=0.01)
    assert rates[-1] == pytest.approx(4 / 80 * max(rates))
    report = (run_folder / "report.html").read_text()
    assert "<svg" in report
    assert "dead subtrees" in report
    usage = [r["usage"] for r in read_jsonl(run_folder / "metrics.jsonl") if "usage" in r]
    assert len(usage) == 11
    assert usage[-1].keys() == {"layer_00", "layer_01"}
    assert all(0 < layer["leaves_in_use"] <= layer["nodes_visited"] <= 1 for layer in usage[-1].values())
    assert not list(run_folder.glob(".*"))


def test_the_same_seed_gives_the_same_losses_and_another_does_not(run_folder, corpus_file, tmp_path):
    args = ["--budget=80steps", f"--corpus=text:{corpus_file}", *SMALL]
    pretrain_command([*args, f"--out={tmp_path / 'again'}"], 0.0)
    assert losses(tmp_path / "again") == losses(run_folder)
    pretrain_command([*args, f"--out={tmp_path / 'other'}", "--seed=1"], 0.0)
    assert losses(tmp_path / "other") != losses(run_folder)


def start(args):
    return subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_when(process, ready, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_kill_and_resume_ends_in_equal_bits(corpus_file, tmp_path):
    args = ["--budget=400steps", f"--corpus=text:{corpus_file}", *SMALL]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = start([*args, f"--out={whole}"])
    output = uninterrupted.communicate()[0]
    assert uninterrupted.returncode == 0, output
    process = start([*args, f"--out={cut}"])
    kill_when(process, lambda: (cut / "checkpoints" / "120").is_dir())
    assert not (cut / "summary.json").exists()
    resumed = start(["--resume", f"--out={cut}"])
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    assert "resumed from the checkpoint" in output
    assert losses(cut) == losses(whole)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, cut))
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_a_killed_wall_clock_run_ends_inside_its_budget(corpus_file, tmp_path):
    folder = tmp_path / "run"
    process = start(["--budget=30s", f"--corpus=text:{corpus_file}", f"--out={folder}", *SMALL])
    kill_when(process, lambda: len(read_jsonl(folder / "ledger.jsonl")) > 11)
    before = max(record["spent"] for record in read_jsonl(folder / "ledger.jsonl"))
    resumed = start(["--resume", f"--out={folder}"])
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    sessions: dict[int, float] = {}
    for record in read_jsonl(folder / "ledger.jsonl"):
        sessions[record["session"]] = max(record["spent"], sessions.get(record["session"], 0.0))
    assert sessions[1] == before
    assert sum(sessions.values()) <= 30.0
    assert sum(sessions.values()) > 24.0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["restarts"] == 1
    assert summary["spent_seconds"] <= 30.0


def test_updates_accumulate_micro_batches(corpus_file, tmp_path):
    common = ["--budget=6steps", f"--corpus=text:{corpus_file}", *SMALL, "--train.batch-rows=8", "--train.ramp-until=0"]
    pretrain_command([*common, f"--out={tmp_path / 'micro'}", "--train.micro-rows=4"], 0.0)
    model = load_model(tmp_path / "micro" / "model")
    assert np.isfinite(losses(tmp_path / "micro")).all()
    rows = [r["rows"] for r in read_jsonl(tmp_path / "micro" / "metrics.jsonl") if "rows" in r]
    assert rows == [8] * 6
    assert model.config.d_model == 32


def test_short_pieces_come_first_and_change_only_the_shape(corpus_file, tmp_path):
    common = ["--budget=8steps", f"--corpus=text:{corpus_file}", *SMALL, "--data.short-len=8"]
    pretrain_command([*common, f"--out={tmp_path / 'run'}", "--data.short-until=0.5"], 0.0)
    records = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "rows" in r]
    assert [r["rows"] for r in records] == [8] * 8
    assert [r["length"] for r in records] == [8] * 4 + [32] * 4
    assert [r["tokens"] for r in records] == [256 * i for i in range(1, 9)]


def test_resume_refuses_other_settings_and_finished_runs(run_folder, command):
    found = command("train", "--resume", f"--out={run_folder}", "--train.peak-lr=0.5")
    assert found.returncode == 2
    assert "train.peak_lr" in found.stderr
    found = command("train", "--resume", f"--out={run_folder}")
    assert found.returncode == 2
    assert "finished" in found.stderr

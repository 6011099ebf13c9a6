"""Whole runs: determinism, kill and resume, budgets kept, files left behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future

import numpy as np
import pytest
from conftest import REPO, RUN, SMALL
from safetensors.numpy import load_file

from ufbert.cli import call
from ufbert.errors import UserError
from ufbert.hub.folder import load_model
from ufbert.pretrain import run
from ufbert.pretrain.ahead import Ahead
from ufbert.report import running_page
from ufbert.report.run_report import write_report
from ufbert.report.running_page import RunningPage
from ufbert.runtime.metrics import read_records


def losses(folder):
    return [record["loss"] for record in read_records(folder / "metrics.jsonl") if "loss" in record]


def heldout(folder):
    return [record["heldout_loss"] for record in read_records(folder / "metrics.jsonl") if "heldout_loss" in record]


def test_a_run_learns_and_leaves_what_it_promises(run_folder):
    for name in ("config.json", "metrics.jsonl", "ledger.jsonl", "checkpoints", "summary.json", "report.html", "model"):
        assert (run_folder / name).exists(), name
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["steps"] == 80
    assert summary["heldout_loss"] == heldout(run_folder)[-1] == min(heldout(run_folder))
    assert summary["gain_over_unigram"] > 0.1
    assert len(heldout(run_folder)) == 6
    rates = [r["lr"] for r in read_records(run_folder / "metrics.jsonl") if "lr" in r]
    assert rates[0] == pytest.approx(0.25 * max(rates), rel=0.01)
    assert rates[-1] == pytest.approx(4 / 80 * max(rates))
    report = (run_folder / "report.html").read_text()
    assert summary["architecture"] in report[: report.index("</h1>")]
    assert "<svg" in report
    assert "dead subtrees" in report
    usage = [r["usage"] for r in read_records(run_folder / "metrics.jsonl") if "usage" in r]
    assert len(usage) == 6
    assert usage[-1].keys() == {"layer_00", "layer_01"}
    assert all(0 < layer["leaves_in_use"] <= layer["nodes_visited"] <= 1 for layer in usage[-1].values())
    assert not list(run_folder.glob(".*"))


def test_the_same_seed_gives_the_same_losses_and_another_does_not(run_folder, corpus_file, tmp_path, monkeypatch):
    args, pages = [*RUN, f"--corpus=text:{corpus_file}"], []

    def draw(folder):
        pages.append(write_report(folder).read_text())

    with monkeypatch.context() as patch:  # pages and trackers change no number
        patch.setattr(running_page, "SHARE", float("inf"))
        patch.setattr(run, "RunningPage", lambda folder: RunningPage(folder, draw))
        call("train", [*args, f"--out={tmp_path / 'again'}", "--track=trackio,tensorboard"])
    assert losses(tmp_path / "again") == losses(run_folder)
    steps = [int(step) for page in pages for step in re.findall(r"running, as of step (\d+)", page)]
    assert len(steps) >= 4
    assert steps == sorted(set(steps))
    assert "running" not in (tmp_path / "again" / "report.html").read_text()
    call("train", [*args, f"--out={tmp_path / 'other'}", "--seed=1"])
    assert losses(tmp_path / "other") != losses(run_folder)


def start(args, **environment):
    return subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def finish(process, code=0) -> str:
    output = process.communicate()[0]
    assert process.returncode == code, output
    return output


def signal_when(process, ready, number=signal.SIGKILL, seconds=900.0) -> str:
    """Send a signal as soon as `ready()`, and return what the process said."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.005)
    os.kill(process.pid, number)
    return process.communicate()[0]


def equal_weights(one, other):
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


LONG = ["--budget=200steps", *SMALL, "--train.n-checkpoints=5"]


@pytest.fixture(scope="module")
def whole(corpus_file, tmp_path_factory):
    """A run of 200 updates that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start([*LONG, f"--corpus=text:{corpus_file}", f"--out={folder}"]))
    return folder


def events(folder, name):
    return [r for r in read_records(folder / "metrics.jsonl") if r.get("event") == name]


def test_kill_and_resume_ends_in_equal_bits(whole, corpus_file, tmp_path):
    cut = tmp_path / "cut"
    process = start([*LONG, f"--corpus=text:{corpus_file}", f"--out={cut}"])
    signal_when(process, lambda: (cut / "checkpoints" / "40").is_dir())
    assert not (cut / "summary.json").exists()
    output = finish(start(["--resume", f"--out={cut}"]))
    assert "resumed from the checkpoint" in output
    assert "the restart cost" in output
    assert losses(cut) == losses(whole)
    equal_weights(whole, cut)
    (event,) = events(cut, "resumed")
    summary = json.loads((cut / "summary.json").read_text())
    assert summary["restart_seconds"] == pytest.approx(event["lost_seconds"] + event["start_seconds"], abs=0.01)
    assert event["start_seconds"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_so_and_resumes_in_equal_bits(whole, corpus_file, tmp_path, number):
    cut, log = tmp_path / "cut", tmp_path / "log"
    last = f"--when-failed=echo $UFBERT_EXIT_CODE $UFBERT_RUN >> {log}"
    process = start([*LONG, f"--corpus=text:{corpus_file}", f"--out={cut}", last])
    output = signal_when(process, lambda: len(losses(cut)) > 50, number)
    assert log.read_text() == f"{128 + number} {cut}\n"
    assert f"{number.name}: saved at step" in (cut / "report.html").read_text()
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert f"{number.name}: saved at step" in output
    (step,) = {r["step"] for r in events(cut, "interrupted")}
    assert (cut / "checkpoints" / str(step)).is_dir()
    finish(start(["--resume", f"--out={cut}", last]))
    assert log.read_text().count("\n") == 1
    assert sum("loss" in record for record in read_records(cut / "metrics.jsonl")) == 200  # none was done twice
    assert losses(cut) == losses(whole)
    equal_weights(whole, cut)


def test_a_damaged_newest_checkpoint_costs_only_the_way_back(whole, corpus_file, tmp_path):
    cut = tmp_path / "cut"
    process = start([*LONG, f"--corpus=text:{corpus_file}", f"--out={cut}"])
    signal_when(process, lambda: (cut / "checkpoints" / "80").is_dir())
    newest = max((cut / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:50])
    output = finish(start(["--resume", f"--out={cut}"]))
    assert f"checkpoint {newest.name} is damaged or cut short" in output
    equal_weights(whole, cut)


def test_checkpoints_of_another_run_are_refused(whole, corpus_file, tmp_path):
    cut = tmp_path / "cut"
    other = ["--train.peak-lr=0.002", *LONG, f"--corpus=text:{corpus_file}", f"--out={cut}"]
    process = start(other)
    signal_when(process, lambda: (cut / "checkpoints" / "40").is_dir())
    shutil.rmtree(cut / "checkpoints")
    shutil.copytree(whole / "checkpoints", cut / "checkpoints")
    output = finish(start(["--resume", f"--out={cut}"]), code=2)
    assert "is of another configuration" in output
    assert sorted(p.name for p in (cut / "checkpoints").iterdir()) == sorted(
        p.name for p in (whole / "checkpoints").iterdir()
    )


SHORT = ["--budget=120steps", *SMALL, "--train.n-checkpoints=5"]


@pytest.fixture(scope="module")
def short(corpus_file, tmp_path_factory):
    """A run of 120 updates on one device."""
    folder = tmp_path_factory.mktemp("short") / "run"
    call("train", [*SHORT, f"--corpus=text:{corpus_file}", f"--out={folder}"])
    return folder


@pytest.mark.long
def test_a_run_moves_between_eight_devices_and_one(short, corpus_file, tmp_path):
    """From one to eight, and back."""
    folder = tmp_path / "run"
    process = start([*SHORT, f"--corpus=text:{corpus_file}", f"--out={folder}"], JAX_NUM_CPU_DEVICES="1")
    signal_when(process, lambda: (folder / "checkpoints" / "24").is_dir())
    process = start(["--resume", f"--out={folder}"], JAX_NUM_CPU_DEVICES="8")
    signal_when(process, lambda: (folder / "checkpoints" / "72").is_dir())
    output = finish(start(["--resume", f"--out={folder}"], JAX_NUM_CPU_DEVICES="1"))
    assert "resumed from the checkpoint" in output
    assert [event["devices"] for event in events(folder, "resumed")] == [8, 1]
    np.testing.assert_allclose(losses(folder)[:60], losses(short)[:60], atol=1e-3)


@pytest.mark.long
def test_two_processes_train_one_model(short, corpus_file, tmp_path):
    """The same losses as alone, one set of files; a signal to one stops both; and one can go on without the other."""
    folder = tmp_path / "run"
    args = [*SHORT, f"--corpus=text:{corpus_file}", f"--out={folder}", "--train.shard-params"]
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    main, other = (start([*args, f"--distributed={address},{i},2"]) for i in range(2))
    signal_when(other, lambda: len(losses(folder)) > 25, signal.SIGTERM)
    finish(main, 128 + signal.SIGTERM)
    assert other.returncode == 128 + signal.SIGTERM
    assert len(events(folder, "interrupted")) == 1
    finish(start(["--resume", f"--out={folder}"]))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 120
    assert [r["step"] for r in read_records(folder / "metrics.jsonl") if "loss" in r] == list(range(1, 121))
    np.testing.assert_allclose(losses(folder)[:20], losses(short)[:20], atol=1e-4)
    assert summary["heldout_loss"] == pytest.approx(
        json.loads((short / "summary.json").read_text())["heldout_loss"], abs=0.05
    )


def test_updates_that_are_not_finite_are_skipped_and_the_run_goes_back(corpus_file, tmp_path, monkeypatch, capsys):
    from ufbert.pretrain import loop
    from ufbert.pretrain.schedules import lr_share

    monkeypatch.setattr(loop, "lr_share", lambda cfg, x: 1e35 if 0.5 <= x < 0.51 else lr_share(cfg, x))
    folder = tmp_path / "run"
    args = [
        "--budget=100steps",
        f"--corpus=text:{corpus_file}",
        f"--out={folder}",
        *SMALL,
        "--train.max-skipped=3",
        "--train.n-checkpoints=5",
    ]
    summary = call("train", args)
    assert summary["rollbacks"] == 1
    assert summary["skipped_updates"] == 4  # three, and the one that was in flight
    assert summary["gain_over_unigram"] > 0.1
    (event,) = events(folder, "rolled back")
    assert 0 < event["to_step"] <= 50
    assert "the weights go back to those of step" in capsys.readouterr().out
    assert [r["step"] for r in read_records(folder / "metrics.jsonl") if r.get("skipped")] == [52, 53, 54, 55]


def test_a_run_that_stays_broken_is_given_up_in_a_sentence(corpus_file, tmp_path, command):
    options = ["--budget=100steps", f"--corpus=text:{corpus_file}", f"--out={tmp_path / 'run'}", *SMALL]
    found = command("train", *options, "--train.peak-lr=1e36", "--train.max-skipped=2")
    assert found.returncode == 2
    assert "the run is given up at step" in found.stderr
    assert "Traceback" not in found.stderr


def test_hours_on_the_wall_are_an_absolute_stop(corpus_file, tmp_path, command):
    folder = tmp_path / "run"
    options = [f"--corpus=text:{corpus_file}", f"--out={folder}", *SMALL]
    found = command("train", "--budget=3steps", "--max-hours-wall=24", *options)
    assert found.returncode == 0, found.stderr
    (folder / "summary.json").unlink()
    late = command("train", "--resume", f"--out={folder}", "--max-hours-wall=0.001")
    assert late.returncode == 2
    assert "is past its 0.001 hours on the wall" in late.stderr


def test_a_run_below_its_reference_is_warned_about(run_folder, corpus_file, tmp_path, capsys):
    folder = tmp_path / "run"
    args = ["--budget=80steps", f"--corpus=text:{corpus_file}", f"--out={folder}", *SMALL, "--train.peak-lr=1e-9"]
    call("train", [*args, f"--reference={run_folder}"])
    assert capsys.readouterr().out.count("warning: off track") == 1
    (event,) = events(folder, "off track")
    assert event["step"] < 60
    with pytest.raises(UserError, match="does not hold a finished run"):
        call("train", [*args, f"--reference={tmp_path}", f"--out={tmp_path / 'other'}"])
    assert not (tmp_path / "other").exists()


def test_the_modern_recipe_trains_and_keeps_the_better_weights(corpus_file, tmp_path):
    folder = tmp_path / "run"
    args = ["--budget=80steps", f"--corpus=text:{corpus_file}", f"--out={folder}", *SMALL, "--recipe=modern"]
    args += ["--config=crammed_bert", "--train.peak-lr=0.02", "--tensorboard"]
    summary = call("train", args)
    assert summary["heldout_loss"] < heldout(folder)[0] - 1.5
    assert summary["heldout_loss"] == min(summary["averaged_heldout_loss"], summary["last_heldout_loss"])
    rates = [r["mask_rate"] for r in read_records(folder / "metrics.jsonl") if "mask_rate" in r]
    assert rates == [0.3] * 20 + [0.25] * 20 + [0.2] * 20 + [0.15] * 20
    (board,) = (folder / "tensorboard").iterdir()
    text = board.read_bytes()
    assert b"train/loss" in text
    assert b"heldout/heldout_loss" in text


@pytest.mark.long
def test_a_second_start_compiles_nothing_again(corpus_file, tmp_path):
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        before = sorted(path.name for path in (cache / "compiled").glob("*-cache"))
        args = ["--budget=3steps", f"--corpus=text:{corpus_file}", f"--out={tmp_path / name}", *SMALL]
        finish(start([*args, "--model.tree-backend=gather"], UFBERT_CACHE=str(cache)))
    made = {path.name for path in (cache / "compiled").glob("*-cache")} - set(before)
    large = (
        "jit_train_step",
        "jit_masked_lm_sums",
    )  # what takes a moment only, a busy machine may keep at the second start
    assert {name.split("-")[0] for name in before} >= set(large)
    twice = "what is compiled ahead and what is called are two programs"
    assert [name.split("-")[0] for name in before].count("jit_train_step") == 1, twice
    assert not [name for name in made if name.startswith(large)]


def test_a_budget_that_compiling_eats_up_ends_in_a_sentence(corpus_file, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"A budget of 1 s is too short to train in: after \d+ s the rest is needed for"
    ):
        call("train", ["--budget=1s", f"--corpus=text:{corpus_file}", f"--out={folder}", *SMALL])
    assert not (folder / "model").exists()


def test_the_wait_for_the_first_update_ends_when_its_time_is_over():
    waiting = Ahead.__new__(Ahead)
    waiting._update, asked = Future(), []
    assert not waiting.wait_for_update(lambda step: asked.append(step) or len(asked) > 1, 7)
    assert asked == [7, 7]
    waiting._update.set_exception(UserError("it does not fit"))
    with pytest.raises(UserError, match="it does not fit"):
        waiting.wait_for_update(lambda step: False, 7)


def test_an_output_folder_that_cannot_be_written_is_a_sentence(corpus_file, tmp_path, command):
    (tmp_path / "file").write_text("kept")
    options = ["--budget=3steps", f"--corpus=text:{corpus_file}", f"--out={tmp_path / 'file' / 'run'}", *SMALL]
    found = command("train", *options)
    assert found.returncode == 2
    assert "Cannot make the run folder" in found.stderr
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.long
def test_a_killed_wall_clock_run_ends_inside_its_budget(corpus_file, tmp_path):
    folder = tmp_path / "run"
    process = start(["--budget=20s", f"--corpus=text:{corpus_file}", f"--out={folder}", *SMALL])
    signal_when(process, lambda: len(read_records(folder / "ledger.jsonl")) > 7)
    before = max(record["spent"] for record in read_records(folder / "ledger.jsonl"))
    finish(start(["--resume", f"--out={folder}"]))
    sessions: dict[int, float] = {}
    for record in read_records(folder / "ledger.jsonl"):
        sessions[record["session"]] = max(record["spent"], sessions.get(record["session"], 0.0))
    assert sessions[1] == before
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["restarts"] == 1
    assert (
        before < summary["spent_seconds"] <= round(sum(sessions.values()), 2) + 0.01
    )  # the ledger's last line is later
    updates = [r for r in read_records(folder / "metrics.jsonl") if "lr" in r]
    assert all(r["spent"] < 20.0 for r in updates[:-2])  # none begins after that; test_reserve.py holds the end itself
    # Killed once more after all was spent, before the model was saved: the model is made of the last checkpoint.
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "model")
    with (folder / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"session": 3, "spent": 20.0}) + "\n")
    output = finish(start(["--resume", f"--out={folder}"]))
    assert "the budget of 20s is spent" in output
    again = json.loads((folder / "summary.json").read_text())
    assert (again["steps"], again["heldout_loss"]) == (summary["steps"], summary["heldout_loss"])
    load_model(folder / "model")


def test_updates_accumulate_micro_batches(corpus_file, tmp_path):
    common = ["--budget=6steps", f"--corpus=text:{corpus_file}", *SMALL, "--train.batch-rows=8", "--train.ramp-until=0"]
    call("train", [*common, f"--out={tmp_path / 'micro'}", "--train.micro-rows=4"])
    model = load_model(tmp_path / "micro" / "model")
    assert np.isfinite(losses(tmp_path / "micro")).all()
    rows = [r["rows"] for r in read_records(tmp_path / "micro" / "metrics.jsonl") if "rows" in r]
    assert rows == [8] * 6
    assert model.config.d_model == 32


def test_short_pieces_come_first_and_change_only_the_shape(corpus_file, tmp_path):
    common = ["--budget=8steps", f"--corpus=text:{corpus_file}", *SMALL, "--data.short-len=8"]
    call("train", [*common, f"--out={tmp_path / 'run'}", "--data.short-until=0.5"])
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "rows" in r]
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB, and a function that makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(
            "mounting a small file system needs root; tests/pretrain/test_checkpoint.py refuses a write without one"
        )
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.long
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_when_there_is_room(whole, corpus_file, small_disk):
    place, enlarge = small_disk
    folder = place / "run"
    output = finish(start([*LONG, f"--corpus=text:{corpus_file}", f"--out={folder}"]), code=2)
    assert "error: Cannot write" in output
    assert "Traceback" not in output.split("error: ")[-1]
    enlarge()
    finish(start(["--resume", f"--out={folder}"]))
    equal_weights(whole, folder)


@pytest.mark.long
def test_a_short_fault_drill_loses_nothing(tmp_path):
    """Two kills, in preparation and in a checkpoint; the drill itself (`fault_drill.py`) does twenty, ten times."""
    drill = [sys.executable, str(REPO / "tests" / "pretrain" / "fault_drill.py"), f"--folder={tmp_path / 'drill'}"]
    options = ["--runs=1", "--kills=2", "--steps=150", "--seconds=0", "--longest=4"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    found = subprocess.run([*drill, *options], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 failed" in found.stdout

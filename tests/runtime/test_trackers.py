"""`--track`: the packages, what they get, and what leaves the machine (nothing)."""

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from ufbert.cli import call
from ufbert.errors import UserError
from ufbert.options.train import TrainOptions
from ufbert.runtime.metrics import TRACKIO_PROJECT, TrackioWriter, check_trackers

BEFORE = Path(__file__).parent.parent / "fixtures" / "before_house"


def test_trackers_are_named_by_commas_and_by_the_older_flag():
    assert TrainOptions(track="trackio, tensorboard", tensorboard=True).trackers == ("trackio", "tensorboard")
    assert TrainOptions(tensorboard=True).trackers == ("tensorboard",)
    assert TrainOptions().trackers == ()
    with pytest.raises(UserError, match=r"--track trackoi: there is no such tracker; did you mean trackio\?"):
        TrainOptions(track="trackoi")


def test_a_package_that_is_missing_is_said_before_anything_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="--track trackio needs the package trackio: `uv sync --extra trackio`"):
        call("train", ["--track=trackio", "--budget=1step", f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
    stored = tmp_path / "stored"  # a folder from a machine that has the package
    shutil.copytree(BEFORE / "run", stored)
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"track": "trackio"}))
    with pytest.raises(UserError, match="--track trackio needs the package trackio"):
        call("train", ["--resume", f"--out={stored}"])


def test_trackio_gets_every_number_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    check_trackers(["trackio"])
    import huggingface_hub
    from trackio.sqlite_storage import SQLiteStorage

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_BUCKET_ID"):
        monkeypatch.setenv(name, "someone/place")
    monkeypatch.setenv("HF_TOKEN", "hf_none")  # with a token, Trackio would ask the hub whose it is
    usage = {"layer_00": {"nodes_visited": 0.5}}
    for resumed, steps in ((False, (1, 2)), (True, (3,))):
        writer = TrackioWriter(f"run {tmp_path}", resumed)
        for step in steps:
            writer.write({"step": step, "loss": 1.0 / step, "lr": 0.1})
        writer.write({"step": steps[-1], "heldout_loss": 2.0, "usage": usage})
        writer.write({"step": steps[-1], "event": "noted"})
        writer.close()
    logs = SQLiteStorage.get_logs(TRACKIO_PROJECT, f"run {tmp_path}")
    assert [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1.0 / 3),
    ]
    assert [log["heldout/usage/layer_00/nodes_visited"] for log in logs if "heldout/heldout_loss" in log] == [0.5, 0.5]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert len([run for run in SQLiteStorage.get_runs(TRACKIO_PROJECT) if run == f"run {tmp_path}"]) == 1

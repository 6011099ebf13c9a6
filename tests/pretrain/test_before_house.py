"""Folders that were written before the house was rebuilt still load; see tests/fixtures/before_house/README.md."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ufbert.cli import call
from ufbert.data.prepared import open_prepared
from ufbert.hub.folder import flatten, load_model
from ufbert.runtime.metrics import EvaluationRecord, read_records
from ufbert.runtime.run_folder import read_run, read_summary
from ufbert.runtime.typed import read_lines

BEFORE = Path(__file__).parents[1] / "fixtures" / "before_house"


def test_prepared_text_opens_with_the_same_rows():
    data = open_prepared(BEFORE / "prepared")
    assert (data.manifest.train_rows, data.manifest.heldout_rows, data.manifest.vocab_size) == (160, 2, 105)
    assert data.manifest.fingerprint == read_run(BEFORE / "run").prepared_data.fingerprint
    assert data.train.take(np.arange(160)).max() < 105


def test_a_model_folder_loads():
    model = load_model(BEFORE / "model")
    assert (model.config.d_model, model.config.n_layers, model.config.feedforward) == (16, 2, ("tree",))
    assert all(np.isfinite(array).all() for array in flatten(model.params).values())


def test_a_run_goes_on_to_the_loss_that_it_ended_with_then(tmp_path, monkeypatch):
    """It was killed after the checkpoint of step 50 of 60. Other machines round otherwise: losses are near, not equal."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    folder = Path("run")
    then = {e.step: e.heldout_loss for e in read_lines(folder / "metrics.jsonl", EvaluationRecord)}
    config = json.loads((folder / "config.json").read_text())
    config["prepared_data"]["folder"] = str(tmp_path / "before" / "prepared")  # the absolute path of another machine
    (folder / "config.json").write_text(json.dumps(config))
    summary = call("train", ["--resume", f"--out={folder}"])
    assert summary["steps"] == 60
    assert summary["restarts"] == 1
    assert summary["heldout_loss"] == pytest.approx(then[60], abs=0.02)
    assert read_summary(folder).heldout_loss == summary["heldout_loss"]
    assert [r["to_step"] for r in read_records(folder / "metrics.jsonl") if "to_step" in r] == []
    assert (folder / "model" / "model.safetensors").is_file()

"""The model that comes with the package: it is found by its name, small, good for something, and its card says what is so."""

import json
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO

import ufbert
from ufbert.errors import UserError
from ufbert.hub.download import SHIPPED, is_shipped_name, model_folder
from ufbert.hub.folder import flatten, load_model
from ufbert.hub.tensors import stored_tensors
from ufbert.inference.predictor import Predictor
from ufbert.pretrain.start import read_start

FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


def test_the_model_is_small_whole_and_found_by_its_name():
    model = ufbert.load("mini")
    assert {path.name for path in model_folder("mini").iterdir()} == FILES
    assert sum(path.stat().st_size for path in (SHIPPED / "mini").iterdir()) <= 15_000_000
    assert {t.stored for t in stored_tensors(SHIPPED / "mini" / "model.safetensors").values()} == {
        jnp.dtype(jnp.bfloat16)
    }
    assert model.config.architecture() == "4 layers x 256, glu 512 feedforward"
    assert model.task is None
    assert read_start("mini").config == model.config
    assert all(np.isfinite(np.asarray(array)).all() for array in flatten(model.params).values())


def test_a_folder_of_that_name_is_another_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_shipped_name("mini")
    assert not any(is_shipped_name(name) for name in ("./mini", Path("mini"), "mini/", "maxi", "", "..", "hf:mini"))
    for place in ("./mini", Path("mini")):
        with pytest.raises(UserError, match="There is no model folder at mini"):
            load_model(place)
    (tmp_path / "mini").mkdir()
    assert model_folder("mini") == SHIPPED / "mini"
    assert os.path.samefile(model_folder("./mini"), tmp_path / "mini")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("She opened the [MASK] and went inside.", "door"),
        ("He was born in [MASK] York.", "new"),
        ("Paris is the [MASK] of France.", "capital"),
    ],
)
def test_the_model_has_learnt_some_english(text, word):
    predictor = Predictor.load("mini")
    [[guess]] = predictor.fill_mask(text, top=1)
    assert guess.token == word


def test_the_card_says_what_the_results_say():
    card = (SHIPPED / "mini" / "README.md").read_text(encoding="utf-8")
    results = json.loads((REPO / "notebooks" / "results" / "mini.json").read_text(encoding="utf-8"))
    summary = results["summary"]
    assert results["command"] in card
    assert results["commit"] in card
    assert f"{summary['tokens']:,} tokens" in card
    assert f"{summary['heldout_loss']:.3f} nats" in card
    rows = re.findall(r"^\| (\w+) \| (\w+) \| ([\d.]*) \| ([\d.]*) \|$", card, re.MULTILINE)
    assert rows == [
        (task, score["metric"], f"{score['trained']:.1f}", f"{score['random']:.1f}")
        for task, score in results["scores"].items()
    ]
    assert "sst2" in results["scores"]
    page = (REPO / "docs" / "results" / "finetuning.md").read_text(encoding="utf-8")
    for score in results["scores"].values():
        assert re.search(rf"^\| .* \| {score['trained']:.1f} \| {score['random']:.1f} \|$", page, re.MULTILINE)
    for heading in ("Data and licences", "Training", "Scores", "Not good at"):
        assert f"## {heading}" in card

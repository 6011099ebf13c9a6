"""`ufbert prepare`: the text of a run, prepared on one machine and used on another."""

import shutil
from types import SimpleNamespace

import jax
import pytest
from conftest import SMALL

from ufbert import prepare as prepare_text
from ufbert.cli import call, parse
from ufbert.cost.devices import DEVICES
from ufbert.data import cache
from ufbert.errors import UserError
from ufbert.options.train import PlanOptions
from ufbert.plan.prepare import plan_preparation
from ufbert.plan.target import Target
from ufbert.pretrain import run
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.resolve import local_platform, resolve
from ufbert.runtime.run_folder import Summary


def test_train_uses_what_was_prepared_on_another_machine(corpus_file, tmp_path, monkeypatch, capsys):
    here, there = tmp_path / "cheap", tmp_path / "rented"
    (here / "data").mkdir(parents=True)
    there.mkdir()
    shutil.copy(corpus_file, here / "data" / "a.txt")
    gather = "--model.tree-backend=gather"  # native kernels would be compiled
    options = ["--budget=3steps", "--corpus=text:data/a.txt", *SMALL, gather, "--prepared=text"]
    monkeypatch.chdir(here)
    folder = call("prepare", [*options, "--device=cpu"])
    said = capsys.readouterr().out
    assert "copy it into text of the machine that trains" in said
    assert folder.parent.name == "text"

    def never(*_, **__):
        raise AssertionError("text is prepared a second time")

    monkeypatch.setattr(cache, "prepare", never)
    monkeypatch.setattr(run, "train", lambda context: Summary(1.0, 2.0, 3.0, gain_over_unigram=1.0))
    monkeypatch.setattr(run, "device_peak", lambda: (0.0, ""))
    call("train", [*options, "--out=run"])  # on the same machine
    assert "prepared before: " in capsys.readouterr().out
    shutil.copytree(here / "text", there / "text")
    shutil.rmtree(here)
    monkeypatch.chdir(there)
    call("train", [*options, "--out=run"])
    assert (
        "the corpus text:data/a.txt is not here; text that was prepared elsewhere is used: " in capsys.readouterr().out
    )


def test_a_corpus_of_the_same_name_on_the_same_machine_is_not_taken_for_another(corpus_file, tmp_path, monkeypatch):
    for project in ("a", "b"):
        (tmp_path / project).mkdir()
    shutil.copy(corpus_file, tmp_path / "a" / "text.txt")
    options = ["--budget=3steps", "--corpus=text:text.txt", *SMALL, f"--prepared={tmp_path / 'cache'}"]
    monkeypatch.chdir(tmp_path / "a")
    call("prepare", options)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UserError, match=r"text\.txt does not exist"):
        call("prepare", options)


@pytest.mark.parametrize("peaks", DEVICES, ids=lambda peaks: peaks.name)
@pytest.mark.parametrize("more", [(), ("--model.tree-backend=masked",)])
def test_the_machine_that_trains_decides_as_the_one_that_prepared_for_it(peaks, more, monkeypatch):
    """Scale and planned tokens are what the folder's name depends on."""
    target = Target(peaks.name, peaks, on_cpu=False, local=False, dtype=peaks.dtype)
    options, given = parse(PlanOptions, ["--budget=1d", *more], "plan")
    ahead = resolve(options, given, parse_budget("1d"), target.platform)
    device = SimpleNamespace(platform=peaks.platform, device_kind=peaks.kinds[0])
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: peaks.platform)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert resolve(options, given, parse_budget("1d"), local_platform(peaks.platform)) == ahead


def test_a_plan_names_the_command_that_prepares_its_text(tmp_path):
    args = ["--budget=1d", "--device=h100", "--config=crammed_bert", "--train.mask-rate", "0.3", "0.2", "--no-check"]
    args += ["--price=2", "--data.no-drop-near"]
    options, given = parse(PlanOptions, args, "plan")
    peaks = next(peaks for peaks in DEVICES if peaks.name == "h100")
    platform = Target(peaks.name, peaks, on_cpu=False, local=False, dtype=peaks.dtype).platform
    resolved = resolve(options, given, parse_budget("1d"), platform)
    found = plan_preparation(options, given, resolved)
    assert found.command == (
        "ufbert prepare --budget=1d --device=h100 --config=crammed_bert --train.mask-rate 0.3 0.2 --data.no-drop-near"
    )
    assert resolved.tokens is not None
    assert resolved.tokens <= found.tokens == found.bytes / 2 or found.tokens == 2_000_000_000
    assert found.seconds > 0


def test_python_prepares_as_the_command_does(corpus_file, tmp_path):
    small = {"config": "tiny", "scale": "base", "data.seq_len": 32, "device": "cpu"}
    folder = prepare_text("3steps", corpus=f"text:{corpus_file}", prepared=tmp_path / "text", **small)
    assert (folder / "manifest.json").is_file()

"""`ufbert bench encoder --model`: trained models against each other, and that one with wrong answers is named and not timed."""

from dataclasses import asdict, replace
from pathlib import Path

import jax
import pytest

from ufbert import nn
from ufbert.bench import encoder_models
from ufbert.bench.encoder_job import Shape, numbered_words
from ufbert.bench.encoder_models import ModelTimes, check_models, named_folders, read_model_times, reads, shape_times
from ufbert.bench.harness import WorkerProcess
from ufbert.cli import call
from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.ops import native
from ufbert.options.bench import BenchEncoderOptions
from ufbert.runtime.files import write_json

MODEL = ModelConfig(
    vocab_size=200, max_len=48, d_model=32, n_layers=2, n_heads=2, d_hidden=24, pooler_width=8, tree_depth=3
)
KINDS = {
    "dense": MODEL,
    "trees": replace(MODEL, feedforward=("tree",)),
    "routed": replace(MODEL, feedforward=("routed_tree",), leaf_width=4),
    "fixed": replace(MODEL, feedforward=("fixed_tree", "none"), max_len=512),
    "fourier": replace(MODEL, mixer=("fourier",), fixed_len=16),
}


@pytest.mark.long
@pytest.mark.skipif(bool(native.unavailable()), reason="it times the native kernels; test_native.py fails without them")
def test_a_small_race_of_models(tmp_path, capsys):
    for i, (name, config) in enumerate(KINDS.items()):
        params = nn.init(config, jax.random.key(i), ("masked_lm",))
        save_model(tmp_path / name / "model", ModelFolder(config, params, numbered_words(200)))
    folders = [str(tmp_path / name / "model") for name in KINDS]
    options = ["--blocks=2", "--seconds-a-block=0.02", "--shapes", "1x16", "2x12", f"--json={tmp_path / 'speed.json'}"]
    call("bench encoder", [*options, "--baseline=trees", "--model", *folders])
    times = read_model_times(tmp_path / "speed.json")
    assert (tmp_path / "speed.svg").read_text().startswith("<?xml")
    first, second = times.shapes
    assert {(one.model, one.type) for one in first.timed} == {
        (name, kind) for name in KINDS for kind in ("float32", "int8")
    }
    assert {one.model for one in second.timed} == {*KINDS} - {"fourier"}  # which reads 16 tokens only
    assert all((one.ratio is None) == (one.model == "trees") for one in first.timed)
    assert times.checked["trees-float32"]["error"] < 1e-4
    assert times.loaded["dense-int8"].bytes < times.loaded["dense-float32"].bytes
    assert not times.refused
    assert "times as fast as trees" in capsys.readouterr().out


class Told(WorkerProcess):
    """A process whose gate answers as it was told."""

    def __init__(self, gates: dict[str, list[dict[str, float]]]) -> None:
        self.gates = gates

    def ask(self, do: str, wanted: str, **arguments):
        assert do == "gate"
        return self.gates[arguments["name"]][arguments["batch"]]


def test_a_model_with_wrong_answers_is_named_and_a_single_spoilt_batch_is_not_held_against_it():
    good = {"error": 1e-6, "size": 3.0, "relative": 1e-6, "leaves": 1.0}
    off = {**good, "error": 1e-2}
    rough = {**good, "relative": 0.3}
    ours = Told({
        "m0-float32": [good, off, good], "m1-float32": [off, off, good], "m2-int8": [rough] * 3,
        "m3-int8": [{**good, "relative": 0.5}] * 3, "m4-float32": [{**good, "error": float("nan")}] * 3,
    })  # fmt: skip
    checked = check_models(ours, dict.fromkeys(ours.gates, "1x16"))
    assert isinstance(checked["m0-float32"], dict)
    assert checked["m1-float32"] == "its answers are off by 1.0e-02 from the training graph's"
    assert isinstance(checked["m2-int8"], dict)
    assert checked["m3-int8"] == "its answers are off by 50.0% from the training graph's"
    assert isinstance(checked["m4-float32"], str)


def test_ratios_are_of_the_named_baseline_and_of_one_type():
    names = {"m0": "a", "m1": "b"}
    times = {"m0-float32": {"call": [2.0, 4.0]}, "m0-int8": {"call": [1.0, 1.0]}, "m1-float32": {"call": [1.0, 1.0]}}
    case = shape_times(times, Shape(8, 128), names, "b")
    found = {(one.model, one.type): (one.median, one.ratio) for one in case.timed}
    assert found == {("a", "float32"): (3.0, 0.375), ("a", "int8"): (1.0, None), ("b", "float32"): (1.0, None)}
    assert case.timed[2].tokens_per_second == 1024


def test_models_are_refused_by_name(tmp_path, monkeypatch, capsys):
    assert named_folders(["runs/a/model", "b=x"]) == {"a": Path("runs/a/model"), "b": Path("x")}
    with pytest.raises(UserError, match="Two models are called 'a'"):
        named_folders(["a", "runs/a/model"])
    with pytest.raises(UserError, match=r"--baseline 'c' is none of the models"):
        call("bench encoder", ["--model", "a", "b", "--baseline=c"])
    with pytest.raises(UserError, match="--baseline is one of the models of --model"):
        BenchEncoderOptions(baseline="a")
    assert [reads(config, 16) for config in KINDS.values()] == [True] * 5
    assert [reads(config, 64) for config in KINDS.values()] == [False, False, False, True, False]
    machine = {"cpu": "a CPU", "cores": 1, "load": 0.0, "load_after": 0.0}
    case = shape_times({"m0-int8": {"call": [1.0]}}, Shape(1, 16), {"m0": "a"}, "a")
    wrong = ModelTimes(machine, {"used_threads": 1}, "jax", "a", {"a": "a"}, {}, [case], {}, {"b-int8": "it is off."})
    monkeypatch.setattr(encoder_models, "measure_models", lambda *_: wrong)
    with pytest.raises(UserError, match=r"^Not timed: b-int8: it is off\.$"):
        call(
            "bench encoder",
            ["--model", "a", "b", f"--json={tmp_path / 'speed.json'}", f"--plot={tmp_path / 'speed.svg'}"],
        )
    assert read_model_times(tmp_path / "speed.json") == wrong
    assert "b-int8: NOT TIMED: it is off." in capsys.readouterr().out
    write_json(tmp_path / "speed.json", {**asdict(wrong), "shapes": 3})
    with pytest.raises(UserError, match="shapes is 3"):
        read_model_times(tmp_path / "speed.json")

"""`ufbert bench train`: it times nothing that does not train the same model, and its arithmetic. No speed is tested."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ufbert.bench.harness import Missing, Ratio, WorkerProcess, paired_ratio
from ufbert.bench.report import ratio_text
from ufbert.bench.training.run import PEER_SCRIPT, check_beside, check_losses, check_options
from ufbert.cli import parse
from ufbert.config.presets import load_preset
from ufbert.errors import UserError
from ufbert.options.bench import BenchTrainOptions
from ufbert.pretrain.budget import Budget
from ufbert.pretrain.resolve import local_platform, resolve

SMALL = (
    "--scale", "tiny", "--model.d-model", "32", "--model.n-heads", "2", "--model.d-hidden", "48", "--model.vocab-size", "64",
    "--model.n-layers", "1", "--data.seq-len", "32", "--rows", "2", "--checked", "2", "--updates", "2", "--blocks", "2",
)  # fmt: skip

FAKE = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from ufbert.bench import worker
from ufbert.bench.training.ours import Trainer
trainer = Trainer(Path(sys.argv[1]))
worker.serve(lambda *_: ("a fake", worker.step_answers(lambda i: trainer.step(i) * {factor}, trainer.describe)))
"""
"""A peer that trains with our own step and multiplies the losses."""


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ufbert", "bench", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def fake_peer(tmp_path):
    """(factor) -> options that run a peer whose losses are ours times the factor."""

    def make(factor: float) -> tuple[str, ...]:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(path=sys.path, factor=factor), encoding="utf-8")
        return ("--peer-python", sys.executable, "--peer-script", str(script))

    return make


@pytest.mark.long
def test_a_peer_that_trains_the_same_is_timed_and_reported(fake_peer, tmp_path):
    done = bench("train", *SMALL, *fake_peer(1.0), "--profile", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    assert "times as fast as torch" in done.stdout
    assert "ufbert: " in done.stdout
    assert " ms an update in kernels" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    ours, theirs = report["contestants"]
    assert len(ours["block_seconds"]) == len(theirs["block_seconds"]) == 2
    assert ours["first_losses"] == theirs["first_losses"]
    assert report["ratios"]["torch"]["pairs"] == 2
    assert all(report["profiles"]["ufbert"]["kinds"][kind] > 0 for kind in ("products", "attention", "optimizer"))


@pytest.mark.long
def test_trees_are_timed_beside_other_ways_to_compute_them_and_a_dense_layer(tmp_path):
    trees = ("--config", "ultrafastbert_1x11", "--model.tree-depth", "3")
    done = bench(
        "train", *trees, *SMALL, "--beside", "gather", "masked", "dense", "--json", str(tmp_path / "report.json")
    )
    assert done.returncode == 0, done.stderr
    ratios = json.loads((tmp_path / "report.json").read_text())["ratios"]
    assert {name: ratio["loss_difference"] is None for name, ratio in ratios.items()} == {
        "our gather": False, "our masked": False, "our dense": True,
    }  # fmt: skip
    assert "as fast as our dense: median of 2 pairs" in done.stdout
    assert "another model" in done.stdout


def test_a_peer_that_answers_a_wrong_loss_is_not_timed(fake_peer, tmp_path):
    done = bench("train", *SMALL, *fake_peer(1.001), "--json", str(tmp_path / "report.json"))
    assert done.returncode == 2
    assert "torch does not train the same model" in done.stderr
    assert "Nothing was timed" in done.stderr
    assert "tokens/s" not in done.stdout
    assert not (tmp_path / "report.json").exists()


def test_a_loss_that_drifts_or_is_no_number_is_refused():
    assert check_losses("peer", [9.0, 8.0004], [9.0, 8.0], 1e-4) == pytest.approx(5e-5)
    for wrong in (8.002, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"after 1 steps .* It is not timed"):
            check_losses("peer", [9.0, wrong], [9.0, 8.0], 1e-4)


def test_ratios_are_printed_with_three_figures():
    spread = {"median": 1.0412, "low": 1.0199, "high": 1.0551}
    assert ratio_text(spread) == "1.04 (1.02 to 1.06)"
    assert ratio_text({name: 20 * x for name, x in spread.items()}) == "20.8 (20.4 to 21.1)"
    assert ratio_text({name: 200 * x for name, x in spread.items()}) == "208 (204 to 211)"


def test_the_ratio_is_the_median_of_paired_blocks():
    # A slow spell that hits both blocks of a pair changes no ratio.
    ours, theirs = [1.0, 10.0, 1.0, 2.0, 1.0], [1.5, 15.0, 2.0, 3.0, 1.0]
    assert paired_ratio(ours, theirs) == Ratio(median=1.5, low=1.5, high=1.5, fastest=1.0, pairs=5)
    assert paired_ratio([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]) == Ratio(2.0, 1.5, 3.0, 1.0, 3)
    assert paired_ratio([2.0], [3.0]) == Ratio(1.5, 1.5, 1.5, 1.5, 1)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('hello', flush=True)", "answered 'hello', which is not JSON"),
        ("raise SystemExit('no torch here')", "failed: no torch here"),
        ("""print('{"error": "no compiler"}', flush=True)""", "failed: no compiler"),
        ("pass", "failed: it ended without a word"),
    ],
)
def test_a_peer_that_fails_is_reported_in_its_own_words(tmp_path, code, said):
    with WorkerProcess("peer", [sys.executable, "-c", code], tmp_path) as peer, pytest.raises(UserError, match=said):
        peer.wait_ready()


def test_an_error_behind_a_message_ends_the_peer_with_a_sentence(tmp_path):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from ufbert.bench.worker import serve\n"
        "serve(lambda *_: ('a fake', {'time': lambda first: {'seconds': 1 / first}}))"
    )
    with WorkerProcess("peer", [sys.executable, "-c", code, "x", "peer", "1"], tmp_path) as peer:
        peer.wait_ready()
        assert peer.ask("time", "seconds", first=2) == {"seconds": 0.5}
        with pytest.raises(UserError, match="peer failed: ZeroDivisionError: division by zero"):
            peer.ask("time", "seconds", first=0)
        with pytest.raises(UserError, match="peer failed"):
            peer.ask("time", "seconds", first=1)


def test_an_interpreter_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"Cannot start torch with .*nowhere"):
        WorkerProcess("torch", [str(tmp_path / "nowhere")], tmp_path)


def test_the_torch_peer_says_that_its_interpreter_has_no_torch(tmp_path):
    # This environment has no torch, on purpose.
    with (
        WorkerProcess("torch", [sys.executable, str(PEER_SCRIPT), "x", "torch", "1"], tmp_path) as peer,
        pytest.raises(Missing, match=r"torch is not there: .* cannot import torch"),
    ):
        peer.wait_ready()


def options_of(preset: str, **train) -> BenchTrainOptions:
    run = load_preset(preset)
    return BenchTrainOptions(
        peer_python="python", config=preset, model=run.model, train=replace(run.train, **train), data=run.data
    )


@pytest.mark.parametrize(
    ("preset", "train", "said"),
    [
        ("original_fff", {}, "model.feedforward"),
        ("ultrafastbert_symmetric", {}, "model.tree_activation"),
        ("bert_base", {}, "model.norm"),
        ("crammed_rope", {}, "model.positions"),
        ("crammed_bert", {"optimizer": "muon"}, "train.optimizer"),
        ("crammed_bert", {"mask_rate": (0.3, 0.15)}, "train.mask_rate"),
    ],
)
def test_a_model_that_the_peer_is_not_is_refused(preset, train, said):
    with pytest.raises(UserError, match=said):
        check_options(options_of(preset, **train))


def test_the_peers_models_are_accepted():
    for preset in ("crammed_bert", "ultrafastbert_1x11"):
        check_options(options_of(preset))
    with pytest.raises(UserError, match="blocks is 0"):
        BenchTrainOptions(blocks=0)


def test_there_must_be_something_to_time_beside():
    with pytest.raises(UserError, match="--peer-python"):
        check_options(BenchTrainOptions())
    with pytest.raises(UserError, match="crammed_bert has none"):
        check_beside(BenchTrainOptions(beside=("gather",)), [load_preset("crammed_bert")])


def test_sizes_come_from_the_scale_and_single_fields_win():
    options, given = parse(BenchTrainOptions, ["--peer-python", "python", "--model.vocab-size", "512"], "bench train")
    model = resolve(options, given, Budget(steps=1), local_platform("cpu")).run.model
    assert (model.d_model, model.n_layers, model.vocab_size) == (256, 4, 512)


def test_help_names_the_kinds_and_an_unknown_kind_is_a_sentence():
    assert "train" in bench("--help").stdout
    wrong = bench("tarin")
    assert wrong.returncode == 2
    assert "There is no verb 'bench tarin'; did you mean bench train?" in wrong.stderr

"""`ufbert bench finetune`: it times nothing that does not train the same model, on fair batches. No speed is tested."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from ufbert import nn
from ufbert.bench.architectures import peer_of
from ufbert.bench.contest import Race
from ufbert.bench.finetune import Texts, make_plans, read_rows, start
from ufbert.bench.finetune_command import parse
from ufbert.config import ModelConfig
from ufbert.config.presets import load_preset
from ufbert.data.encode import encode_texts
from ufbert.data.tokenizer import train_wordpiece
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, save_model

WORDS = ["good", "bad", "fine", "dull", "plot", "cast", "film", "story", "never", "always", "quite", "hardly"]
BERT = replace(
    load_preset("bert_base").model, vocab_size=128, max_len=64, d_model=32, n_heads=2, n_layers=1, d_hidden=48,
    pooler_width=32,
)  # fmt: skip

FAKE = """
import json, sys
sys.path[:0] = {path!r}
from pathlib import Path
from ufbert.bench import finetune_worker
print(json.dumps({{"ready": "a fake"}}), flush=True)
real = finetune_worker.answer(Path(sys.argv[1]), sys.argv[2])
for line in sys.stdin:
    asked = json.loads(line)
    losses = real(asked["first"], asked["updates"])
    print(json.dumps({{"losses": [loss * {factor} for loss in losses]}}), flush=True)
"""
"""A peer that trains with our own step, on the order of batches that it is told, and multiplies the losses."""


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ufbert", "bench", "finetune", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """90 texts of 1 to 20 words."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(90)]


@pytest.fixture(scope="module")
def toy_model(texts) -> ModelFolder:
    """A small BERT with random weights and a pooler."""
    config = replace(BERT, vocab_size=(tokenizer := train_wordpiece(texts, 128)).get_vocab_size())
    return ModelFolder(config, nn.init(config, jax.random.key(0), heads=("pooler",)), tokenizer)


@pytest.fixture
def job(toy_model, texts, tmp_path):
    """(factor) -> options of a small benchmark against a peer whose losses are ours times the factor."""

    def make(factor: float) -> tuple[str, ...]:
        save_model(tmp_path / "model", toy_model)
        lines = [f"{' '.join(text.split()[:7])}\t{i % 2}" for i, text in enumerate(texts)]  # of two lengths, padded
        (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]), encoding="utf-8")
        (tmp_path / "fake.py").write_text(FAKE.format(path=sys.path, factor=factor), encoding="utf-8")
        return (
            "--model", str(tmp_path / "model"), "--rows-file", str(tmp_path / "train.tsv"), "--peer-python", sys.executable,
            "--peer-script", str(tmp_path / "fake.py"), "--batch-rows", "4", "--checked", "2", "--updates", "2",
            "--blocks", "2", "--json", str(tmp_path / "report.json"),
        )  # fmt: skip

    return make


@pytest.mark.long
def test_peers_that_train_the_same_are_timed_and_reported(job, tmp_path):
    done = bench(*job(1.0))
    assert done.returncode == 0, done.stderr
    assert "times as fast as torch:" in done.stdout
    assert "times as fast as torch-bucketed:" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    ours, theirs, bucketed = report["contestants"]
    assert [len(one["block_seconds"]) for one in (ours, theirs, bucketed)] == [2, 2, 2]
    assert ours["first_losses"] == theirs["first_losses"] == bucketed["first_losses"]
    assert ours["tokens_per_row"] == bucketed["tokens_per_row"] < theirs["tokens_per_row"]
    assert {name: ratio["pairs"] for name, ratio in report["ratios"].items()} == {"torch": 2, "torch-bucketed": 2}


def test_a_peer_that_answers_a_wrong_loss_is_not_timed(job, tmp_path):
    done = bench(*job(1.001), "--peer", "torch")
    assert done.returncode == 2
    assert "torch does not train the same model" in done.stderr
    assert "Nothing was timed" in done.stderr
    assert "rows/s" not in done.stdout
    assert not (tmp_path / "report.json").exists()


def test_too_few_rows_for_a_batch_are_a_sentence(job):
    done = bench(*job(1.0), "--batch-rows", "91")
    assert done.returncode == 2
    assert "90 rows do not fill a batch of 91" in done.stderr


def test_both_orders_are_checked_on_the_same_batches_and_warmed_up_on_every_length(toy_model, texts):
    rows, size = encode_texts(toy_model.tokenizer, texts, None, toy_model.config), Race(4, 3, 2, 3, 0)
    plans, warm = make_plans(rows, size)
    ours, theirs = plans["bucketed"], plans["random"]
    for plan in (ours, theirs):
        assert plan.picks.shape == (3 + warm + 2 * 3, 4)
        warmed, timed = plan.lengths[3 : 3 + warm], plan.lengths[3 + warm :]
        assert set(timed) <= set(warmed)
        assert plan.facts["tokens_per_row"] == timed.mean()
        longest = np.array([max(len(rows.ids[i]) for i in picks) for picks in plan.picks])
        assert (plan.lengths >= longest).all()
    assert np.array_equal(ours.picks[:3], theirs.picks[:3])
    assert np.array_equal(ours.lengths[:3], theirs.lengths[:3])


def test_no_order_pads_the_peers_rows_more_than_dynamic_padding_does(toy_model, texts):
    rows = encode_texts(toy_model.tokenizer, texts, None, toy_model.config)
    plan = make_plans(rows, Race(4, 1, 2, 3, 0))[0]["random"]
    for picks, length in zip(plan.picks, plan.lengths, strict=True):
        longest = max(len(rows.ids[i]) for i in picks)
        assert longest <= length < longest + 8
        assert length % 8 == 0


def test_timed_batches_are_new_in_every_block_and_every_block_has_the_mix_of_an_epoch(toy_model, texts):
    rows = encode_texts(toy_model.tokenizer, texts, None, toy_model.config)
    size = Race(rows=2, checked=1, updates=10, blocks=4, seed=0)  # 40 of the epoch's 45 batches
    plans, warm = make_plans(rows, size)
    for plan in plans.values():
        timed = plan.picks[1 + warm :]
        assert len(np.unique(timed)) == timed.size
        means = plan.lengths[1 + warm :].reshape(4, 10).mean(axis=1)
        assert np.ptp(means) < 4
        assert abs(plan.facts["tokens_per_row"] - plan.facts["tokens_per_row_of_an_epoch"]) < 2


def test_the_models_own_pooler_is_fine_tuned(toy_model):
    params = start(toy_model, 3, 0)
    assert params["classifier"]["pooler"] is toy_model.params["pooler"]
    assert params["classifier"]["out"]["kernel"].shape == (32, 3)


def test_rows_of_a_file_are_texts_and_class_numbers(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('\ufeffid\tsentence\tlabel\r\n1\tso "good\tpos\r\n2\tbad\tneg\r\n', encoding="utf-8")
    assert read_rows(path) == Texts(['so "good', "bad"], [1, 0], 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("text\tlabel\na\t1\n", "no column 'sentence'"),
        ("", "no column 'sentence'"),
        ("sentence\tlabel\na\t1\nb\n", "line 3: 1 columns, expected 2"),
        ("sentence\tlabel\na\t1\nb\t1\n", "rows of 1 labels"),
    ],
)
def test_a_file_that_is_no_classification_set_is_a_sentence(tmp_path, text, said):
    path = tmp_path / "rows.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_rows(path)
    with pytest.raises(UserError, match="Cannot read"):
        read_rows(tmp_path / "nowhere.tsv")


def test_the_peer_is_a_bert_or_a_crammed_bert():
    assert peer_of(BERT) == "bert"
    assert peer_of(ModelConfig()) == "crammed"
    assert peer_of(load_preset("crammed_bert").model) == "crammed"


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("ultrafastbert_1x11", "model.feedforward"),
        ("crammed_rope", "model.positions"),
        ("fnet", "model.mixer"),
        ("switch_8e", "model.feedforward"),
    ],
)
def test_a_model_that_no_peer_is_is_refused(preset, said):
    with pytest.raises(UserError, match=said):
        peer_of(load_preset(preset).model)
    with pytest.raises(UserError, match=r"model\.pooling"):
        peer_of(replace(BERT, pooling="mean"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--peer-python"),
        (("--peer-python", "python", "--model", "m"), "rows_file is not given"),
        (("--peer-python", "python", "--rows-file", "r"), "model is not given"),
        (("--blocks", "0"), "blocks is 0"),
        (("--lr", "0"), "lr is 0"),
    ],
)
def test_options_are_checked(args, said):
    with pytest.raises(UserError, match=said):
        parse([*args])

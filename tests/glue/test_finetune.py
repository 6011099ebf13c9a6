"""Fine-tuning: runs side by side are runs alone, every row is seen, teachers teach, probes leave the encoder alone."""

import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.data.encode import Encoded, bucket, encode_texts
from ufbert.glue.batches import Batches, TokenBatch, epoch_batches
from ufbert.glue.finetune import Diverged, Run, Tuned, finetune_task, start_params
from ufbert.glue.protocols import PROTOCOLS, find_protocol
from ufbert.glue.step import Setting, finetune_steps, learning_rate, start_state
from ufbert.glue.tasks import TASKS, Examples, TaskData
from ufbert.hub.folder import load_model

QUICK = FinetuneConfig(epochs=3, lr=2e-3, dropout=0.0)


def sentence(rng):
    return "the " + " ".join(rng.choice(["cat", "dog", "king", "house", "bird"]) for _ in range(rng.randint(1, 9)))


def toy(task, train=120, dev=64, seed=1):
    """Rows that the word 'river' decides."""
    rng = random.Random(seed)

    def rows(n, labelled=True):
        flags = [rng.randint(0, 1) for _ in range(n)]
        texts = [sentence(rng) + (" river" if flag else "") for flag in flags]
        pairs = [sentence(rng) for _ in flags] if len(TASKS[task].text) > 1 else None
        return Examples(texts, pairs, [float(5 * f if task == "stsb" else f) for f in flags] if labelled else None)

    return TaskData(TASKS[task], rows(train), {"dev": rows(dev)}, {"test": rows(20, labelled=False)})


@pytest.fixture(scope="module")
def model(run_folder):
    return load_model(run_folder / "model")


def encoded(lengths, only_len=0):
    return Encoded([[5] * n for n in lengths], [[0] * n for n in lengths], 64, only_len, 0, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=90), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_row_once_in_batches_that_hold_it(lengths, batch_rows, seed, epoch):
    batches = epoch_batches(encoded(lengths), batch_rows, seed, epoch)
    seen = np.concatenate([batch.picks[batch.weights > 0] for batch in batches])
    assert sorted(seen) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_rows)
    for batch in batches:
        assert batch.picks.shape == batch.weights.shape == (batch_rows,)
        assert all(lengths[i] <= batch.length for i in batch.picks)
    other = epoch_batches(encoded(lengths), batch_rows, seed + 1, epoch)
    assert [batch.length for batch in other] == [batch.length for batch in batches]


def test_epochs_and_seeds_shuffle_and_padding_is_small():
    lengths = np.random.default_rng(0).integers(4, 60, 400)
    rows = encoded(lengths)
    one, again, next_epoch, other = (epoch_batches(rows, 16, *at) for at in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert all((a.picks == b.picks).all() for a, b in zip(one, again, strict=True))
    for different in (next_epoch, other):
        assert any((a.picks != b.picks).any() for a, b in zip(one, different, strict=True))
    ideal = sum(bucket(int(n), 64) for n in lengths)
    assert sum(batch.length * 16 for batch in one) < 1.1 * ideal
    fixed = epoch_batches(encoded(lengths, only_len=64), 16, 0, 0)
    assert {batch.length for batch in fixed} == {64}


def test_thresholds_follow_their_tokens_whatever_the_learning_rate():
    config = ModelConfig(
        vocab_size=60, max_len=16, d_model=16, n_layers=1, n_heads=2, feedforward=("routed_tree",), n_trees=1, tree_depth=2,
        leaf_width=4, pooler_width=8, dropout=0.0,
    )  # fmt: skip
    setting = Setting(config=config, tune=FinetuneConfig(dropout=0.0, weight_decay=0.1, clip_norm=1e-3))
    params = {"encoder": nn.init(config, jax.random.key(0), ())["encoder"]}
    params["classifier"] = nn.init_classifier(config, jax.random.key(1), 2)
    one_run = jax.tree.map(lambda leaf: leaf[None], params)
    ids = jnp.asarray(np.random.default_rng(0).integers(5, 60, (1, 3, 8)))
    batch = Batches(TokenBatch(ids, jnp.ones_like(ids), 0 * ids), jnp.zeros((1, 3)), jnp.ones((1, 3)), None)
    rate = np.zeros(1, np.float32)
    new, _ = finetune_steps(setting).update(
        start_state(one_run, setting.tune), batch, jax.random.key(5)[None], np.int32(0), rate
    )
    moved = {
        jax.tree_util.keystr(path, simple=True, separator=".").split(".")[-1]
        for path, same in jax.tree.leaves_with_path(
            jax.tree.map(lambda p, q: bool((p == q[0]).all()), params, new.params)
        )
        if not same
    }
    assert moved == {"node_bias"}


@pytest.mark.parametrize("task", ["sst2", pytest.param("stsb", marks=pytest.mark.long)])
def test_runs_side_by_side_are_the_same_runs_alone(model, task):
    runs = [Run(0, 1e-3), Run(1, 5e-4)]
    together = finetune_task(model, toy(task), QUICK, runs)
    for run, found in zip(runs, together, strict=True):
        (alone,) = finetune_task(model, toy(task), QUICK, [run])
        assert len(alone.trace.losses) == 24
        np.testing.assert_allclose(found.trace.losses[:20], alone.trace.losses[:20], atol=1e-5)
        np.testing.assert_allclose(found.trace.scores["dev"], alone.trace.scores["dev"], atol=0.02)
    assert np.abs(together[0].trace.losses - together[1].trace.losses).max() > 1e-3


@pytest.mark.parametrize("pooling", ["model", "first"])
def test_scores_are_those_of_the_saved_model_and_every_row_counts(model, pooling):
    data = toy("stsb", train=150)  # not a multiple of the batch
    (found,) = finetune_task(model, data, replace(QUICK, epochs=15, pooling=pooling), [Run(0, 4e-3)])
    assert model.config.pooling == "mean"
    assert found.model.config.pooling == {"model": "mean"}.get(pooling, pooling)
    assert len(found.trace.losses) == 15 * 10
    assert found.metrics["dev"]["pearson"] > 0.7
    assert found.trace.scores["test"].shape == (20, 1)
    from ufbert.inference.predictor import Predictor

    predictor = Predictor(found.model)
    assert predictor.task is not None
    assert predictor.task.pairs is True
    rows = data.dev["dev"]
    for i in (0, 5):
        answer = predictor.classify(rows.texts[i], rows.pairs[i])
        assert answer == pytest.approx(found.trace.scores["dev"][i, 0], abs=0.001)


def test_a_run_that_diverges_is_told_from_one_that_does_not(model):
    data = toy("sst2")
    wrecked, well = finetune_task(model, data, QUICK, [Run(0, 1e25), Run(1, 5e-4)])
    assert isinstance(wrecked, Diverged)
    assert wrecked.run == Run(0, 1e25)
    assert 2 <= wrecked.update <= 24
    assert isinstance(well, Tuned)
    assert np.isfinite(well.trace.losses).all()
    (alone, _) = finetune_task(model, data, QUICK, [Run(1, 1e25), Run(0, 1e25)])
    assert isinstance(alone, Diverged)


def test_only_the_output_layer_of_a_classifier_is_drawn_anew(family):
    model = family("bert", "classifier")
    old = model.params["classifier"]
    runs = [Run(0, 1.0), Run(1, 1.0)]
    started = start_params(model, model.config, TASKS["mnli"], runs, from_scratch=False)["classifier"]
    for i in range(2):
        jax.tree.map(
            lambda found, wanted, i=i: np.testing.assert_array_equal(found[i], wanted), started["pooler"], old["pooler"]
        )
    assert started["out"]["kernel"].shape == (2, 16, 3)
    assert np.abs(started["out"]["kernel"][0] - started["out"]["kernel"][1]).max() > 0
    fresh = start_params(model, model.config, TASKS["mnli"], runs, from_scratch=True)["classifier"]
    assert np.abs(fresh["pooler"]["dense"]["kernel"][0] - old["pooler"]["dense"]["kernel"]).max() > 0


def test_the_best_epoch_can_be_kept_and_a_run_can_stop_early(model):
    tune = FinetuneConfig(epochs=8, lr=0.05, dropout=0.0)  # a rate that wrecks it
    (last,) = finetune_task(model, toy("sst2"), tune, [Run(0, 0.05)])
    (best,) = finetune_task(model, toy("sst2"), tune, [Run(0, 0.05)], keep_best=True)
    curve = [point["accuracy"] for point in best.trace.curve]
    assert best.metrics["dev"]["accuracy"] == max(curve)
    assert last.metrics["dev"]["accuracy"] == last.trace.curve[-1]["accuracy"]
    (stopped,) = finetune_task(model, toy("sst2"), replace(tune, early_stop=1), [Run(0, 0.05)])
    assert len(stopped.trace.curve) < 8
    assert len(best.trace.curve) == 8


def test_a_probe_trains_the_classifier_only(model):
    tune = FinetuneConfig(epochs=30, lr=1e-2, dropout=0.0)
    found = finetune_task(model, toy("sst2"), tune, [Run(0, 1e-2), Run(1, 1e-2)], probe=True)
    for one in found:
        jax.tree.map(np.testing.assert_array_equal, one.model.params["encoder"], model.params["encoder"])
        assert one.metrics["dev"]["accuracy"] > 0.6
    assert found[0].metrics["dev"] != {} != found[1].metrics["dev"]
    assert np.abs(found[0].trace.scores["dev"] - found[1].trace.scores["dev"]).max() > 1e-4


def test_a_student_learns_its_teacher_without_labels(model):
    data = toy("sst2")
    (teacher,) = finetune_task(model, data, replace(QUICK, epochs=12), [Run(0, 2e-3)])
    assert teacher.metrics["dev"]["accuracy"] > 0.9
    noise = data._replace(train=data.train._replace(labels=[1.0 - y for y in data.train.labels]))  # all labels wrong
    tune = replace(QUICK, epochs=12, teacher_weight=1.0)
    (student,) = finetune_task(model, noise, tune, [Run(1, 2e-3)], teacher=teacher.model)
    assert student.metrics["dev"]["accuracy"] > 0.9
    (untaught,) = finetune_task(model, noise, tune, [Run(1, 2e-3)])
    assert untaught.metrics["dev"]["accuracy"] < 0.3


def test_a_teacher_of_values_teaches_in_the_labels_unit(model):
    data = toy("stsb")
    (teacher,) = finetune_task(model, data, replace(QUICK, epochs=15), [Run(0, 2e-3)])
    flat = data._replace(train=data.train._replace(labels=[float(i % 6) for i in range(len(data.train.texts))]))
    tune = replace(QUICK, epochs=15, teacher_weight=1.0)
    (student,) = finetune_task(model, flat, tune, [Run(1, 2e-3)], teacher=teacher.model)
    assert student.metrics["dev"]["pearson"] > 0.7
    gap = np.abs(student.trace.scores["dev"] - teacher.trace.scores["dev"]).mean()
    assert gap < 1.0


def test_from_scratch_starts_every_seed_elsewhere(model):
    found = finetune_task(model, toy("sst2"), replace(QUICK, epochs=1), [Run(0, 1e-9), Run(1, 1e-9)], from_scratch=True)
    first, second = (one.model.params["encoder"]["embeddings"]["tokens"] for one in found)
    assert np.abs(first - second).max() > 0.01
    assert np.abs(first - model.params["encoder"]["embeddings"]["tokens"]).max() > 0.01


def test_long_rows_are_cut_and_counted(model):
    data = toy("sst2")
    long = data._replace(train=data.train._replace(texts=["cat " * 10_000, *data.train.texts[1:]]))
    (found,) = finetune_task(model, long, replace(QUICK, epochs=1), [Run(0, 1e-3)])
    assert found.trace.truncated == 1
    assert np.isfinite(found.trace.losses).all()


def test_the_rate_rises_then_falls_to_zero():
    for schedule in ("cosine", "linear"):
        tune = FinetuneConfig(schedule=schedule)
        rates = [learning_rate(i, 100, tune) for i in range(100)]
        assert rates[9] == 1.0
        assert np.all(np.diff(rates[:10]) > 0)
        assert np.all(np.diff(rates[10:]) < 0)
        assert rates[-1] < 0.02
    assert learning_rate(54, 100, FinetuneConfig(schedule="linear")) == pytest.approx(1 - 44 / 90)


def test_protocols_are_as_published_and_changes_show_in_the_name():
    wide, narrow = ModelConfig(d_model=768, n_heads=12), ModelConfig(d_model=256, n_heads=4)
    crammed = PROTOCOLS["crammed"]
    assert (crammed.tune.epochs, crammed.tune.batch_rows, crammed.tune.lr) == (5, 16, 4e-5)
    assert (crammed.tune.schedule, crammed.tune.warmup, crammed.tune.dropout) == ("cosine", 0.1, 0.1)
    assert len(crammed.seeds) == 5
    bert = PROTOCOLS["bert"]
    assert (bert.tune.epochs, bert.tune.batch_rows, len(bert.rates)) == (3, 32, 4)
    assert PROTOCOLS["mnli-first"].mnli_first == ("rte", "mrpc", "stsb")
    assert find_protocol("auto", wide) is crammed
    assert find_protocol("auto", narrow).name == "small"
    assert find_protocol("auto", narrow).tune.peak_lr(narrow) == pytest.approx(7.8e-4, rel=0.01)
    same = crammed.with_overrides(crammed.tune, crammed.seeds)
    assert same.name == "crammed"
    changed = bert.with_overrides(replace(bert.tune, lr=1e-4, epochs=1), (7,))
    assert changed.name == "bert with epochs 1, lr 0.0001, 1 seed(s)"
    assert changed.rates == ()
    assert "learning rate 0.0001" in changed.text(wide)
    assert "5e-05 or 4e-05 or 3e-05 or 2e-05 (the best on dev, per task)" in bert.text(wide)


def test_padding_goes_to_the_smallest_bucket(model):
    tokenizer = model.tokenizer
    rows = encode_texts(tokenizer, ["the cat", "the " * 30], ["a dog", "b"], ModelConfig(max_len=64))
    batch = rows.pad([0])
    assert batch.ids.shape == (1, bucket(len(rows.ids[0]), 64))
    assert batch.segment_ids.sum() == len(rows.ids[0])
    assert batch.type_ids.sum() < batch.segment_ids.sum()
    assert max(map(len, rows.ids)) <= 64
    assert [bucket(n, 64) for n in (1, 8, 9, 17, 49, 64)] == [8, 8, 16, 24, 64, 64]
    assert bucket(40, 44) == 44


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_pooling_reads_the_first_token_or_the_mean_of_the_real_ones(pooling):
    config = ModelConfig(d_model=8, n_heads=2, n_layers=1, pooling=pooling, pooler_width=5, init_std=0.3)
    hidden = jax.random.normal(jax.random.key(0), (2, 6, 8))
    mask = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    params = {"classifier": nn.init_classifier(config, jax.random.key(1), 3)}
    read = hidden[:, 0] if pooling == "first" else jnp.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
    pooler, out = params["classifier"]["pooler"]["dense"], params["classifier"]["out"]
    wanted = jnp.tanh(read @ pooler["kernel"] + pooler["bias"][None]) @ out["kernel"] + out["bias"][None]
    pooled = nn.pool(config, hidden, mask)
    found = nn.classify(params, config, pooled)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    padded = nn.classify(params, config, nn.pool(config, hidden.at[0, 3:].set(9.0), mask))
    np.testing.assert_allclose(padded[0], found[0], atol=1e-6)
    np.testing.assert_allclose(nn.classify(params, config, nn.pool(config, hidden[1:])), found[1:], atol=1e-6)
    found = nn.apply_pooler({"pooler": params["classifier"]["pooler"]}, config, pooled)
    np.testing.assert_allclose(found, jnp.tanh(read @ pooler["kernel"] + pooler["bias"][None]), atol=1e-6)

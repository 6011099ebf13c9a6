"""A first phase in which each token predicts the next one: what it sees, what is predicted, when, and what it costs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL

from ufbert import nn
from ufbert.cli import call
from ufbert.config import ModelConfig, PretrainConfig, RunConfig
from ufbert.cost.flops import predicted_share, train_flops_per_token
from ufbert.cost.speeds import Speeds
from ufbert.data.tokenizer import SpecialIds
from ufbert.errors import UserError
from ufbert.ops.masking import next_tokens
from ufbert.plan.counts import RunCounts, StepCount
from ufbert.plan.estimate import plan_run
from ufbert.pretrain.budget import Budget
from ufbert.pretrain.schedules import Stage, stage, stages
from ufbert.pretrain.step import StepInputs, build_steps, init_state
from ufbert.runtime.metrics import read_records

PAD, UNK, CLS, SEP, MASK = range(5)
MODEL = ModelConfig(
    vocab_size=30, max_len=12, d_model=16, n_layers=2, n_heads=2, d_hidden=12, init_std=0.3, positions="rotary",
    feedforward=("glu", "tree"), tree_depth=2, unet_skips=True, value_embeddings=1, tree_backend="gather",
)  # fmt: skip
RUN = RunConfig(MODEL, PretrainConfig(batch_rows=2, micro_rows=2), replace(RunConfig().data, seq_len=12))
ROWS = jnp.array([[CLS, 7, 8, 9, SEP, CLS, 10, 11, 12, 13, SEP, CLS], [5, 6, 7, SEP, CLS, 8, 9, 10, 11, 12, 13, 14]])


@pytest.mark.parametrize("segments", [None, 1 + jnp.cumsum(ROWS == CLS, axis=1)])
def test_a_token_sees_itself_and_those_before_it_in_its_document(segments):
    params, encode = nn.init(MODEL, jax.random.key(0)), jax.jit(nn.encode, static_argnames=("config", "causal"))

    def hidden(ids):
        return np.asarray(encode(params, MODEL, ids, segments, causal=True)[0])

    usual = hidden(ROWS)
    for at in (0, 4, 5, 11):
        moved = np.abs(hidden(ROWS.at[:, at].set(20)) - usual).max(axis=-1) > 1e-6
        documents = np.zeros_like(ROWS) if segments is None else np.asarray(segments)
        seen = (np.arange(12) >= at) & (documents == documents[:, at : at + 1])
        np.testing.assert_array_equal(moved, seen)


def test_every_ordinary_token_is_predicted_from_the_one_before_it_or_a_share_of_them():
    special = (PAD, CLS, SEP)
    ids, positions, labels, weights = next_tokens(ROWS, jax.random.key(0), rate=1.0, special_ids=special)
    assert ids is ROWS
    assert positions.tolist() == [list(range(11))] * 2
    assert labels.tolist() == ROWS[:, 1:].tolist()
    assert weights.tolist() == [[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]]
    drawn = [next_tokens(ROWS, jax.random.key(i), rate=0.25, special_ids=special) for i in range(60)]
    chosen = {(row, position) for one in drawn for row in (0, 1) for position in one.positions[row].tolist()}
    assert all(one.weights.tolist() == [[1, 1, 1]] * 2 for one in drawn)  # 3 of 12, all ordinary
    assert chosen == {(row, i) for row in (0, 1) for i in range(11) if weights[row, i]}
    for one in drawn[:3]:
        assert one.labels.tolist() == jnp.take_along_axis(ROWS, one.positions + 1, axis=1).tolist()


def test_the_step_lowers_the_loss_that_is_counted():
    steps, state = build_steps(RUN, SpecialIds(PAD, UNK, CLS, SEP, MASK)), init_state(RUN, jax.random.key(0))
    inputs = StepInputs(jnp.float32(2e-2), jnp.float32(0.5), jnp.float32(0.25), jnp.int32(2))
    segments = 1 + jnp.cumsum(ROWS == CLS, axis=1)
    encode = jax.jit(nn.encode, static_argnames=("config", "causal"))
    hidden, _ = encode(state.params, MODEL, ROWS, segments, causal=True)
    log_p = np.asarray(jax.nn.log_softmax(nn.masked_lm_logits(state.params, MODEL, hidden)))
    pairs = [(row, i) for row in (0, 1) for i in range(11) if ROWS[row, i + 1] not in (PAD, CLS, SEP)]
    wanted = -sum(float(log_p[row, i, ROWS[row, i + 1]]) for row, i in pairs)
    losses = []
    for i in range(12):
        state, (sums, _, applied) = steps.train_step(state, ROWS, jax.random.key(i), inputs, next_token=True)
        assert applied
        losses.append(float(sums.loss))
    assert losses[0] == pytest.approx(wanted, rel=1e-5)
    assert float(sums.count) == len(pairs)
    assert losses[-1] < 0.5 * losses[0]


def test_stages_follow_the_budget():
    data, train = replace(RUN.data, short_until=0.25, short_len=4), replace(RUN.train, next_token_until=0.4)
    run = replace(RUN, data=data, train=train)
    assert stages(RUN) == [Stage(12, next_token=False)]
    assert stages(run) == [Stage(4, next_token=True), Stage(12, next_token=True), Stage(12, next_token=False)]
    assert [stage(run, x) for x in (0.0, 0.25, 0.4, 1.0)] == [*stages(run), Stage(12, next_token=False)]
    assert stages(replace(run, train=replace(train, next_token_until=0.1)))[1] == Stage(4, next_token=False)
    assert stages(replace(RUN, train=replace(train, next_token_until=1.0))) == [Stage(12, next_token=True)]


def test_the_head_costs_what_it_predicts():
    first = replace(RUN, train=replace(RUN.train, next_token_until=0.5))
    assert predicted_share(RUN.train) == 0.25
    assert predicted_share(first.train) == 0.625
    assert predicted_share(replace(first.train, next_token_rate=0.25)) == 0.25
    more = train_flops_per_token(first, masked_trees=False) - train_flops_per_token(RUN, masked_trees=False)
    assert more == pytest.approx(3 * 0.375 * 2 * 16 * 30)
    cheap, dear = StepCount(1e9, 0.0, 1.0, 1.0), StepCount(3e9, 0.0, 2.0, 1.0)
    gradient = {(rows, at): dear if at.next_token else cheap for rows in (1, 2) for at in stages(first)}
    counts, speeds = RunCounts(gradient, cheap._replace(flops=0.0), cheap, 0.0, 0.0), Speeds(1e9, 1e9, 1e9, "")
    plan = plan_run(first, Budget(steps=10), counts, speeds, masked_trees=False, compile_seconds=0.0)
    assert plan.seconds.updates == pytest.approx(5 * 3 + 5 * 1)
    assert counts.memory(2) == 2.0


@pytest.mark.parametrize("mixer", [("fourier",), ("fourier", "attention")])
def test_mixers_that_cannot_be_kept_from_the_next_token_are_refused(mixer):
    model = replace(MODEL, mixer=mixer, value_embeddings=0)
    with pytest.raises(UserError, match=r"train\.next_token_until 0\.1 needs attention in all layers, .* has fourier"):
        replace(RUN, model=model, train=replace(RUN.train, next_token_until=0.1))


def test_a_run_predicts_next_tokens_first_and_masked_ones_then(corpus_file, tmp_path):
    options = [*SMALL, "--budget=6steps", "--train.next-token-until=0.5", "--train.next-token-rate=0.5"]
    summary = call("train", [*options, f"--corpus=text:{corpus_file}", f"--out={tmp_path / 'run'}"])
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "gradient_norm" in r]
    assert [r.get("next_token", False) for r in records] == [True] * 3 + [False] * 3
    assert all(0 < r["loss"] < 10 for r in records)
    assert 0 < summary["heldout_loss"] < 10

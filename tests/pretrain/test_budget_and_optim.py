"""Budgets, clocks, the ledger, schedules, and which parameters decay."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert import nn
from ufbert.config import PretrainConfig
from ufbert.errors import UserError
from ufbert.presets import load_preset, preset_names
from ufbert.pretrain.budget import Budget, Ledger, StepClock, WallClock, parse_budget
from ufbert.pretrain.optim import decay_mask, decays, make_optimizer, rows_per_update, triangle


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("24h", Budget(seconds=86400.0)),
        ("90m", Budget(seconds=5400.0)),
        ("1.5h", Budget(seconds=5400.0)),
        ("300s", Budget(seconds=300.0)),
        ("200steps", Budget(steps=200)),
        ("1step", Budget(steps=1)),
    ],
)
def test_budgets_parse(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["0", "abc", "", "0m", "0steps", "-5m", "5", "1.5steps", "5 m x", "5d"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UserError):
        parse_budget(text)


def test_triangle_is_the_published_schedule():
    for x in np.linspace(0, 1, 101):
        assert triangle(x) == pytest.approx(max(0.0, min(0.25 + x / 0.75 * 0.75, (1 - x) / 0.25)))
    assert triangle(0.75) == 1.0
    assert triangle(1.0) == 0.0


def test_batch_ramp_is_linear_in_whole_micro_batches():
    config = PretrainConfig(batch_rows=1024, micro_rows=128, ramp_until=0.6)
    assert [rows_per_update(config, x) for x in (0.0, 0.15, 0.6, 1.0)] == [128, 384, 1024, 1024]
    assert {rows_per_update(config, x) % 128 for x in np.linspace(0, 1, 50)} == {0}


def test_step_clock_counts_updates():
    clock = StepClock(4)
    assert [clock.fraction(i) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [clock.done(i) for i in (3, 4)] == [False, True]


def test_wall_clock_keeps_its_reserve_and_never_runs_back():
    clock = WallClock(10.0, spent_before=4.0)
    clock.reserve(2.0)
    first = clock.fraction(0)
    assert first == pytest.approx(4 / 8, abs=0.01)
    clock.reserve(0.0)
    assert clock.fraction(0) >= first
    assert not clock.done(0)
    assert WallClock(10.0, spent_before=9.9).done(0) is False
    assert WallClock(10.0, spent_before=10.0).done(0)
    late = WallClock(10.0, started=time.monotonic() - 3.0)
    assert late.spent() == pytest.approx(3.0, abs=0.1)


def test_ledger_survives_a_cut_line_and_adds_sessions(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.start(WallClock(100.0, started=time.monotonic() - 5.0))
    ledger.close()
    with path.open("a") as file:
        file.write('{"session": 1, "spe')
    again = Ledger(path)
    assert again.spent_before == pytest.approx(5.0, abs=0.2)
    path.write_text(path.read_text().rpartition("{")[0])
    again.start(WallClock(100.0, spent_before=again.spent_before, started=time.monotonic() - 2.0))
    again.close()
    assert Ledger(path).spent_before == pytest.approx(7.0, abs=0.3)
    assert sorted({json.loads(line)["session"] for line in path.read_text().splitlines()}) == [1, 2]


@pytest.mark.parametrize("name", preset_names())
def test_every_parameter_decays_or_is_a_norm_or_a_bias(name):
    tree = nn.shapes(load_preset(name).model)
    mask = decay_mask(tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        text = jax.tree_util.keystr(path, simple=True, separator=".")
        small = text.endswith("bias") or "norm." in text
        assert decays(path) != small, text
        assert small or leaf.ndim > 1 or text.endswith(("position_scale", "master_share")), text
    assert jax.tree.structure(mask) == jax.tree.structure(tree)


def test_the_position_scale_alone_moves_at_its_own_rate():
    params = nn.init(load_preset("tiny").model, jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, params)

    def direction(rate):
        optimizer = make_optimizer(PretrainConfig(position_scale_lr=rate))
        return optimizer.update(grads, optimizer.init(params), params)[0]

    plain, slow = direction(1.0), direction(0.01)
    plain_scale, slow_scale = (found["encoder"]["embeddings"].pop("position_scale") for found in (plain, slow))
    assert plain_scale > 0.9
    np.testing.assert_allclose(slow_scale, 0.01 * plain_scale, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, plain, slow)
    with pytest.raises(UserError, match="position_scale_lr"):
        PretrainConfig(position_scale_lr=-1.0)

"""Budgets, clocks, the ledger, schedules, and which parameters decay."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ufbert import nn
from ufbert.config import PretrainConfig
from ufbert.config.presets import load_preset, preset_names
from ufbert.errors import UserError
from ufbert.nn.updates import apply_update
from ufbert.pretrain.budget import Budget, Ledger, StepClock, WallClock, parse_budget
from ufbert.pretrain.optim import (
    averaged,
    averaging_power,
    decay_mask,
    decays,
    group,
    groups,
    make_optimizer,
    orthogonalised,
    orthogonalised_as_one,
)
from ufbert.pretrain.resolve import with_batch
from ufbert.pretrain.schedules import final_batch_rows, lr_share, mask_rate, rows_per_step


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("24h", Budget(seconds=86400.0)),
        ("90m", Budget(seconds=5400.0)),
        ("1d", Budget(seconds=86400.0)),
        ("1.5d", Budget(seconds=129600.0)),
        ("1d12h", Budget(seconds=129600.0)),
        ("1w2d3h4m5s", Budget(seconds=604800.0 + 2 * 86400 + 3 * 3600 + 4 * 60 + 5)),
        ("1.5h", Budget(seconds=5400.0)),
        ("300s", Budget(seconds=300.0)),
        ("200steps", Budget(steps=200)),
        ("1step", Budget(steps=1)),
    ],
)
def test_budgets_parse(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        "0", "abc", "", "0m", "0steps", "-5m", "5", "1.5steps", "5 m x", "5y", "12h1d", "1d12", "d", "1d5steps", "0d0h",
        "1e30s", f"{10**30}s", f"{10**13}steps", "9" * 5000 + "h", "nans", "x" * 3_000_000,
    ],
)  # fmt: skip
def test_other_budgets_are_refused(text):
    with pytest.raises(UserError) as refusal:
        parse_budget(text)
    assert len(str(refusal.value)) < 200


def test_triangle_is_the_published_schedule():
    config = PretrainConfig()
    for x in np.linspace(0, 1, 101):
        assert lr_share(config, x) == pytest.approx(max(0.0, min(0.25 + x / 0.75 * 0.75, (1 - x) / 0.25)))
    assert lr_share(config, 0.75) == 1.0
    assert lr_share(config, 1.0) == 0.0


def test_the_stable_schedule_warms_up_holds_and_decays():
    config = PretrainConfig(schedule="stable", warmup=0.1, decay=0.4)
    found = [lr_share(config, x) for x in (0.0, 0.05, 0.1, 0.3, 0.6, 0.8, 1.0)]
    assert found == pytest.approx([0.001, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0])
    assert lr_share(PretrainConfig(schedule="stable", warmup=0.0, decay=0.0), 1.0) == 1.0


def test_mask_rates_are_stages_of_equal_length():
    config = PretrainConfig(mask_rate=(0.3, 0.25, 0.2, 0.15))
    assert [mask_rate(config, x) for x in (0.0, 0.24, 0.25, 0.5, 0.75, 1.0)] == [0.3, 0.3, 0.25, 0.2, 0.15, 0.15]
    assert {mask_rate(PretrainConfig(), x) for x in (0.0, 0.5, 1.0)} == {0.25}


def test_an_open_batch_ramp_ends_at_a_500th_of_the_expected_rows_or_8192():
    config = PretrainConfig(micro_rows=32)
    assert final_batch_rows(config, 1e5) == 192
    assert final_batch_rows(config, 100.0) == 32
    assert final_batch_rows(PretrainConfig(micro_rows=128), 3e8) == 8192


def test_an_open_batch_may_aim_for_more_or_fewer_updates():
    small = PretrainConfig(micro_rows=32, aim_updates=1000)
    assert [final_batch_rows(small, rows) for rows in (1e5, 32e3, 100.0, 1e9)] == [96, 32, 32, 8192]
    assert final_batch_rows(PretrainConfig(micro_rows=32, aim_updates=100), 1e5) == 992
    run = load_preset("crammed_bert")
    run = replace(run, train=replace(run.train, aim_updates=2000))
    assert with_batch(run, "base", 2000.0 * 256 * 128).train.batch_rows == 256
    assert with_batch(run, "base", None).train.batch_rows == 8192  # a budget of steps: the published one, as ever
    assert with_batch(run, "tiny", None).train.batch_rows == run.train.micro_rows


def test_batch_ramp_is_linear_in_whole_micro_batches():
    config = PretrainConfig(batch_rows=1024, micro_rows=128, ramp_until=0.6)
    assert [rows_per_step(config, x) for x in (0.0, 0.15, 0.6, 1.0)] == [128, 384, 1024, 1024]
    assert {rows_per_step(config, x) % 128 for x in np.linspace(0, 1, 50)} == {0}


def test_step_clock_counts_updates():
    clock = StepClock(4)
    assert [clock.fraction(i) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [clock.done(i) for i in (3, 4)] == [False, True]


def test_wall_clock_keeps_its_reserve_and_never_runs_back():
    clock = WallClock(10.0, spent_before=4.0, now=lambda: 100.0)
    clock.reserve(2.0)
    assert clock.fraction(0) == 4 / 8
    clock.reserve(0.0)
    assert clock.fraction(0) == 4 / 8
    assert not clock.done(0)
    assert WallClock(10.0, spent_before=9.9, now=lambda: 100.0).done(0) is False
    assert WallClock(10.0, spent_before=10.0).done(0)
    assert WallClock(10.0, started=97.0, now=lambda: 100.0).spent() == 3.0


def test_a_schedule_ends_with_the_wall_where_that_comes_before_the_budget():
    clock = WallClock(600.0, started=97.0, deadline=115.0, now=lambda: 106.0)
    assert (clock.seconds, clock.fraction(0), clock.done(0)) == (18.0, 0.5, False)
    clock.reserve(9.0)
    assert (clock.fraction(0), clock.done(0)) == (1.0, True)


def test_ledger_survives_a_cut_line_and_adds_sessions(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.start(WallClock(100.0, started=95.0, now=lambda: 100.0))
    ledger.close()
    with path.open("a") as file:
        file.write('{"session": 1, "spe')
    again = Ledger(path)
    assert again.spent_before == 5.0
    path.write_text(path.read_text().rpartition("{")[0])
    again.start(WallClock(100.0, spent_before=again.spent_before, started=98.0, now=lambda: 100.0))
    again.close()
    assert Ledger(path).spent_before == 7.0
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


@pytest.mark.parametrize("name", preset_names())
def test_muon_and_adamw_share_out_every_parameter(name):
    tree = nn.shapes(load_preset(name).model)
    found = groups(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    dense = r"layer_\d\d\.(attention\.(query|key|value|out)|dense\.(in|out)|glu\.(gate|value|out))\.kernel$"
    leaves = r"\.routed_tree\.((leaf|above)_(in|out)|shared_(in|out)\.kernel)$"
    for path, leaf in jax.tree.leaves_with_path(tree):
        text = jax.tree_util.keystr(path, simple=True, separator=".")
        assert group(path) == ("muon" if re.search(f"{dense}|{leaves}", text) else "adamw"), text
        assert group(path) == "adamw" or leaf.ndim == 2 or re.search(leaves, text), text
    config = PretrainConfig(optimizer="muon")
    state = jax.eval_shape(make_optimizer(config).init, tree)
    moved = [leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1]
    sizes = {which: sum(leaf.size for path, leaf in jax.tree.leaves_with_path(tree) if group(path) == which and leaf.size > 1)
             for which in ("muon", "adamw")}  # fmt: skip
    coefficients = 3  # of Newton-Schulz, which optax keeps in its state
    assert sum(moved) == sizes["muon"] + 2 * sizes["adamw"] + coefficients  # a moment each, or two: every one once


def test_muon_orthogonalises_each_matrix_apart_at_the_size_of_adamw():
    model = replace(load_preset("crammed_bert").model, n_layers=1, d_model=32, n_heads=2, d_hidden=48, vocab_size=50)
    params = nn.init(model, jax.random.key(0))
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    optimizer = make_optimizer(PretrainConfig(optimizer="muon", weight_decay=0.0, clip_norm=1e9))
    found, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    layer = found["encoder"]["layer_00"]
    for kernel in (*(layer["attention"][k]["kernel"] for k in ("query", "key", "value", "out")),
                   *(layer["glu"][k]["kernel"] for k in ("gate", "value", "out"))):  # fmt: skip
        values = np.linalg.svd(np.asarray(kernel), compute_uv=False) / (0.2 * max(kernel.shape) ** 0.5)
        assert 0.3 < values.min() < values.max() < 1.4
        assert 0.1 < float(jnp.sqrt(jnp.mean(kernel**2))) < 0.25
    np.testing.assert_allclose(np.abs(found["encoder"]["embeddings"]["tokens"]), 1.0, rtol=1e-3)  # Adam's first step


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 8, 8)])
def test_newton_schulz_is_the_one_of_optax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    axes = optax.contrib.MuonDimensionNumbers(len(shape) - 2, len(shape) - 1)
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=axes)
    wanted, _ = muon.update(x, muon.init(x))
    np.testing.assert_allclose(orthogonalised(x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)), wanted, atol=2e-5)


def test_the_average_of_past_weights_is_the_power_profile():
    width, total = 0.1, 400
    gamma = averaging_power(width)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(width**2, rel=1e-6)
    weights = np.random.default_rng(0).normal(size=(total, 3))
    average = {"w": jnp.zeros(3)}
    for t in range(1, total + 1):
        average = averaged(average, {"w": jnp.asarray(weights[t - 1], jnp.float32)}, jnp.int32(t), gamma)
    t = np.arange(1, total + 1)
    factors = np.array([np.prod((1 - 1 / t[i:]) ** (gamma + 1)) * (1 - (1 - 1 / i) ** (gamma + 1)) for i in t])
    assert factors.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(average["w"], factors @ weights, atol=2e-5)
    mean = (factors * t).sum()
    assert np.sqrt((factors * (t - mean) ** 2).sum()) == pytest.approx(width * total, rel=0.02)


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


def test_cautious_decay_spares_what_the_update_moves_away_from_zero():
    """Entry by entry, of what decays at all."""
    model = replace(load_preset("crammed_bert").model, n_layers=1, d_model=32, n_heads=2, d_hidden=48, vocab_size=50)
    params = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape), nn.init(model, jax.random.key(0))
    )
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size + 1), p.shape), params)

    def direction(**changes):
        optimizer = make_optimizer(PretrainConfig(**changes))
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]

    bare, plain = direction(weight_decay=0.0), direction(weight_decay=0.5)
    cautious = direction(weight_decay=0.5, cautious_decay=True)
    for (path, update), p, all_of_it, some in zip(
        jax.tree.leaves_with_path(bare), *map(jax.tree.leaves, (params, plain, cautious)), strict=True
    ):
        decayed = np.asarray(0.5 * p if decays(path) else 0 * p)
        np.testing.assert_allclose(all_of_it - update, decayed, atol=1e-5)
        same_sign = np.sign(update) == np.sign(p)
        np.testing.assert_allclose(some - update, np.where(same_sign, decayed, 0.0), atol=1e-5)
        assert not decays(path) or p.size < 50 or 0.2 < same_sign.mean() < 0.8


def test_the_gradient_of_a_threshold_is_its_step_whatever_rate_and_clipping():
    params = {
        "encoder": {
            "layer_00": {
                "routed_tree": {
                    "node_bias": jnp.ones((1, 3)),
                    "node": jnp.ones((1, 3, 8)),
                    "leaf_in": jnp.ones((1, 4, 8, 2)),
                }
            }
        }
    }
    for kind in ("adamw", "muon"):
        optimizer = make_optimizer(PretrainConfig(optimizer=kind, clip_norm=0.1))
        grads = jax.tree.map(lambda p: 7.0 * p, params)
        direction, _ = optimizer.update(grads, optimizer.init(params), params)
        new = apply_update(params, direction, jnp.float32(1e-3))["encoder"]["layer_00"]["routed_tree"]
        np.testing.assert_array_equal(new["node_bias"], 1.0 - 7.0)
        assert 0 < np.abs(new["leaf_in"] - 1.0).max() < 2e-3
        np.testing.assert_allclose(new["node"], 1.0 - 0.05e-3, atol=2e-6, err_msg="decisions move slowly")


def test_nodes_that_fewer_tokens_reach_learn_more_slowly_if_asked():
    layer = {
        "above_in": jnp.ones((2, 7, 4, 3)),
        "leaf_in": jnp.ones((2, 8, 4, 3)),
        "shared_in": {"kernel": jnp.ones((4, 3))},
    }
    params = {"encoder": {"layer_00": {"routed_tree": layer}}}

    def updates(power):
        optimizer = make_optimizer(PretrainConfig(leaf_lr_power=power, weight_decay=0.0))
        direction, _ = optimizer.update(params, optimizer.init(params), params)
        return direction["encoder"]["layer_00"]["routed_tree"]

    full, less = updates(0.0), updates(0.5)
    ratio = jax.tree.map(lambda a, b: np.asarray(a / b), less, full)
    by_level = 2.0 ** (-0.5 * np.array([0, 1, 1, 2, 2, 2, 2]))
    np.testing.assert_allclose(
        ratio["above_in"], np.broadcast_to(by_level[None, :, None, None], (2, 7, 4, 3)), rtol=1e-5
    )
    np.testing.assert_allclose(ratio["leaf_in"], 2.0**-1.5, rtol=1e-5)
    np.testing.assert_allclose(ratio["shared_in"]["kernel"], 1.0, rtol=1e-5)


def test_matrices_in_one_stack_come_out_as_each_by_itself():
    shapes = [(6, 4), (4, 6), (2, 3, 4, 6), (5, 6, 4), (4, 4), (1, 7, 2)]
    matrices = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    matrices = [x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in matrices]
    for x, together in zip(matrices, orthogonalised_as_one(matrices), strict=True):
        np.testing.assert_allclose(together, orthogonalised(x), atol=1e-5)


def test_the_rate_of_muon_is_a_share_of_that_of_adamw():
    layer = {"attention": {"query": {"kernel": jnp.ones((8, 8))}}, "mixer_norm": {"scale": jnp.ones(8)}}
    params = {"encoder": {"layer_00": layer, "embeddings": {"tokens": jnp.ones((9, 8))}}}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    def direction(share):
        optimizer = make_optimizer(PretrainConfig(optimizer="muon", muon_lr_share=share, weight_decay=0.0))
        return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]

    one, half = direction(1.0), direction(0.5)
    for (path, full), less in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(half), strict=True):
        np.testing.assert_allclose(less, (0.5 if group(path) == "muon" else 1.0) * full, rtol=1e-6)
    with pytest.raises(UserError, match="muon_lr_share is 0"):
        PretrainConfig(muon_lr_share=0.0)

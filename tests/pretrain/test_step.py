"""The step: what is not finite changes nothing, micro-batches add up, devices agree."""

import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO

from ufbert.config import ModelConfig, PretrainConfig, RunConfig
from ufbert.data.tokenizer import SpecialIds
from ufbert.errors import UserError
from ufbert.nn.ngrams import split_tables
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import StepInputs, build_steps, init_state

SPECIAL = SpecialIds(0, 1, 2, 3, 4)
MODEL = ModelConfig(vocab_size=120, max_len=32, d_model=32, n_layers=2, n_heads=2, d_hidden=32, pooler_width=16)
DATA = replace(RunConfig().data, seq_len=32)
RUN = RunConfig(MODEL, PretrainConfig(batch_rows=8, micro_rows=8, average_width=0.1), DATA)
TABLES = replace(RUN, model=replace(MODEL, ngram_rows=40))
INPUTS = StepInputs(jnp.float32(1e-3), jnp.float32(0.5), jnp.float32(0.25), jnp.int32(8))


def rows(n=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(5, 120, (n, 32)), jnp.int32).at[:, 0].set(2)


@pytest.mark.parametrize(("base", "optimizer"), [(RUN, "adamw"), (RUN, "muon"), (TABLES, "muon")])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counts(base, optimizer, bad):
    run = replace(base, train=replace(base.train, optimizer=optimizer))
    steps, state = build_steps(run, SPECIAL), init_state(run, jax.random.key(0))
    before = jax.tree.map(np.array, state)
    total = steps.add_gradient(state.params, rows(), jax.random.key(1), INPUTS, None)
    spoiled = (jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(bad), total[0]), total[1])
    after, metrics = steps.apply_gradient(state, spoiled, INPUTS)
    assert not metrics.applied
    counts = {"step": 1, "rows_seen": 8, "skipped": 1}
    assert {name: int(getattr(after, name)) for name in counts} == counts
    for name in ("params", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    good, metrics = steps.apply_gradient(after, total, INPUTS)
    assert metrics.applied
    assert int(good.skipped) == 1
    # The first applied update starts the average, which has no tables.
    jax.tree.map(np.testing.assert_array_equal, good.average, split_tables(good.params)[0])


@pytest.mark.parametrize("run", [RUN, TABLES], ids=["plain", "tables"])
def test_micro_batches_add_up_to_the_batch(run):
    steps = build_steps(run, SPECIAL)
    params = init_state(run, jax.random.key(0)).params
    batch = [rows(4, seed) for seed in (1, 2)]
    keys = [jax.random.key(seed) for seed in (3, 4)]
    total = None
    for part, key in zip(batch, keys, strict=True):
        total = steps.add_gradient(params, part, key, INPUTS, total)
    apart = [steps.add_gradient(params, part, key, INPUTS, None) for part, key in zip(batch, keys, strict=True)]
    jax.tree.map(lambda t, a, b: np.testing.assert_allclose(t, a + b, rtol=1e-6, atol=1e-7), total, *apart)
    assert float(total[1].count) == 8 * 8


def test_rows_that_do_not_divide_among_devices_are_refused():
    with pytest.raises(UserError, match="micro_rows 8 cannot be split evenly among 3 devices"):
        Layout(RUN, [jax.devices()[0]] * 3)


TWENTY_STEPS = """
import sys, json
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from test_step import INPUTS, SPECIAL, TABLES, rows
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import build_steps, init_state
found = []
for devices, shard in ((1, False), (8, False), (8, True)):
    run = replace(TABLES, train=replace(TABLES.train, shard_params=shard))
    layout, key = Layout(run, jax.devices()[:devices]), jax.random.key(0)
    steps, state, losses = build_steps(run, SPECIAL, layout), init_state(run, key, layout), []
    for i in range(20):
        state, out = steps.train_step(state, layout.rows(np.asarray(rows(8, i))), jax.random.fold_in(key, i), INPUTS)
        losses.append(float(out.sums.loss / out.sums.count))
    placed = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)}
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    found.append({"losses": losses, "placed": sorted(placed), "split": split})
print(json.dumps(found))
"""


def test_eight_devices_compute_the_losses_of_one():
    args = [sys.executable, "-W", "error", "-c", TWENTY_STEPS, str(REPO / "tests" / "pretrain")]
    done = subprocess.run(args, capture_output=True, text=True, cwd=REPO / "tests")
    assert done.returncode == 0, done.stderr
    one, copied, split = json.loads(done.stdout)
    assert (one["placed"], copied["placed"], split["placed"]) == ([1], [8], [8])
    assert copied["split"] == 0
    assert split["split"] > 20
    for found in (copied, split):
        np.testing.assert_allclose(found["losses"], one["losses"], atol=1e-5, rtol=0)
    assert one["losses"][-1] != one["losses"][0]

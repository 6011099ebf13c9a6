"""Hashed tables in training: gradients of the rows that were read alone, and a state that a checkpoint restores."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import INPUTS, SPECIAL, TABLES, rows

from ufbert.nn.ngrams import averaged_params, split_tables, table_rows
from ufbert.ops.row_updates import RowGradient, spread
from ufbert.pretrain.checkpoint import Checkpoints
from ufbert.pretrain.sharding import Layout
from ufbert.pretrain.step import (
    build_steps,
    gradient,
    init_state,
    mask_rows,
    masked_lm_sums,
    next_token_sums,
    state_shapes,
)

NARROW = replace(TABLES, model=replace(TABLES.model, ngram_rows=3000, ngram_width=8, ngram_layer=1))
KEY = jax.random.key(1)


def started(run):
    """A state whose tables are not zero."""
    state = init_state(run, jax.random.key(0))
    tables = state.params["encoder"]["ngrams"]
    for i, name in enumerate(run.model.ngram_keys):
        tables[name] = 0.1 * jax.random.normal(jax.random.key(i), tables[name].shape)
    return state


def read(run) -> dict[str, set[int]]:
    """The rows of each table that a step on `rows()` reads."""
    ids, segments = mask_rows(run, SPECIAL, rows(), KEY, INPUTS.mask_rate).ids, jnp.ones((8, 32), jnp.int32)
    return {name: set(np.asarray(at).ravel().tolist()) for name, at in table_rows(run.model, ids, segments).items()}


@pytest.mark.parametrize("next_token", [False, True])
def test_the_gradient_of_the_rows_is_that_of_the_tables(next_token):
    params = started(TABLES).params
    compute = jax.jit(lambda p: gradient(TABLES, SPECIAL, p, rows(), KEY, INPUTS, next_token))
    found, of_tables = split_tables(compute(params)[0])

    def loss(params):
        objective = next_token_sums if next_token else masked_lm_sums
        return objective(TABLES, SPECIAL, params, rows(), KEY, INPUTS)[0].loss

    wanted, wanted_tables = split_tables(jax.jit(jax.grad(loss))(params))
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=1e-4), found, wanted)
    for name, rows_read in of_tables.items():
        assert isinstance(rows_read, RowGradient)
        whole = spread(rows_read, jnp.zeros((40, 32)))
        np.testing.assert_allclose(whole, wanted_tables[name], atol=1e-4)
        assert np.abs(whole).max() > 1e-2


def test_one_micro_batch_and_an_accumulated_one_take_the_same_step_on_the_rows_that_were_read():
    steps, before, states = build_steps(NARROW, SPECIAL), started(NARROW).params["encoder"]["ngrams"], []
    for accumulate in (False, True):
        state = started(NARROW)
        if accumulate:
            total = steps.add_gradient(state.params, rows(), KEY, INPUTS, None)
            state, _ = steps.apply_gradient(state, total, INPUTS)
        else:
            state, _ = steps.train_step(state, rows(), KEY, INPUTS)
        states.append(state)
        for name, numbers in read(NARROW).items():
            moved = np.flatnonzero(np.any(np.asarray(state.params["encoder"]["ngrams"][name] != before[name]), axis=1))
            assert 50 < len(moved) < 300
            assert set(moved.tolist()) <= numbers
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *(s.params for s in states))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), *(s.opt_state.squares for s in states))


def test_the_average_takes_the_tables_as_they_are():
    state = started(TABLES)
    assert "around" not in state.average["encoder"]["ngrams"]
    whole = averaged_params(state.params, state.average)
    assert jax.tree.structure(whole) == jax.tree.structure(state.params)
    assert whole["encoder"]["ngrams"]["around"] is state.params["encoder"]["ngrams"]["around"]


def test_a_checkpoint_restores_tables_and_their_sums_to_the_bit(tmp_path):
    layout = Layout(TABLES)
    state, _ = build_steps(TABLES, SPECIAL, layout).train_step(started(TABLES), rows(), KEY, INPUTS)
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"configuration": "a"}, keep=2)
    checkpoints.save(1, state, 1.0, spent=1.0)
    checkpoints.wait()
    found = checkpoints.restore(state_shapes(TABLES, layout), print)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, found.state, state)
    assert jax.tree.structure(found.state) == jax.tree.structure(state)
    assert np.asarray(found.state.opt_state.squares["after"]).any()

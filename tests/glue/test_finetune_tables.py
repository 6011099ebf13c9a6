"""Fine-tuning of models with hashed tables: each run changes the rows that its batch reads."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.glue.batches import Batches, TokenBatch
from ufbert.glue.step import NGRAM_LR, Setting, _loss, finetune_steps, start_state
from ufbert.nn.ngrams import join_tables, split_tables
from ufbert.ops.row_updates import adagrad

CONFIG = ModelConfig(
    vocab_size=60, max_len=16, d_model=16, n_layers=1, n_heads=2, d_hidden=8, pooler_width=8, init_std=0.2, dropout=0.0,
    ngram_rows=500, ngram_keys=("after", "trigram"),
)  # fmt: skip
RUNS = 2


def test_an_update_is_adagrad_on_the_rows_that_each_run_reads():
    setting = Setting(config=CONFIG, tune=replace(FinetuneConfig(), dropout=0.0, clip_norm=0.0))
    rng = np.random.default_rng(0)
    params = {"encoder": nn.init(CONFIG, jax.random.key(0), ())["encoder"]}
    params["classifier"] = nn.init_classifier(CONFIG, jax.random.key(1), 2)
    for name in CONFIG.ngram_keys:
        params["encoder"]["ngrams"][name] = jnp.asarray(0.1 * rng.normal(size=(500, 16)), jnp.float32)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * RUNS), params)
    ids, ones = jnp.asarray(rng.integers(5, 60, (RUNS, 3, 8))), jnp.ones((RUNS, 3, 8), jnp.int32)
    labels = jnp.asarray(rng.integers(0, 2, (RUNS, 3)), jnp.float32)
    batch = Batches(TokenBatch(ids, ones, 0 * ones), labels, jnp.ones((RUNS, 3)), None)
    keys = jnp.stack([jax.random.key(5)] * RUNS)
    new, losses = finetune_steps(setting).update(
        start_state(stacked, setting.tune), batch, keys, np.int32(0), np.array([0.1, 0.2], np.float32)
    )
    for run, lr in enumerate((0.1, 0.2)):
        alone = jax.tree.map(lambda leaf, run=run: leaf[run], batch)
        key = jax.random.fold_in(keys[0], 0)
        loss, whole = jax.value_and_grad(_loss)(params, {}, setting, alone, key)
        np.testing.assert_allclose(losses[run], loss, rtol=1e-5)
        tables, of_tables = split_tables(params)[1], split_tables(whole)[1]
        for name, table in split_tables(new.params)[1].items():
            wanted, squares = adagrad(tables[name], jnp.zeros(500), of_tables[name], lr * NGRAM_LR)
            np.testing.assert_allclose(table[run], wanted, atol=1e-5)
            np.testing.assert_allclose(new.opt_state.squares[name][run], squares, rtol=1e-3)
            moved = np.any(np.asarray(table[run] != tables[name]), axis=1)
            assert 5 < moved.sum() <= 24
    assert jax.tree.structure(join_tables(*split_tables(new.params))) == jax.tree.structure(stacked)

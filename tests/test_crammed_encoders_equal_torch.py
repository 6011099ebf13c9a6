"""Equality with encoders written from scratch in PyTorch (`tests/golden/make_golden.py` made the numbers)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import gradients_close

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.hub.folder import flat_shapes, flatten, unflatten
from ufbert.hub.foreign import crammed
from ufbert.hub.layout import split_all, to_ours
from ufbert.ops.losses import cross_entropy

FOLDER = Path(__file__).parent / "golden"
CASES = [("tree_1x4", "masked"), ("tree_1x4", "gather"), ("tree_3x2", "masked"), ("tree_3x2", "gather")]
CASES += [("glu", "masked"), ("dense", "masked")]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_values_and_gradients_equal_pytorch(name, backend):
    golden = dict(np.load(FOLDER / f"{name}.npz"))
    d, heads, layers, vocab, max_len, trees, depth, hidden_width = golden["shape"].tolist()
    config = ModelConfig(
        vocab_size=vocab,
        max_len=max_len,
        d_model=d,
        n_layers=layers,
        n_heads=heads,
        feedforward=(name.split("_")[0],),
        d_hidden=hidden_width,
        n_trees=trees,
        tree_depth=depth,
        tree_backend=backend,
    )
    tensors = {k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")}
    for i in range(layers):
        tensors[f"encoder.layers.{i}.attn.self_attention.norm_factor"] = np.float32((d / heads) ** -0.5).reshape(())
    layout = crammed.layout(config, ("masked_lm",))
    flat = to_ours(layout, tensors, flat_shapes(config, ("masked_lm",), 0), name)
    params = jax.tree.map(jnp.asarray, unflatten(flat) | {"masked_lm": {}})
    ids, mask, labels = (jnp.asarray(golden[key], jnp.int32) for key in ("ids", "mask", "labels"))
    hidden, _ = jax.jit(nn.encode, static_argnames="config")(params, config, ids, mask)
    np.testing.assert_allclose(hidden, golden["hidden"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(nn.masked_lm_logits(params, config, hidden), golden["logits"], atol=1e-5, rtol=0)

    def loss_of(params):
        logits = nn.masked_lm_logits(params, config, nn.encode(params, config, ids)[0])
        sums = cross_entropy(logits, jnp.maximum(labels, 0), (labels >= 0).astype(jnp.float32))
        return sums.loss / sums.count

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(params)
    np.testing.assert_allclose(loss, golden["loss"], atol=1e-5, rtol=0)
    wanted = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    wanted, found = split_all(layout, wanted), flatten(grads)
    gradients_close(found, wanted)

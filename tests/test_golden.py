"""Equality with the reference implementations, where their tensors are at hand (`../shared/golden`)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.hub import crammed
from ufbert.hub.folder import flatten
from ufbert.ops.losses import cross_entropy

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
NAMES = ["ultrafastbert_1x5", "ultrafastbert_4x3", "crammed_bert_gelu", "crammed_bert_geglu"]
CASES = [
    (name, backend)
    for name in NAMES
    for backend in (["masked", "gather"] if name.startswith("ultra") else ["masked"])
    if (GOLDEN / name).is_dir()
]


def load_case(name: str, backend: str) -> tuple[ModelConfig, nn.Params, dict[str, np.ndarray]]:
    from dataclasses import replace

    arch = json.loads((GOLDEN / name / "config.json").read_text())["arch"]
    config = replace(crammed.model_config(arch), tree_backend=backend)
    params = crammed.to_params(load_file(GOLDEN / name / "model.safetensors"), config)
    params = jax.tree.map(jnp.asarray, params)
    return config, params, load_file(GOLDEN / name / "golden.safetensors")


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_values_and_gradients_equal_the_reference(name, backend):
    config, params, golden = load_case(name, backend)
    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    segments = jnp.asarray(golden["attention_mask"], jnp.int32)
    hidden, aux = nn.encode(params, config, ids, segments)
    assert aux == {}
    np.testing.assert_allclose(hidden, golden["hidden_masked"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(nn.masked_lm_logits(params, config, hidden), golden["logits_masked"], atol=1e-5, rtol=0)
    labels = jnp.asarray(golden["labels"], jnp.int32)
    weights = (labels >= 0).astype(jnp.float32)

    def loss_of(params):
        logits = nn.masked_lm_logits(params, config, nn.encode(params, config, ids)[0])
        sums = cross_entropy(logits, jnp.maximum(labels, 0), weights)
        return sums.loss / sums.count, logits

    (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    np.testing.assert_allclose(logits, golden["logits_nomask"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(loss, golden["mlm_loss_nomask"][0], atol=1e-5, rtol=0)
    wanted = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    wanted = flatten(crammed.to_params(wanted, config, gradients=True))
    found = flatten(grads)
    assert found.keys() == wanted.keys()
    for path, gradient in wanted.items():
        np.testing.assert_allclose(found[path], gradient, atol=1e-4 * np.abs(gradient).max(), rtol=0, err_msg=path)

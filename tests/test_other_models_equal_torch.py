"""Equality with models written from scratch in PyTorch (`tests/golden/make_other_golden.py` made the numbers)."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import gradients_close

from ufbert import nn
from ufbert.hub.convert import import_weights
from ufbert.hub.folder import flatten
from ufbert.hub.layout import split_all
from ufbert.hub.leaf_layer import from_state
from ufbert.ops import leaf_fff, switch
from ufbert.ops.dense import ACTIVATIONS
from ufbert.ops.losses import cross_entropy

FOLDER = Path(__file__).parent / "golden"
RELU = ACTIVATIONS["relu"]


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Everything else, parameters and gradients of a fixture."""
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    return arrays, *({k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)} for p in ("param.", "grad."))


@pytest.mark.parametrize("name", ["hf_bert", "hf_fnet", "hf_modernbert"])
def test_imported_encoders_equal_pytorch(name):
    golden, tensors, grads = load(name)
    weights = import_weights(tensors, json.loads(str(golden["config"])), name)
    assert weights.heads == ("masked_lm",)
    config, params = replace(weights.config, dropout=0.0), jax.tree.map(jnp.asarray, weights.params)
    ids, types, mask, labels = (jnp.asarray(golden[k], jnp.int32) for k in ("ids", "types", "mask", "labels"))

    def loss_of(params):
        logits = nn.masked_lm_logits(params, config, nn.encode(params, config, ids, mask, type_ids=types)[0])
        sums = cross_entropy(logits, jnp.maximum(labels, 0), (labels >= 0).astype(jnp.float32))
        return sums.loss / sums.count, logits

    (loss, logits), found = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    shown = np.ones(ids.shape, bool) if name == "hf_fnet" else np.asarray(mask, bool)
    np.testing.assert_allclose(np.asarray(logits)[shown], golden["logits"][shown], atol=1e-5, rtol=0)
    np.testing.assert_allclose(loss, golden["loss"], atol=1e-5, rtol=0)
    gradients_close(flatten(found), split_all(weights.format.layout(config, weights.heads), grads), zero=1e-7)


def test_an_imported_classifier_equals_pytorch():
    golden, tensors, grads = load("hf_bert_classifier")
    weights = import_weights(tensors, json.loads(str(golden["config"])), "classifier")
    assert (weights.heads, weights.labels) == (("classifier",), ("no", "maybe", "yes"))
    config, params = replace(weights.config, dropout=0.0), jax.tree.map(jnp.asarray, weights.params)
    ids, types, mask, labels = (jnp.asarray(golden[k], jnp.int32) for k in ("ids", "types", "mask", "labels"))

    def loss_of(params):
        hidden, _ = nn.encode(params, config, ids, mask, type_ids=types)
        logits = nn.classify(params, config, nn.pool(config, hidden, mask != 0))
        sums = cross_entropy(logits, labels, jnp.ones(len(ids)))
        return sums.loss / sums.count, logits

    (loss, logits), found = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(loss, golden["loss"], atol=1e-5, rtol=0)
    gradients_close(flatten(found), split_all(weights.format.layout(config, weights.heads), grads), zero=1e-7)


def test_switch_with_full_experts_equals_pytorch():
    golden, w, grads = load("switch")
    limit = 6
    assert golden["taken"].max() > limit

    def run(w, x):
        routing = switch.route(x, w["router"])
        y, kept = switch.switch_with_capacity(x, routing, w["w_in"], w["w_out"], RELU, limit)
        return jnp.mean(y**2) + routing.balance_loss + routing.z_loss, (y, kept, routing)

    x = jnp.asarray(golden["x"])
    (_, (y, kept, routing)), (found, dx) = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(w, x)
    np.testing.assert_allclose(y, golden["y"], atol=1e-5)
    assert int((~kept).sum()) == np.maximum(golden["taken"] - limit, 0).sum()
    np.testing.assert_allclose(routing.balance_loss, golden["balance"], rtol=1e-5)
    np.testing.assert_allclose(routing.z_loss, golden["z"], rtol=1e-5)
    gradients_close(found | {"x": dx}, grads)


def test_the_leaf_tree_equals_pytorch():
    golden, state, grads = load("leaf_tree")
    tree, x = from_state(state, "state"), jnp.asarray(golden["x"])

    def run(tree):
        shares = leaf_fff.right_shares(x, tree)
        y, entropy = leaf_fff.mixture(x, tree, leaf_fff.leaf_weights(shares), RELU), leaf_fff.node_entropies(shares)
        return jnp.mean(y**2) + 0.3 * jnp.mean(entropy), (y, entropy)

    (loss, (y, entropy)), found = jax.jit(jax.value_and_grad(run, has_aux=True))(tree)
    np.testing.assert_allclose(loss, golden["loss"], atol=1e-5)
    np.testing.assert_allclose(y, golden["soft"], atol=1e-5)
    np.testing.assert_allclose(entropy, golden["entropy"], atol=1e-5)
    np.testing.assert_allclose(leaf_fff.descend(x, tree, RELU)[0], golden["hard"], atol=1e-5)
    found = dict(zip(("node_weights", "node_biases", "w1s", "b1s", "w2s", "b2s"), found, strict=True))
    gradients_close(found, grads | {"node_biases": grads["node_biases"].reshape(-1)})

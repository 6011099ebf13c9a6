"""Equality with the reference implementations, where their tensors are at hand (`../shared/golden`)."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import gradients_close
from safetensors.numpy import load_file

from ufbert import nn
from ufbert.hub.convert import Weights, import_weights
from ufbert.hub.folder import flatten
from ufbert.hub.layout import split_all
from ufbert.hub.leaf_layer import from_state
from ufbert.ops import leaf_fff, switch
from ufbert.ops.dense import ACTIVATIONS, gelu
from ufbert.ops.losses import cross_entropy

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason="the references' own tensors are not part of this project; test_crammed_encoders_equal_torch.py and "
    "test_other_models_equal_torch.py hold the same promises, layer by layer, with fixtures of our own, and never skip",
)
TREES = ["ultrafastbert_1x5", "ultrafastbert_4x3"]
ENCODERS = [*TREES, "crammed_bert_gelu", "crammed_bert_geglu", "hf_bert", "hf_fnet", "hf_modernbert"]
CASES = [(name, backend) for name in ENCODERS for backend in (["masked", "gather"] if name in TREES else ["masked"])]


def load_case(name: str, backend: str = "masked") -> tuple[Weights, dict[str, np.ndarray]]:
    """A golden folder as a user's import sees it, and its golden tensors."""
    values = json.loads((GOLDEN / name / "config.json").read_text())
    weights = import_weights(load_file(GOLDEN / name / "model.safetensors"), values, name)
    config = replace(weights.config, tree_backend=backend, dropout=0.0)
    params = jax.tree.map(jnp.asarray, weights.params)
    return weights._replace(config=config, params=params), load_file(GOLDEN / name / "golden.safetensors")


encode = jax.jit(nn.encode, static_argnames="config")


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_values_and_gradients_equal_the_reference(name, backend):
    (form, config, heads, params, *_), golden = load_case(name, backend)
    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    types = jnp.asarray(golden.get("token_type_ids", np.zeros_like(ids)), jnp.int32)
    real = jnp.asarray(golden["attention_mask"], jnp.int32) if "attention_mask" in golden else None
    crammed = "hidden_masked" in golden
    hidden, aux = encode(params, config, ids, real, type_ids=types)
    assert not jax.tree.leaves(aux)
    shown = (
        np.ones(ids.shape, bool) if real is None or crammed else np.asarray(real, bool)
    )  # padding is nobody's answer
    last = hidden
    if name == "hf_modernbert":  # its list of hidden states ends before the final norm
        encoder = {part: value for part, value in params["encoder"].items() if part != "final_norm"}
        last, _ = encode({"encoder": encoder}, replace(config, final_norm=False), ids, real)
    close(np.asarray(last)[shown], golden["hidden_masked" if crammed else "hidden_last"][shown])
    logits = nn.masked_lm_logits(params, config, hidden)
    close(np.asarray(logits)[shown], golden["logits_masked" if crammed else "logits"][shown])
    labels = jnp.asarray(golden["labels"], jnp.int32)
    weights = (labels >= 0).astype(jnp.float32)
    seen = None if crammed else real

    def loss_of(params):
        logits = nn.masked_lm_logits(params, config, nn.encode(params, config, ids, seen, type_ids=types)[0])
        sums = cross_entropy(logits, jnp.maximum(labels, 0), weights)
        return sums.loss / sums.count, logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    if crammed:
        close(logits, golden["logits_nomask"])
    close(loss, golden["mlm_loss_nomask" if crammed else "loss"][0])
    layout = form.layout(config, tuple(head for head in heads if head != "pooler"))
    theirs = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    wanted, found = split_all(layout, theirs), flatten({k: v for k, v in grads.items() if k != "pooler"})
    gradients_close(found, wanted, zero=1e-8)


def test_a_classifier_equals_the_reference():
    (_, config, heads, params, labels, *_), golden = load_case("hf_bert_classifier")
    assert (heads, labels) == (("classifier",), ("LABEL_0", "LABEL_1", "LABEL_2"))
    ids, real, types = (
        jnp.asarray(golden[name], jnp.int32) for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    hidden, _ = nn.encode(params, config, ids, real, type_ids=types)
    logits = nn.classify(params, config, nn.pool(config, hidden))
    close(logits, golden["logits"])
    sums = cross_entropy(logits, jnp.asarray(golden["labels"], jnp.int32), jnp.ones(len(ids)))
    close(sums.loss / sums.count, golden["loss"][0])


def test_the_switch_layer_equals_the_reference():
    """There a row of the batch is a group of its own, with room for 9 tokens an expert, which suffices for all of them."""
    w, golden = (load_file(GOLDEN / "hf_switch_layer" / f"{name}.safetensors") for name in ("model", "golden"))
    settings = json.loads((GOLDEN / "hf_switch_layer" / "config.json").read_text())
    experts = range(settings["num_experts"])
    router = jnp.asarray(w["router.classifier.weight"].T)
    w_in, w_out = (jnp.stack([w[f"experts.expert_{e}.{part}.weight"].T for e in experts]) for part in ("wi", "wo"))

    def one(x):
        routing = switch.route(x, router)
        limit = settings["expert_capacity"]
        return routing, *switch.switch_with_capacity(x, routing, w_in, w_out, ACTIVATIONS["relu"], limit)

    routing, y, kept = jax.vmap(one)(jnp.asarray(golden["x"]))
    close(y, golden["y"])
    assert bool(kept.all())
    np.testing.assert_array_equal(routing.expert, golden["expert_index"])
    logits = np.asarray(golden["router_logits"])
    close(jax.nn.softmax(logits, axis=-1), routing.probability)
    close(routing.balance_loss.mean(), golden["load_balancing_loss"][0])
    close(routing.z_loss.mean(), golden["z_loss"][0])


def test_the_original_layer_equals_the_reference():
    state, golden = (load_file(GOLDEN / "original_fff" / f"{name}.safetensors") for name in ("model", "golden"))
    tree, x = from_state(state, "state"), jnp.asarray(golden["x"])

    def soft(tree, x):
        shares = leaf_fff.right_shares(x, tree)
        weights = leaf_fff.leaf_weights(shares)
        return leaf_fff.mixture(x, tree, weights, gelu), leaf_fff.node_entropies(shares), weights

    def loss_of(tree):
        y, entropies, _ = soft(tree, x)
        return jnp.mean(jnp.square(y)) + 0.3 * jnp.mean(entropies)

    y, entropies, weights = soft(tree, x)
    close(y, golden["y_soft"])
    close(entropies, golden["node_entropies"])
    np.testing.assert_allclose(leaf_fff.soft_usage(weights), golden["leaf_usage_soft"], rtol=1e-5)
    close(leaf_fff.descend(x, tree, gelu)[0], golden["y_hard_with_output_bias"])
    swapped = leaf_fff.leaf_weights(leaf_fff.leak_regions(leaf_fff.right_shares(x, tree), 1.0, jax.random.key(0)))
    close(leaf_fff.mixture(x, tree, swapped, gelu), golden["y_soft_leak1"])
    loss, grads = jax.jit(jax.value_and_grad(loss_of))(tree)
    close(loss, golden["loss_soft"][0])
    names = {"node_w": "node_weights", "node_b": "node_biases"}
    names |= {"w_in": "w1s", "b_in": "b1s", "w_out": "w2s", "b_out": "b2s"}
    for ours, theirs in names.items():
        wanted = golden[f"grad.{theirs}"].reshape(getattr(grads, ours).shape)
        np.testing.assert_allclose(getattr(grads, ours), wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)

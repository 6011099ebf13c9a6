"""Structured pruning: what is cut out answers as what was masked, everywhere, and the wrong is refused in a sentence."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert import nn
from ufbert.compress.parts import by_magnitude, head_groups, keep_best, masks_of, neuron_groups, without
from ufbert.compress.tune import masked
from ufbert.cost.flops import forward_flops_per_token
from ufbert.data.encode import Encoded
from ufbert.hub.folder import ModelFolder, load_model, save_model
from ufbert.inference.engine import Engine

IDS = jnp.asarray(np.random.default_rng(0).integers(5, 60, (3, 40)))


def hidden(model: ModelFolder) -> np.ndarray:
    return np.asarray(nn.encode(model.params, model.config, IDS[:, : model.config.only_len or 16])[0])


def pruned(model: ModelFolder, free: bool = False) -> tuple[ModelFolder, ModelFolder]:
    """The model without a third of its neurons and one of its heads, and the masked model."""
    heads = [group for group in head_groups(model.config) if group.count > 1]
    groups = [*heads, *neuron_groups(model.config)]
    counts = {g.out: g.count - 1 if g.kind == "attention" else round(2 / 3 * g.count) for g in groups}
    scores = by_magnitude(model.params, groups)
    kept = {}
    for some in (heads, groups[len(heads) :]):
        kept |= keep_best(scores, some, counts, free=free) if some else {}
    params, config = without(model.params, model.config, kept, groups)
    return replace(model, params=params, config=config), replace(
        model, params=masked(model.params, masks_of(kept, groups))
    )


@pytest.mark.parametrize("name", ["crammed", "bert", "leaf tree", "routed trees", "switch", "rotary", "hybrid"])
def test_a_pruned_model_answers_as_the_masked_one(numbered, name):
    small, reference = pruned(numbered(name, n_heads=4))
    assert sum(leaf.size for leaf in jax.tree.leaves(small.params)) < sum(
        leaf.size for leaf in jax.tree.leaves(reference.params)
    )
    np.testing.assert_allclose(hidden(small), hidden(reference), atol=1e-5)
    use = {"masked_trees": False, "training": False}
    assert forward_flops_per_token(small.config, 16, **use) < forward_flops_per_token(reference.config, 16, **use)


def test_layers_that_compete_end_up_unequal_and_travel_everywhere(numbered, tmp_path):
    model = numbered("crammed", "masked_lm", n_heads=4, n_layers=3)
    params = dict(model.params)
    params["encoder"] = {**params["encoder"], "layer_01": jax.tree.map(lambda x: x, params["encoder"]["layer_01"])}
    feed = params["encoder"]["layer_01"]["glu"]
    feed["out"] = {"kernel": feed["out"]["kernel"].at[:12].multiply(20.0)}
    small, reference = pruned(replace(model, params=params), free=True)
    config = small.config
    assert len(set(config.layer_hidden)) > 1
    assert sum(config.layer_hidden) == 3 * 16
    assert f"{min(config.layer_hidden)} to {max(config.layer_hidden)} hidden neurons" in config.architecture()
    np.testing.assert_allclose(hidden(small), hidden(reference), atol=1e-5)
    save_model(tmp_path / "small", small)
    loaded = load_model(tmp_path / "small")
    assert loaded.config == config
    rows = Encoded(IDS[:, :16].tolist(), [[0] * 16] * 3, 48, 0, 0, 0)
    for dtype, tolerance in (("float32", 1e-4), ("int8", 0.5)):
        found = np.stack(Engine(loaded, dtype).hidden(rows))
        np.testing.assert_allclose(found, hidden(reference), atol=tolerance)
    fresh = nn.init(config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, dict(loaded.params))

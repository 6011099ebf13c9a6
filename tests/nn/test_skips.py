"""U-net skips, value embeddings, the decoder that is not tied and the start of the last norm, against plain arithmetic."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert import nn
from ufbert.config import ModelConfig, PretrainConfig, RunConfig
from ufbert.config.presets import load_preset, scaled
from ufbert.cost.flops import forward_flops_per_token
from ufbert.data.tokenizer import SpecialIds
from ufbert.errors import UserError
from ufbert.pretrain.step import StepInputs, build_steps, init_state

SMALL = ModelConfig(
    vocab_size=60, max_len=16, d_model=32, n_layers=2, n_heads=2, d_hidden=24, init_std=0.2, dropout=0.0
)
IDS = jnp.asarray(np.random.default_rng(0).integers(5, 60, (3, 16)), jnp.int32)
encode = jax.jit(nn.encode, static_argnames="config")


def hidden(config, params, ids=IDS):
    return np.asarray(encode(params, config, ids)[0])


def cut(params, layers, **others):
    """The parameters of an encoder of these layers alone, without what lies above them."""
    encoder = {f"layer_{i:02d}": params["encoder"][f"layer_{layer:02d}"] for i, layer in enumerate(layers)}
    return {"encoder": {"embeddings": params["encoder"]["embeddings"], **encoder, **others}}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("n_layers", [2, 3])
def test_the_top_layer_gets_the_output_of_the_bottom_layer_times_its_scale(norm, n_layers):
    config = replace(SMALL, n_layers=n_layers, unet_skips=True, norm=norm, final_norm=False)
    params = nn.init(config, jax.random.key(0))
    assert params["encoder"]["skip_scales"].tolist() == [1.0]  # a middle layer has none
    params["encoder"]["skip_scales"] = jnp.array([0.5])
    plain = replace(config, unet_skips=False)
    bottom = hidden(replace(plain, n_layers=1), cut(params, [0]))
    below = hidden(replace(plain, n_layers=n_layers - 1), cut(params, range(n_layers - 1)))
    # The embeddings of a model of the top layer alone are the sums themselves, a row for each token of the batch.
    sums = (below + 0.5 * bottom).reshape(-1, 32)
    top = replace(plain, n_layers=1, vocab_size=len(sums), embedding_norm=False, pad_id=len(sums) - 1)
    ours = cut(params, [n_layers - 1])
    ours["encoder"]["embeddings"] = {"tokens": jnp.asarray(sums), "position_scale": jnp.zeros(1)}
    wanted = hidden(top, ours, jnp.arange(len(sums)).reshape(IDS.shape))
    np.testing.assert_allclose(hidden(config, params), wanted, atol=1e-5)


def test_skips_pair_the_layers_from_outside_in():
    five = replace(SMALL, n_layers=5, unet_skips=True, value_embeddings=2)
    assert five.skips == (None, None, None, 1, 0)
    assert replace(five, n_layers=4).skips == (None, None, 1, 0)
    assert five.value_tables == (0, 1, None, 1, 0)
    assert replace(five, value_embeddings=3).value_tables == (0, 1, 2, 1, 0)
    shapes = nn.shapes(five)["encoder"]
    assert shapes["skip_scales"].shape == (2,)
    assert shapes["value_embeddings"]["tables"].shape == (2, 60, 32)
    assert shapes["value_embeddings"]["scales"].shape == (4,)
    plain = replace(five, unet_skips=False, value_embeddings=0)
    flops = [forward_flops_per_token(config, 16, masked_trees=False) for config in (plain, five)]
    assert flops[1] - flops[0] == 2 * 32 * (2 + 4)
    assert nn.count_params(five) - nn.count_params(plain) == 2 * 60 * 32 + 2 + 4


def test_value_embeddings_are_added_to_the_values_of_the_layers_from_outside_in():
    """A table whose rows are alike is a bias of the values."""
    config = replace(SMALL, n_layers=3, value_embeddings=1, use_bias=True)
    params = nn.init(config, jax.random.key(0))
    start = params["encoder"]["value_embeddings"]
    assert start["scales"].tolist() == [pytest.approx(32**0.5 / 2)] * 2
    row = jax.random.normal(jax.random.key(1), (32,))
    params["encoder"]["value_embeddings"] = {"tables": jnp.tile(row, (1, 60, 1)), "scales": jnp.array([0.3, -2.0])}
    biased = jax.tree.map(lambda leaf: leaf, params)
    for layer, scale in (("layer_00", 0.3), ("layer_02", -2.0)):
        biased["encoder"][layer]["attention"]["value"]["bias"] = scale * row
    found = hidden(config, params)
    np.testing.assert_allclose(found, hidden(replace(config, value_embeddings=0), biased), atol=1e-5)
    other = params["encoder"]["value_embeddings"]["tables"].at[0, IDS[0, 3]].add(1.0)
    params["encoder"]["value_embeddings"]["tables"] = other  # of one token, which other rows may lack
    moved = np.abs(hidden(config, params) - found).max(axis=(1, 2)) > 1e-4
    assert moved.tolist() == (IDS[0, 3] == IDS).any(axis=1).tolist()


def test_a_scale_has_as_many_tables_as_its_layers_have_places_for():
    preset = load_preset("crammed_bert")
    preset = replace(preset, model=replace(preset.model, unet_skips=True, value_embeddings=8))
    assert [scaled(preset, scale).model.value_embeddings for scale in ("tiny", "mini", "base")] == [1, 2, 8]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"unet_skips": True, "n_layers": 1},
            "model.unet_skips go from lower to upper layers, and model.n_layers is 1",
        ),
        ({"value_embeddings": 2}, "model.value_embeddings 2 are too many for model.n_layers 2"),
        ({"value_embeddings": 1, "mixer": ("attention", "fourier")}, "and layer 1 has the mixer 'fourier'"),
        ({"value_embeddings": 1, "n_layers": 3, "mixer": ("attention", "fourier")}, ""),
    ],
)
def test_what_the_layers_have_no_place_for_is_a_sentence(changes, words):
    if words:
        with pytest.raises(UserError, match=words):
            replace(SMALL, **changes)
    else:
        assert replace(SMALL, **changes).value_tables == (0, None, 0)  # the middle layer may mix as it likes


SPECIAL = SpecialIds(0, 1, 2, 3, 4)
MINI = replace(SMALL, vocab_size=3000, max_len=32, d_model=256, init_std=1 / 16, zero_init_out=True, positions="rotary")
"""As wide as `mini`, and started as the modern recipe starts it."""


def heldout_losses(model: ModelConfig, steps: int = 0) -> list[float]:
    """Held-out losses on random rows, in nats: at the start, and after so many updates on the same rows."""
    run = RunConfig(model, PretrainConfig(batch_rows=8, micro_rows=8), replace(RunConfig().data, seq_len=32))
    rows = jnp.asarray(np.random.default_rng(1).integers(5, model.vocab_size, (8, 32)), jnp.int32).at[:, 0].set(2)
    compiled, state = build_steps(run, SPECIAL), init_state(run, jax.random.key(0))
    inputs = StepInputs(jnp.float32(1e-2), jnp.float32(0.5), jnp.float32(0.25), jnp.int32(8))
    losses = [compiled.heldout_sums(state.params, rows, jax.random.key(2))[0]]
    for i in range(steps):
        state, _ = compiled.train_step(state, rows, jax.random.key(i), inputs)
    losses.append(compiled.heldout_sums(state.params, rows, jax.random.key(2))[0])
    return [float(sums.loss / sums.count) for sums in losses]


def test_a_small_start_of_the_last_norm_begins_at_the_loss_of_knowing_nothing():
    log_v, mended = np.log(3000), replace(MINI, final_norm_start=1 / 16)
    assert heldout_losses(MINI)[0] > log_v + 3  # the masked token's own row is what a block of zeros leaves
    assert abs(heldout_losses(mended)[0] - log_v) < 0.2
    params = nn.init(mended, jax.random.key(0))["encoder"]
    np.testing.assert_allclose(params["final_norm"]["scale"], 1 / 16, rtol=1e-6)
    assert params["layer_00"]["mixer_norm"]["scale"].tolist() == [1.0] * 256


def test_a_decoder_of_its_own_starts_at_the_loss_of_knowing_nothing_and_learns():
    untied = replace(SMALL, max_len=32, tie_head=False)
    assert nn.shapes(untied)["masked_lm"]["decoder"].shape == (60, 32)
    assert nn.count_params(untied) - nn.count_params(SMALL) == 60 * 32
    before, after = heldout_losses(untied, steps=8)
    assert before == pytest.approx(np.log(60), abs=1e-5)
    assert after < before - 0.1

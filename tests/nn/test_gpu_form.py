"""A training step in its form for GPUs is the step of a CPU, and lowers for CUDA."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.config.presets import load_preset
from ufbert.data.tokenizer import SpecialIds
from ufbert.nn.layers import gpu_kernels
from ufbert.ops import gpu
from ufbert.ops.gpu import tiles
from ufbert.pretrain.step import StepInputs, build_steps, init_state

SPECIAL = SpecialIds(pad=0, unk=1, cls=2, sep=3, mask=4)


def run_of(preset, dtype="float32", **model):
    run = load_preset(preset)
    sizes = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_hidden": 128, "vocab_size": 512}
    return replace(run, model=replace(run.model, dtype=dtype, **(sizes | model)))


def gradients(run):
    """Gradient and sums of a batch, the metrics of an update with them, and the sums after it."""
    state, steps = init_state(run, jax.random.key(0)), build_steps(run, SPECIAL)
    rows = np.random.default_rng(0).integers(5, 512, (8, 32)).astype(np.int32)
    rows[:, 0] = rows[:, 11] = 2
    inputs = StepInputs(jnp.float32(1e-3), jnp.float32(0.5), jnp.float32(0.25), jnp.int32(8))
    total = steps.add_gradient(state.params, rows, jax.random.key(0), inputs, None)
    state, metrics = steps.apply_gradient(state, total, inputs)
    after = steps.add_gradient(state.params, rows, jax.random.key(0), inputs, None)[1]
    nothing = jax.tree.map(lambda g: g * jnp.nan, total[0])
    kept, skipped = steps.apply_gradient(jax.tree.map(jnp.copy, state), (nothing, total[1]), inputs)
    assert not skipped.applied
    jax.tree.map(np.testing.assert_array_equal, (kept.params, kept.opt_state), (state.params, state.opt_state))
    return total, (metrics, after)


@pytest.mark.parametrize(
    ("preset", "model"),
    [
        ("crammed_bert", {}),
        ("crammed_rope", {"value_embeddings": 1, "unet_skips": True, "qk_norm": True}),
        ("bert_base", {}),  # norms after the sums, biases, a head of its own
    ],
)
def test_the_form_for_gpus_computes_what_the_form_for_cpus_does(preset, model, monkeypatch):
    run = run_of(preset, **model)
    (gradient, sums), numbers = gradients(run)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (gpu_gradient, gpu_sums), gpu_numbers = gradients(run)
    near = partial(np.testing.assert_allclose, rtol=2e-5)
    jax.tree.map(near, (gpu_sums, gpu_numbers), (sums, numbers))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6 * largest), gpu_gradient, gradient)


def test_kernels_are_for_one_gpu_that_takes_them(monkeypatch, capsys):
    assert gpu_kernels() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert gpu_kernels() is gpu
    for capability, why in (
        ("7.5", "they need compute capability 8.0"),
        ("gfx90a", "could not convert string to float"),
    ):
        gpu.can_run.cache_clear()
        monkeypatch.setattr(
            jax, "devices", lambda capability=capability: [SimpleNamespace(compute_capability=capability)]
        )
        assert gpu_kernels() is None
        assert gpu_kernels() is None
        assert capsys.readouterr().err.count(why) == 1
    gpu.can_run.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert gpu_kernels() is None


def test_the_form_for_gpus_lowers_for_cuda_with_its_kernels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    monkeypatch.setattr(gpu, "can_run", lambda: True)
    run = run_of("crammed_bert", "bfloat16")
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(lambda key: init_state(run, key), key)
    number, count = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    rows = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    card = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card)):
        traced = build_steps(run, SPECIAL).train_step.trace(state, rows, key, StepInputs(number, number, number, count))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") >= 8  # attention, norm, gates, each forward and backward, and the loss
    assert "tf.aliasing_output" in text or "jax.buffer_donor" in text
    t = rows.shape[1]
    assert f"4x{t}x{t}xf32" not in text  # no scores of all heads in memory

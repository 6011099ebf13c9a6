"""The kernels for GPUs compute what XLA does, values and gradients: interpreted on a CPU, and on a GPU where there is one."""

import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.bench.training.kernels import Kernel, kind_of
from ufbert.ops import mixing
from ufbert.ops.dense import gelu
from ufbert.ops.gpu import attention, gates, loss, norm
from ufbert.ops.losses import cross_entropy

ON_GPU = jax.default_backend() == "gpu"
NEAR = {"rtol": 1e-2, "atol": 1e-2} if ON_GPU else {"rtol": 2e-5, "atol": 2e-5}  # products on a GPU are in TF32 at best


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(kernel, plain, args, out_seed=9):
    """The values and the gradients of two functions agree at `args`."""
    ours, our_gradient = jax.vjp(kernel, *args)
    theirs, their_gradient = jax.vjp(plain, *args)
    weights = jax.tree.map(lambda y: normal(out_seed, *y.shape, dtype=y.dtype), theirs)
    for mine, other in zip(
        jax.tree.leaves((ours, our_gradient(weights))), jax.tree.leaves((theirs, their_gradient(weights))), strict=True
    ):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(other), **NEAR)


def plain_attention(qkv, segments, causal):
    b, t = qkv.shape[:2]
    mask = None if segments is None else mixing.attention_mask(segments)
    if causal:
        mask = mixing.causal_mask(b, t) if mask is None else mask & mixing.causal_mask(b, t)
    return mixing.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 2, 16), (2, 64, 1, 32)])
def test_attention_is_that_of_xla(shape, segmented, causal):
    b, t, h, k = shape
    # Documents of odd lengths, padding, and a row of padding alone, whose queries see nothing.
    segments = np.sort(np.random.default_rng(0).integers(0, 4, (b, t)))[:, ::-1].copy()
    segments[0] = 0
    segments = jnp.asarray(segments, jnp.int32) if segmented else None
    assert attention.fits(t, k, jnp.dtype(jnp.float32))
    assert_same(
        lambda qkv: attention.attention(qkv, segments, causal),
        lambda qkv: plain_attention(qkv, segments, causal),
        (normal(1, b, t, 3, h, k),),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_packed_row_equals_its_parts(dtype):
    cuts = [0, 37, 38, 100, 128]
    qkv = normal(2, 1, 128, 3, 2, 64, dtype=dtype)
    segments = jnp.asarray(np.repeat([1, 2, 3, 4], np.diff(cuts))[None], jnp.int32)
    packed, gradient = jax.vjp(lambda qkv: attention.attention(qkv, segments), qkv)
    dy = normal(3, *packed.shape, dtype=dtype)
    (of_packed,) = gradient(dy)
    for start, end in pairwise(cuts):
        n = end - start
        alone = jnp.zeros_like(qkv).at[:, :n].set(qkv[:, start:end])
        own = jnp.zeros((1, 128), jnp.int32).at[:, :n].set(1)
        part, gradient = jax.vjp(lambda qkv, own=own: attention.attention(qkv, own), alone)
        (of_part,) = gradient(jnp.zeros_like(dy).at[:, :n].set(dy[:, start:end]))
        near = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 and not ON_GPU else {"rtol": 2e-2, "atol": 2e-2}
        for whole, piece in ((packed, part), (of_packed, of_part)):
            np.testing.assert_allclose(
                np.asarray(whole[:, start:end], np.float32), np.asarray(piece[:, :n], np.float32), **near
            )


@pytest.mark.parametrize("d", [48, 96, 256])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_sum_and_its_norm_are_those_of_xla(d, biased, added, keep):
    rows = 256
    assert norm.fits(rows, d)
    x, y = normal(0, rows, d), normal(1, rows, d) if added else None
    scale, bias = 1 + normal(2, d), normal(3, d) if biased else None

    def plain(x, y, scale, bias):
        total = x if y is None else x + y
        off = total - total.mean(axis=-1, keepdims=True)
        normed = off * jax.lax.rsqrt(jnp.square(off).mean(axis=-1, keepdims=True) + 1e-5) * scale[None]
        return total if keep else None, normed if bias is None else normed + bias[None]

    kernel = partial(norm.add_and_norm, epsilon=1e-5, dtype=jnp.float32, keep=keep)
    assert_same(lambda *args: kernel(*args), plain, (x, y, scale, bias))


def test_a_norm_in_bfloat16_of_a_float32_stream_keeps_the_stream_exact():
    x, y, scale = normal(0, 64, 96), normal(1, 64, 96, dtype=jnp.bfloat16), jnp.ones(96)
    (total, normed), gradient = jax.vjp(
        lambda x, y: norm.add_and_norm(x, y, scale, None, 1e-5, jnp.dtype(jnp.bfloat16)), x, y
    )
    np.testing.assert_array_equal(total, x + y.astype(jnp.float32))
    assert (total.dtype, normed.dtype) == (jnp.float32, jnp.bfloat16)
    dx, dy = gradient((normal(2, 64, 96), normal(3, 64, 96, dtype=jnp.bfloat16)))
    assert (dx.dtype, dy.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(dx.astype(jnp.bfloat16), dy)


@pytest.mark.parametrize("f", [48, 512])
def test_a_gated_gelu_is_that_of_xla(f):
    assert gates.fits(256, f)
    assert_same(gates.gated_gelu, lambda x: gelu(x[:, 0]) * x[:, 1], (2 * normal(0, 256, 2, f),))


def test_the_share_of_the_normal_distribution_is_exact_to_float32():
    x = jnp.linspace(-12, 12, 20001)
    share, density = gates.normal_share(x)
    np.testing.assert_allclose(share, jax.scipy.stats.norm.cdf(x), atol=2e-7)
    np.testing.assert_allclose(density, jax.scipy.stats.norm.pdf(x), atol=1e-7)


@pytest.mark.parametrize("v", [768, 8192])
def test_the_loss_of_tokens_is_that_of_xla(v):
    assert loss.fits(v)
    n = 7
    x, embedding = normal(0, n, 8), normal(1, v, 8)
    labels = jnp.asarray(np.random.default_rng(2).integers(0, v, n), jnp.int32)
    labels = labels.at[0].set(jnp.argmax(embedding @ x[0]))  # a hit
    weights = jnp.asarray([1, 1, 0, 1, 1, 0, 1], jnp.float32)

    def plain(x, embedding):
        sums = cross_entropy(x @ embedding.T, labels, weights)
        return sums.loss, sums.correct

    def kernel(x, embedding):
        return loss.token_loss(x, embedding, labels, weights)

    assert float(kernel(x, embedding)[1]) >= 1.0
    assert_same(lambda *args: kernel(*args)[0], lambda *args: plain(*args)[0], (x, embedding))
    np.testing.assert_array_equal(kernel(x, embedding)[1], plain(x, embedding)[1])
    np.testing.assert_array_equal(kernel(0 * x, embedding)[1], 0.0)  # all logits are equal


def test_sizes_that_do_not_fit_are_known():
    half = jnp.dtype(jnp.bfloat16)
    assert attention.fits(128, 64, half)
    assert not attention.fits(100, 64, half)
    assert not attention.fits(256, 64, half)
    assert not attention.fits(128, 96, half)
    assert not attention.fits(128, 64, jnp.dtype(jnp.float32))  # it would need more shared memory than some GPUs have
    assert not norm.fits(16, 7 * 128)
    assert not norm.fits(0, 768)
    assert not norm.fits(3, 768)
    assert not gates.fits(128, 100)
    assert not loss.fits(30522)


def test_kernels_work_for_several_runs_at_once():
    """Fine-tuning trains several runs by vmap."""

    def everything(seed):
        qkv = normal(0, 2, 16, 3, 1, 16) * seed
        segments = jnp.ones((2, 16), jnp.int32)
        scale = jnp.ones(64) * seed
        x = norm.add_and_norm(normal(1, 64, 64) * seed, normal(2, 64, 64), scale, scale, 1e-5, jnp.dtype(jnp.float32))[
            1
        ]
        hidden = gates.gated_gelu(normal(3, 256, 2, 16) * seed)
        labels, weights = jnp.arange(4, dtype=jnp.int32), jnp.ones(4)
        nats = loss.token_loss(normal(4, 4, 8) * seed, normal(5, 256, 8), labels, weights)[0]
        return attention.attention(qkv, segments).sum() + (x * x).sum() + hidden.sum() + nats

    seeds = jnp.asarray([1.0, 1.5])
    together = jax.vmap(jax.value_and_grad(everything))(seeds)
    for i, seed in enumerate(seeds):
        alone = jax.value_and_grad(everything)(seed)
        np.testing.assert_allclose([part[i] for part in together], alone, rtol=1e-4)


def test_a_profile_knows_our_kernels_by_their_names():
    """A captured graph of launches says no more of a kernel than its name."""
    half = jnp.dtype(jnp.bfloat16)

    def everything(qkv, hidden, x, scale, embedding):
        labels, weights = jnp.zeros(len(x), jnp.int32), jnp.ones(len(x))
        mixed = attention.attention(qkv, jnp.ones(qkv.shape[:2], jnp.int32), False).astype(jnp.float32).sum()
        gated = gates.gated_gelu(hidden).astype(jnp.float32).sum()
        normed = norm.add_and_norm(x, x, scale, scale, 1e-5, half)[1]
        return mixed + gated + loss.token_loss(normed, embedding, labels, weights)[0]

    shapes = [
        ((2, 64, 3, 1, 64), half),
        ((256, 2, 512), half),
        ((256, 128), half),
        ((128,), jnp.float32),
        ((256, 128), half),
    ]
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    step = str(jax.make_jaxpr(jax.grad(everything, argnums=(0, 1, 2, 3, 4)))(*args))
    names = re.findall(r"name=(\w+)\s+out_avals=", step)  # of each call of a kernel, as Pallas hands it to the compiler
    assert {name: kind_of(Kernel(name, "", 1.0), None) for name in names} == {
        "attention_forward": "attention",
        "attention_backward": "attention",
        "gate_forward": "feedforward",
        "gate_backward": "feedforward",
        "norm_forward": "norms and sums",
        "norm_backward": "norms and sums",
        "token_loss": "embedding and loss",
    }

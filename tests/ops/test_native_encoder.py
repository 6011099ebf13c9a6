"""The native kernels of linear layers, attention and LayerNorm, against float64 and the functions of jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.ops import native
from ufbert.ops.mixing import attention, attention_mask
from ufbert.ops.native import build

try:
    build.compiler()
except build.CannotBuild as error:
    pytest.skip(f"{error}; the engine computes with jax then, which test_engine.py tests", allow_module_level=True)

WIDTHS = [
    (1, 1, 1),
    (3, 5, 2),
    (6, 64, 64),
    (7, 33, 65),
    (100, 300, 70),
    (0, 4, 4),
    (13, 1, 200),
    (257, 96, 31),
    (20, 515, 16),
]
"""b, d, f."""


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def rounded(x: np.ndarray, axis: int) -> np.ndarray:
    """To 255 even steps between minus and plus the largest, along an axis."""
    step = np.maximum(np.abs(x).max(axis=axis, keepdims=True), 1e-35) / np.float32(127)
    return np.rint(x * (np.float32(1) / step) if axis else x / step).astype(np.float64) * step


def halved(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


def zeros(*shape: int, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


pytestmark = pytest.mark.usefixtures("isa")

linear = jax.jit(native.linear, static_argnames=("width", "threads"))
feed_forward = jax.jit(native.feed_forward, static_argnames=("widths", "activation", "threads"))


@pytest.mark.parametrize("dtype", native.TYPES)
@pytest.mark.parametrize("shape", WIDTHS)
def test_a_packed_layer_is_the_product(shape, dtype, isa):
    b, d, f = shape
    x, w, bias = draw(b, d), draw(d, f, seed=1), draw(f, seed=2)
    packed = native.pack(w, dtype)
    found, plain = linear(x, packed, bias, f), linear(x, packed, None, f)
    if dtype == "int8":
        wanted = rounded(x, 1) @ rounded(w, 0) if b else np.zeros((0, f))
    elif dtype == "bfloat16":  # rows, too, where the processor has products of such numbers
        wanted = (halved(x) if isa == "avx512bf16" else x) @ halved(w)
    else:
        wanted = x.astype(np.float64) @ w
    size = np.abs(x).astype(np.float64) @ np.abs(w) if b else np.ones((0, f))
    # One row's number may lie between two steps, and a float32 division may round it to the other.
    allowed = 2e-6 * size + (np.abs(x).max(initial=0) * np.abs(w).max() * 1.02 / 127 if dtype == "int8" else 0) * 1e-2
    assert (np.abs(plain - wanted) - allowed).max(initial=-1) <= 0
    np.testing.assert_allclose(found, np.asarray(plain) + bias, atol=1e-6 * (1 + np.abs(plain).max(initial=0)))


@pytest.mark.parametrize("dtype", native.TYPES)
def test_a_row_s_product_depends_neither_on_its_company_nor_on_threads(dtype):
    x, packed = draw(200, 300), native.pack(draw(300, 70, seed=1), dtype)
    together = np.asarray(linear(x, packed, None, 70))
    np.testing.assert_array_equal(linear(x, packed, None, 70, threads=1), together)
    for first, count in ((0, 1), (5, 3), (96, 50), (199, 1)):
        np.testing.assert_array_equal(
            linear(x[first : first + count], packed, None, 70), together[first : first + count]
        )


@pytest.mark.parametrize("shape", WIDTHS)
def test_rows_rounded_by_a_given_step_are_the_product_of_what_they_are_rounded_to(shape):
    b, d, f = shape
    x, scale = draw(b, d), np.abs(draw(f, seed=1)) + np.float32(0.1)
    w = np.random.default_rng(2).integers(-127, 128, (d, f)).astype(np.int8)
    step, zero = np.float32(0.011), 97
    packed = native.pack_rounded(w, scale, np.array([step, zero], np.float32))
    n = np.clip(np.rint(x * (np.float32(1) / step)) + zero, 0, 255) - zero
    wanted = (n @ w.astype(np.float64)) * (scale.astype(np.float64) * step)
    np.testing.assert_allclose(linear(x, packed, None, f), wanted, rtol=1e-6, atol=1e-6)


def test_weights_that_are_rounded_already_are_packed_as_they_are():
    x, w = draw(9, 33), draw(33, 40, seed=1)
    scale = np.abs(w).max(axis=0) / np.float32(127)
    rounded = np.rint(w / scale).astype(np.int8)
    found = linear(x, native.pack_rounded(rounded, scale, np.zeros(0, np.float32)), None, 40)
    np.testing.assert_array_equal(found, linear(x, native.pack(w, "int8"), None, 40))


FUNCTIONS = {
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    "relu": jax.nn.relu,
    "symmetric_gelu": lambda z: z * jax.scipy.special.erf(z / np.sqrt(2)),
}


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("dtype", native.TYPES)
def test_a_feedforward_is_two_linear_layers(dtype, activation):
    for b, d, f, o in [(1, 1, 1, 1), (7, 33, 65, 20), (25, 64, 130, 70), (0, 4, 4, 4), (3, 0, 5, 2), (3, 5, 0, 2)]:
        x, weights = 3 * draw(b, d), (draw(d, f, seed=1), draw(f, o, seed=2))
        biases = (draw(f, seed=3), draw(o, seed=4))
        first, second = (native.pack(w, dtype) for w in weights)
        hidden = FUNCTIONS[activation](linear(x, first, biases[0], f))
        wanted = np.asarray(linear(np.asarray(hidden), second, biases[1], o))
        found = np.asarray(feed_forward(x, first, biases[0], second, biases[1], (f, o), activation=activation))
        # A hidden number may lie between two steps of int8, or of bfloat16.
        size = np.abs(np.asarray(hidden)).max(initial=0) * np.abs(weights[1]).max(initial=0)
        allowed = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.02}[dtype] * size + 1e-6
        np.testing.assert_allclose(found, wanted, atol=allowed)
        again = feed_forward(x, first, biases[0], second, biases[1], (f, o), activation=activation, threads=1)
        np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_hidden_rows_may_be_rounded_by_a_given_step(activation):
    b, d, f, o = 20, 33, 70, 40
    rng = np.random.default_rng(3)
    whole = [rng.integers(-127, 128, shape).astype(np.int8) for shape in ((d, f), (f, o))]
    factor = [np.abs(draw(n, seed=n)) * np.float32(0.002) for n in (f, o)]
    inputs = [np.array([0.02, 120], np.float32), np.array([0.015, 12], np.float32)]
    bias, x = draw(f, seed=5), draw(b, d)
    first, second = (native.pack_rounded(*part) for part in zip(whole, factor, inputs, strict=True))
    hidden = np.asarray(FUNCTIONS[activation](linear(x, first, bias, f)))
    wanted = linear(hidden, second, None, o)
    found = np.asarray(feed_forward(x, first, bias, second, None, (f, o), activation=activation))
    np.testing.assert_allclose(found, wanted, atol=1.01 * 0.015 * 127 * factor[1].max())
    assert np.abs(found - wanted).mean() < 1e-4 * np.abs(np.asarray(wanted)).mean()
    bad = x.copy()
    bad[3, 4] = np.nan
    for rows, b1 in ((bad, bias), (x, bias.copy())):
        if rows is x:
            b1[7] = np.nan
        y = np.asarray(feed_forward(rows, first, b1, second, None, (f, o), activation=activation))
        assert np.isnan(y[3]).all()
        assert np.isnan(y).all() == (rows is x)


@pytest.mark.parametrize("dtype", native.TYPES)
def test_what_is_no_number_stays_none(dtype):
    x, packed = draw(4, 40), native.pack(draw(40, 20, seed=1), dtype)
    x[1, 3], x[2, 39] = np.nan, np.inf
    found = np.asarray(linear(x, packed, None, 20))
    assert not np.isfinite(found[1:3]).any()
    assert np.isfinite(found[[0, 3]]).all()
    np.testing.assert_array_equal(np.asarray(linear(0 * x[:1], packed, None, 20)), 0)


def segments(seed: int, b: int, t: int) -> np.ndarray:
    """Rows of documents side by side, and padding."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(b):
        lengths = []
        while sum(lengths) < t:
            lengths.append(int(rng.integers(1, t + 1)))
        row = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:t]
        row[int(rng.integers(1, t + 1)) :] = 0
        rows.append(row)
    return np.array(rows, np.int32)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 7, 3, 5), (1, 130, 2, 64), (3, 33, 2, 24), (1, 300, 1, 80), (2, 16, 4, 8)]
)
@pytest.mark.parametrize("sees", [False, True])
def test_attention_keeps_to_documents(shape, sees):
    b, t, _, _ = shape
    q, k, v = (jnp.asarray(draw(*shape, seed=i)) for i in range(3))
    qkv = jnp.stack([q, k, v], axis=2)
    ask = jax.jit(lambda *args: native.attention(*args, padding_sees=sees))
    alone = jax.jit(lambda *args: native.attention(*args, padding_sees=sees, threads=1))
    np.testing.assert_allclose(ask(qkv), attention(q, k, v), atol=1e-5)
    for seed in range(4):
        ids = segments(seed, b, t)
        real = (ids != 0)[:, :, None, None]
        wanted = np.asarray(attention(q, k, v, attention_mask(jnp.asarray(ids))))
        wanted = wanted if sees else np.where(real, wanted, 0)
        found = np.asarray(ask(qkv, ids))
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        np.testing.assert_array_equal(alone(qkv, ids), found)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 5), (1, 130, 2, 64), (3, 33, 2, 24), (1, 65, 1, 80)])
def test_attention_of_bfloat16_is_that_of_rounded_numbers(shape, isa):
    b, t, _, k = shape
    q, key, v = (jnp.asarray(draw(*shape, seed=i)) for i in range(3))
    if isa != "avx512bf16":
        qkv = jnp.stack([q, key, v], axis=2)
        np.testing.assert_array_equal(native.attention(qkv, narrow=True), native.attention(qkv))
        return
    near = [jnp.asarray(halved(part), jnp.float32) for part in (q, key / np.sqrt(np.float32(k)), v)]
    ids = segments(1, b, t)
    found = np.asarray(native.attention(jnp.stack([q, key, v], axis=2), jnp.asarray(ids), narrow=True))
    wanted = np.asarray(attention(near[0], near[1] * np.sqrt(np.float32(k)), near[2], attention_mask(jnp.asarray(ids))))
    # Shares are rounded, too: each by at most 2^-8 of itself, and they add up to 1.
    np.testing.assert_allclose(found, np.where((ids != 0)[:, :, None, None], wanted, 0), atol=np.abs(v).max() / 256)
    one = native.attention(jnp.stack([q, key, v], axis=2), jnp.asarray(ids), narrow=True, threads=1)
    np.testing.assert_array_equal(one, found)


def test_attention_survives_large_logits_and_lets_what_is_no_number_through():
    q, k, v = (jnp.asarray(draw(1, 9, 1, 8, seed=i)) for i in range(3))
    large = native.attention(jnp.stack([900 * q, k, v], axis=2))
    np.testing.assert_allclose(large, attention(900 * q, k, v), atol=1e-4)
    found = np.asarray(native.attention(jnp.stack([q.at[0, 4, 0, 2].set(jnp.nan), k, v], axis=2)))
    assert np.isnan(found[0, 4]).all()
    assert np.isfinite(np.delete(found, 4, axis=1)).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (70, 64), (3, 129), (0, 8)])
def test_layer_norm_is_its_formula(shape):
    x, scale, bias = map(jnp.asarray, (5 + 3 * draw(*shape), draw(shape[1], seed=1), draw(shape[1], seed=2)))
    wide = np.asarray(x, np.float64)
    normed = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    wanted = normed * np.asarray(scale)
    np.testing.assert_allclose(native.layer_norm(x, scale, bias, 1e-5), wanted + np.asarray(bias), atol=2e-5)
    np.testing.assert_allclose(native.layer_norm(x, scale, None, 1e-5), wanted, atol=2e-5)


WRONG = [
    ("linear", (2, 4), [zeros(20), zeros(0), zeros(0), zeros(0)], (2, 3), "not packed for rows of this width"),
    (
        "linear",
        (2, 4),
        [zeros(4 * 40, dtype=jnp.float16), zeros(0), zeros(0), zeros(0)],
        (2, 3),
        "float32, bfloat16 or int8",
    ),
    ("feed_forward", (2, 4), [zeros(20), *3 * [zeros(0)]] * 2, (2, 3), "not packed for rows of this width"),
    ("feed_forward", (2, 4), [zeros(20), *3 * [zeros(0)]] * 2, (1, 3), "rows' shapes do not fit"),
    ("norm", (2, 4), [zeros(3), zeros(0)], (2, 4), "rows' shapes do not fit"),
    ("norm", (8,), [zeros(4), zeros(0)], (8,), "rows are"),
    ("attention", (1, 2, 3, 1, 4), [zeros(1, dtype=jnp.int32)], (1, 2, 1, 4), "do not fit"),
    ("attention", (1, 2, 2, 1, 4), [zeros(0, dtype=jnp.int32)], (1, 2, 1, 4), r"are \(b, t, 3, h, k\)"),
]
NUMBERS = {
    "feed_forward": {"width": np.int64(3), "activation": np.int32(0)},
    "linear": {},
    "norm": {"eps": np.float32(0)},
    "attention": {"padding_sees": np.bool_(False), "narrow": np.bool_(False)},
}


@pytest.mark.parametrize(("name", "first", "rest", "out", "message"), WRONG)
def test_shapes_that_do_not_fit_are_refused(name, first, rest, out, message):
    call = jax.ffi.ffi_call(f"ufbert_{name}", jax.ShapeDtypeStruct(out, jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(zeros(*first), *rest, threads=np.int64(1), **NUMBERS[name]))

"""The native tree kernels: random calls against loops in double, and against JAX."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.ops import fff, leaf_fff, native
from ufbert.ops.dense import ACTIVATIONS
from ufbert.ops.native import build, compiler

try:
    COMPILER = build.compiler()
except build.CannotBuild as error:
    pytest.skip(f"{error}; trees are gathered then, which test_fff.py holds to the same loop", allow_module_level=True)

HERE = Path(__file__).parent
REPO = HERE.parents[1]
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=all")
"""Not null: the address sanitizer finds those, too, and without it the kernels compile in half the time."""
TREES = [(1, 1, 0, 5), (7, 2, 3, 20), (33, 1, 5, 64), (40, 3, 2, 17), (16, 1, 8, 33), (0, 1, 2, 8), (400, 2, 4, 12)]
"""b, m, depth, d."""
LEAVES = [(1, 0, 6, 3, 5), (20, 3, 17, 1, 4), (50, 2, 32, 20, 16), (64, 4, 9, 5, 33), (0, 1, 4, 2, 2)]
"""b, depth, d, w, o."""
SEEDS = 25
TYPES = ["float32", "bfloat16", "int8", "exact bfloat16", "exact int8"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    """The kernels, compiled and known to XLA before a test changes the environment."""
    assert not native.unavailable(), native.unavailable()


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a fresh process."""
    env = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)


# ---- random calls in C++ ----


def build_fuzzer(program: Path, *link: str) -> Path:
    """The fuzzer, with these libraries and flags."""
    make = [COMPILER, "-std=c++17", "-O2", f"-I{compiler.SOURCES}", str(HERE / "native_fuzz.cpp"), *link, "-pthread"]
    made = subprocess.run([*make, "-o", str(program)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return program


def fuzz(program: Path, calls: int, *more: str) -> None:
    """Random calls, all of them right, with helper threads."""
    command, env = [program, "--calls", str(calls), *more], {**os.environ, "NPROC": "4"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{calls} calls, 0 mismatches" in done.stdout


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzzer of the kernels as Python loads them."""
    return build_fuzzer(tmp_path_factory.mktemp("fuzz") / "fuzz", str(build.library()))


@pytest.mark.long
def test_random_calls_under_the_sanitizers(tmp_path):
    (tmp_path / "probe.cpp").write_text("int main() { return 0; }\n")
    probe = [COMPILER, *SANITIZERS, str(tmp_path / "probe.cpp"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, capture_output=True).returncode or subprocess.run([tmp_path / "probe"]).returncode:
        pytest.skip("this compiler has no address and undefined-behaviour sanitizers")
    build.compile_to(tmp_path / "kernels.so", COMPILER, SANITIZERS, xla=False)
    fuzz(build_fuzzer(tmp_path / "fuzz", str(tmp_path / "kernels.so"), *SANITIZERS[2:]), 2000)


def test_random_calls_of_the_kernels_as_they_are_used(fuzzer):
    """Optimized, a row has many more chances to be summed in another order in a batch than alone."""
    fuzz(fuzzer, 3000)


def test_infinity_times_what_counts_as_zero_is_no_number_with_every_instruction_set(fuzzer, isa):
    """A linear layer in bfloat16 whose row 68 has an infinity where column 11 has 1e-40: bfloat16 products have always
    flushed the one to zero, and the others made infinity of both."""
    fuzz(fuzzer, 1, "--seed", "1", "--first", "748")


def test_the_long_fuzzer_runs_every_instruction_set_by_itself(fuzzer):
    command = [sys.executable, HERE / "native_fuzz_all.py", "--calls", "40", "--program", fuzzer]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == list(compiler.INSTRUCTION_SETS)
    assert all("40 calls, 0 mismatches" in line or "this processor lacks it" in line for line in lines), lines
    assert "40 calls, 0 mismatches (seed 1, 1 instruction sets)" in lines[0]


# ---- random calls through jax.ffi ----


def draw_tree(seed: int, b: int, m: int, depth: int, d: int) -> list[np.ndarray]:
    """x, w_in, bias, w_out."""
    rng, n = np.random.default_rng([seed, b, d]), 2 ** (depth + 1) - 1
    shapes = [(b, d), (m, n, d), (m, n), (m, n, d)]
    scales = [1.0, d**-0.5, 0.3, (depth + 1) ** -0.5]
    return [(rng.normal(size=s) * scale).astype(np.float32) for s, scale in zip(shapes, scales, strict=True)]


quantize = jax.jit(native.quantize)


def stored(weights, kind: str):
    if kind == "int8":
        return quantize(weights)
    return jnp.asarray(weights, jnp.bfloat16 if kind == "bfloat16" else jnp.float32)


def restored(weights) -> np.ndarray:
    if isinstance(weights, native.Quantized):
        return np.asarray(weights.rows, np.float32) * np.asarray(weights.scale)[..., None]
    return np.asarray(weights, np.float32)


def assert_close(found, wanted) -> None:
    """Within 1e-5 of the largest value, or of one."""
    scale = max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * scale, rtol=0)


tree_forward = jax.jit(native.tree_forward, static_argnames=("activation", "layer", "layers"))
tree_forward_saving = jax.jit(native.tree_forward_saving, static_argnames="activation")
tree_backward = jax.jit(native.tree_backward, static_argnames="activation")
leaf_forward = jax.jit(native.leaf_forward, static_argnames="activation")


@pytest.mark.parametrize(("shape", "activation"), list(zip(TREES, 2 * list(ACTIVATIONS), strict=False)))
def test_random_trees_equal_the_gathered_path(shape, activation):
    def layer(x, w_in, bias, w_out):
        return fff.fast_feedforward(x, w_in, bias, w_out, backend="gather", activation=ACTIVATIONS[activation])

    @jax.jit
    def oracle(g, *args):
        y, pull = jax.vjp(layer, *args)
        return y, pull(g), *fff.path_nodes(*args[:3])

    for seed in range(SEEDS):
        x, w_in, bias, w_out = draw_tree(seed, *shape)
        g = np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)
        kind = TYPES[seed % len(TYPES)]
        own_in = stored(w_in, "float32" if "exact" in kind else kind)
        own_out = stored(w_out, kind.removeprefix("exact "))
        w_in, w_out = restored(own_in), restored(own_out)
        *_, wanted_nodes, wanted_z = oracle(g, x, w_in, bias, w_out)
        clear = np.abs(wanted_z).min((1, 2)) > 1e-5  # nearer to a turn, two orders of one sum may rightly disagree
        assert clear.sum() >= 0.9 * len(x) - 1
        g[~clear] = 0
        wanted, gradients, _, _ = oracle(g, x, w_in, bias, w_out)
        y, nodes, z = tree_forward_saving(x, own_in, bias, own_out, activation=activation)
        np.testing.assert_array_equal(nodes[clear], wanted_nodes[clear])
        assert_close(z[clear], wanted_z[clear])
        assert_close(y[clear], wanted[clear])
        np.testing.assert_array_equal(tree_forward(x, own_in, bias, own_out, activation=activation), y)
        added = tree_forward(x, own_in, bias, own_out, activation=activation, residual=g)
        assert_close(added[clear], (wanted + g)[clear])
        if kind == "float32":
            found = tree_backward(x, w_in, w_out, nodes, z, g, activation=activation)
            for one, other in zip(found, gradients, strict=True):
                assert_close(one, other)


@pytest.mark.parametrize(("shape", "activation"), list(zip(LEAVES, 2 * list(ACTIVATIONS), strict=False)))
def test_random_leaves_equal_the_hard_descent(shape, activation):
    b, depth, d, w, o = shape
    g = 2**depth
    shapes = [(b, d), (g - 1, d), (g - 1,), (g, d, w), (g, w), (g, w, o), (g, o)]
    scales = [1.0, d**-0.5, 0.3, d**-0.5, 0.3, w**-0.5, 0.3]

    @jax.jit
    def oracle(x, tree):
        return *leaf_fff.descend(x, tree, ACTIVATIONS[activation]), leaf_fff.right_shares(x, tree)

    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, b, d])
        x, node_w, node_b, w_in, b_in, w_out, b_out = (
            (rng.normal(size=s) * scale).astype(np.float32) for s, scale in zip(shapes, scales, strict=True)
        )
        kind = TYPES[seed % 3]
        own_out = stored(w_out, kind)
        columns = stored(w_in.swapaxes(1, 2), kind)
        if isinstance(columns, native.Quantized):
            own_in = native.Quantized(columns.rows.swapaxes(1, 2), columns.scale)
        else:
            own_in = columns.swapaxes(1, 2)
        tree = leaf_fff.LeafTree(node_w, node_b, restored(columns).swapaxes(1, 2), b_in, restored(own_out), b_out)
        wanted, wanted_leaf, shares = oracle(x, tree)
        clear = np.abs(shares - 0.5).min(1, initial=1) > 1e-5
        y, leaf = leaf_forward(x, node_w, node_b, own_in, b_in, own_out, b_out, activation=activation)
        np.testing.assert_array_equal(leaf[clear], wanted_leaf[clear])
        assert_close(y[clear], wanted[clear])


def test_the_native_descent_to_a_leaf_has_the_derivative_of_the_other():
    rng = np.random.default_rng(0)
    shapes = [(30, 9), (7, 9), (7,), (8, 9, 5), (8, 5), (8, 5, 6), (8, 6)]
    x, *tree = ((0.3 * rng.normal(size=shape)).astype(np.float32) for shape in shapes)

    def slopes(descend):
        return jax.jit(jax.grad(lambda x, tree: jnp.sum(jnp.sin(descend(x, tree, jax.nn.relu)[0])), argnums=(0, 1)))

    found, wanted = (slopes(one)(x, leaf_fff.LeafTree(*tree)) for one in (leaf_fff.descend_native, leaf_fff.descend))
    assert float(jnp.abs(wanted[1].w_in).max()) > 1e-3
    jax.tree.map(assert_close, found, wanted)


@pytest.mark.parametrize("kind", TYPES)
def test_a_layer_of_many_in_one_array_is_that_layer_alone(kind):
    x, w_in, bias, w_out = draw_tree(3, 120, 6, 4, 20)
    own_in, own_out = stored(w_in, "float32" if "exact" in kind else kind), stored(w_out, kind.removeprefix("exact "))
    for layer in range(3):
        two = slice(2 * layer, 2 * layer + 2)
        alone = tree_forward(x, *(jax.tree.map(lambda a, two=two: a[two], part) for part in (own_in, bias, own_out)))
        np.testing.assert_array_equal(tree_forward(x, own_in, bias, own_out, layer=layer, layers=3), alone)
    for layer, layers in [(3, 3), (-1, 3), (0, 4), (0, 0)]:
        with pytest.raises(jax.errors.JaxRuntimeError, match="no such layer"):
            tree_forward(x, own_in, bias, own_out, layer=layer, layers=layers)


# ---- narrow weights ----


def test_quantized_rows_come_back_within_half_a_step():
    weights = np.random.default_rng(0).normal(size=(5, 7, 33)).astype(np.float32) * 0.02
    weights[2, 3] = 0
    found = quantize(weights)
    assert found.rows.dtype == jnp.int8
    assert found.scale.shape == (5, 7)
    assert np.abs(found.rows).max(-1).min(where=weights.any(-1), initial=127) == 127
    step = np.asarray(found.scale)[..., None]
    assert np.all(np.abs(restored(found) - weights) <= 0.5001 * step)
    assert not restored(found)[2, 3].any()
    np.testing.assert_array_equal(quantize(restored(found)).rows, found.rows)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_narrow_weights_route_by_their_own_rounding_and_exact_ones_do_not(kind):
    x, w_in, bias, w_out = draw_tree(1, 400, 2, 7, 24)
    full = tree_forward_saving(x, w_in, bias, w_out)[1]
    narrow = tree_forward_saving(x, stored(w_in, kind), bias, stored(w_out, kind))[1]
    exact = tree_forward_saving(x, w_in, bias, stored(w_out, kind))[1]
    np.testing.assert_array_equal(exact, full)
    own, z = jax.jit(fff.path_nodes)(x, restored(stored(w_in, kind)), bias)
    clear = np.abs(z).min((1, 2)) > 1e-5
    np.testing.assert_array_equal(narrow[clear], own[clear])
    assert np.any(np.asarray(narrow) != np.asarray(full))


# ---- instruction sets and threads ----


def answers() -> dict[str, np.ndarray]:
    """What the kernels say to one set of inputs."""
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, w_in, bias, w_out, g = draw(90, 50), draw(2, 31, 50) / 7, draw(2, 31), draw(2, 31, 50), draw(90, 50)
    leaves = draw(8, 50, 5) / 7, draw(8, 5), draw(8, 5, 11), draw(8, 11)
    small = native.quantize(w_in), native.quantize(w_out)
    y, nodes, z = native.tree_forward_saving(x, w_in, bias, w_out)
    made = {"y": y, "nodes": nodes, "z": z, "int8": native.tree_forward(x, small[0], bias, small[1], residual=g)}
    half = w_in.astype(jnp.bfloat16), bias, w_out.astype(jnp.bfloat16)
    made["bfloat16"] = native.tree_forward(x, *half)
    made |= dict(zip("abcd", native.tree_backward(x, w_in, w_out, nodes, z, g), strict=True))
    made |= dict(zip(("leaf y", "leaf"), native.leaf_forward(x, w_in[0, :7], bias[0, :7], *leaves), strict=True))
    stacks = w_in.reshape(1, 2, 31, 50), w_out.reshape(1, 2, 31, 50)
    made["routed"] = native.routed_forward(x, w_in[:1, :1], bias[:1, :1], *stacks, gated=True)
    made["routed int8"] = native.routed_forward(
        x, w_in[:1, :1], bias[:1, :1], *map(native.quantize, stacks), gated=False
    )
    halved = x.astype(jnp.bfloat16).astype(jnp.float32)  # as avx512bf16 rounds rows, and the others do not
    for kind in native.TYPES:
        packed = native.pack(np.asarray(w_in[0].T), kind)
        made[f"linear {kind}"] = native.linear(halved if kind == "bfloat16" else x, packed, bias[0], 31)
    documents = jnp.asarray(np.repeat([[1, 2, 0]], [15, 17, 8], axis=1).repeat(2, 0))
    made["attention"] = native.attention(draw(2, 40, 3, 2, 20), documents, padding_sees=True)
    made["norm"] = native.layer_norm(x, w_in[0, 0], w_in[0, 1], 1e-5)
    made["add"] = native.add(x, g)
    return {key: np.asarray(value) for key, value in made.items()}


def test_every_instruction_set_gives_the_same_answers(isa, monkeypatch):
    assert native.instruction_set() == isa
    found = answers()
    monkeypatch.setenv("UFBERT_ISA", "plain")
    for key, wanted in answers().items():
        np.testing.assert_allclose(found[key], wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0, err_msg=key)


THREADS = """
import jax, numpy as np
from concurrent.futures import ThreadPoolExecutor
from ufbert.ops import native
rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
weights = draw(2, 127, 40), draw(2, 127), draw(2, 127, 40)
call = jax.jit(lambda x: native.tree_forward(x, *weights))
alone = jax.jit(lambda x: native.tree_forward(x, *weights, threads=1))
for b in (9, 100, 600):
    inputs = [draw(b, 40) for _ in range(64)]
    serial = [np.asarray(alone(x)) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for one, other in zip(serial, pool.map(lambda x: np.asarray(call(x)), inputs), strict=True):
                np.testing.assert_array_equal(one, other)
print("equal")
"""


def test_calls_from_eight_threads_equal_serial_ones():
    done = python(THREADS, NPROC="4")
    assert done.stdout.strip() == "equal", done.stderr


# ---- shapes ----


def zeros(*shape: int, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


NONE = zeros(0)
PATH = np.array([[[0, 1, 4]]], np.int32)
FORWARD = [zeros(5, 4), zeros(2, 7, 4), NONE, zeros(2, 7), zeros(2, 7, 4), NONE, zeros(0, 4)]
BACKWARD = [
    zeros(5, 4),
    zeros(2, 7, 4),
    zeros(2, 7, 4),
    zeros(5, 2, 3, dtype=jnp.int32) + PATH,
    zeros(5, 2, 3),
    zeros(5, 4),
]
LEAF = [zeros(5, 4), zeros(3, 4), zeros(3), zeros(4, 4, 2), NONE, zeros(4, 2), zeros(4, 2, 6), NONE, zeros(4, 6)]
ROUTED = [
    *(zeros(5, 4), zeros(2, 3, 4), zeros(2, 3)),
    *(zeros(2, 4, 6, 4), NONE, zeros(2, 4, 6), zeros(2, 4, 6, 4), NONE, zeros(2, 4, 4)),
]
ARGUMENTS = {"forward": FORWARD, "backward": BACKWARD, "leaf_forward": LEAF, "routed_forward": ROUTED}
WRONG = [
    ("forward", 0, zeros(5, 3), "the rows' shapes do not fit"),
    ("forward", 0, zeros(20), r"rows are \(b, d\)"),
    ("forward", 1, zeros(14, 4), r"weights \(m, n, d\)"),
    ("forward", 1, zeros(2, 6, 4), r"2\^\(D\+1\) - 1 nodes"),
    ("forward", 1, zeros(2, 0, 4), r"2\^\(D\+1\) - 1 nodes"),
    ("forward", 1, zeros(2, 7, 4, dtype=jnp.float16), "weights are float32, bfloat16 or int8"),
    ("forward", 1, zeros(2, 7, 4, dtype=jnp.bfloat16), "input weights have the type of the others, or float32"),
    ("forward", 2, zeros(14), "the weights' shapes do not fit"),
    ("forward", 3, zeros(2, 3), "the weights' shapes do not fit"),
    ("forward", 4, zeros(2, 3, 4), "the weights' shapes do not fit"),
    ("forward", 4, zeros(2, 7, 4, dtype=jnp.int8), "the weights' shapes do not fit"),
    ("forward", 6, zeros(4, 4), "the rows' shapes do not fit"),
    ("backward", 0, zeros(5), r"rows are \(b, d\)"),
    ("backward", 0, zeros(6, 4), "the rows' shapes do not fit"),
    ("backward", 1, zeros(2, 6, 4), r"2\^\(D\+1\) - 1 nodes"),
    ("backward", 2, zeros(2, 3, 4), "the weights' shapes do not fit"),
    ("backward", 3, zeros(5, 2, 2, dtype=jnp.int32), "the rows' shapes do not fit"),
    ("backward", 3, zeros(5, 2, 3, dtype=jnp.int32), "the nodes are not paths from the root to a leaf"),
    ("backward", 3, zeros(5, 2, 3, dtype=jnp.int32) + PATH + 2, "the nodes are not paths from the root to a leaf"),
    ("backward", 4, zeros(5, 1, 3), "the rows' shapes do not fit"),
    ("backward", 5, zeros(4, 4), "the rows' shapes do not fit"),
    ("leaf_forward", 0, zeros(5, 3), "the rows' shapes do not fit"),
    ("leaf_forward", 1, zeros(3, 3), "the weights' shapes do not fit"),
    ("leaf_forward", 2, zeros(4), r"2\^D leaves"),
    ("leaf_forward", 3, zeros(3, 4, 2), r"2\^D leaves"),
    ("leaf_forward", 3, zeros(4, 4), r"leaves \(g, d, w\)"),
    ("leaf_forward", 3, zeros(4, 4, 2, dtype=jnp.int8), "leaves are of one type"),
    ("leaf_forward", 4, zeros(8), "the weights' shapes do not fit"),
    ("leaf_forward", 5, zeros(4, 3), "the weights' shapes do not fit"),
    ("leaf_forward", 6, zeros(4, 3, 6), "the weights' shapes do not fit"),
    ("leaf_forward", 8, zeros(3, 6), "the weights' shapes do not fit"),
    ("routed_forward", 0, zeros(5, 3), "the rows' shapes do not fit"),
    ("routed_forward", 1, zeros(2, 2, 4), "the weights' shapes do not fit"),
    ("routed_forward", 2, zeros(2, 4), r"2\^D leaves"),
    ("routed_forward", 3, zeros(2, 3, 6, 4), r"2\^D leaves"),
    ("routed_forward", 3, zeros(4, 6, 4), r"leaves \(m, g, w, d\)"),
    ("routed_forward", 3, zeros(2, 4, 0, 4), "the weights' shapes do not fit"),
    ("routed_forward", 3, zeros(2, 4, 6, 4, dtype=jnp.int8), "leaves are of one type"),
    ("routed_forward", 4, zeros(48), "the weights' shapes do not fit"),
    ("routed_forward", 5, zeros(2, 4, 5), "the weights' shapes do not fit"),
    ("routed_forward", 6, zeros(2, 4, 5, 4), "the weights' shapes do not fit"),
    ("routed_forward", 8, zeros(2, 4, 6), "the weights' shapes do not fit"),
]


def call(name: str, args: list[jax.Array], activation: int = 0):
    """A kernel without the Python function around it, whose own checks of shapes would come first."""
    rows, trees = (5, 4), (2, 7, 4)
    several = {"backward": [rows, trees, trees[:2], trees], "leaf_forward": [(5, 6), (5,)]}
    shapes = several.get(name, [rows])
    out = [jax.ShapeDtypeStruct(s, jnp.int32 if s == (5,) else jnp.float32) for s in shapes]
    function = jax.ffi.ffi_call(f"ufbert_{name}", out if len(out) > 1 else out[0])
    own = {"forward": {"layer": np.int64(0), "layers": np.int64(1)}, "routed_forward": {"gated": np.bool_(True)}}
    place = own.get(name, {})
    return function(*args, activation=np.int32(activation), threads=np.int64(0), **place)


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_wrong_shape_is_a_sentence(case):
    name, place, array, sentence = WRONG[case]
    args = list(ARGUMENTS[name])
    args[place] = array
    with pytest.raises(jax.errors.JaxRuntimeError, match=sentence):
        jax.block_until_ready(call(name, args))


@pytest.mark.parametrize(("name", "args"), list(ARGUMENTS.items()))
def test_right_shapes_pass_and_unknown_activations_do_not(name, args):
    jax.block_until_ready(call(name, args))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such activation"):
        jax.block_until_ready(call(name, args, activation=4))


def test_a_call_without_kernels_says_why(monkeypatch):
    monkeypatch.setattr("ufbert.ops.native.calls.unavailable", lambda: "there is no compiler")
    x, *weights = draw_tree(0, 2, 1, 1, 4)
    with pytest.raises(build.CannotBuild, match="there is no compiler"):
        native.tree_forward(*map(jnp.asarray, (x, *weights)))

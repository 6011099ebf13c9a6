"""The native kernels at their limits: numbers next to zero, no width, too many rows, too little memory, forked processes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.ops import fff, native
from ufbert.ops.native import build
from ufbert.runtime.device import usable_threads, use_device

try:
    build.compiler()
except build.CannotBuild as error:
    pytest.skip(f"{error}; there are no kernels then, which test_native_cache.py tests", allow_module_level=True)

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def registered():
    """The kernels, compiled and known to XLA."""
    assert not native.unavailable(), native.unavailable()


def python(script: str) -> str:
    """What a script says in a fresh process with helper threads, which may not crash; it gets the kernels' path."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "NPROC": "4"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(build.library())], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# ---- numbers next to zero ----

NEXT_TO_ZERO = """
import os, jax, numpy as np
from ufbert.ops import native
from ufbert.ops.native import build, compiler

def same(what, call, *args, rows=(0,)):
    answers = []
    for b, threads in ((64, 1), (64, 0), (700, 0)):
        many = [np.repeat(a[:1], b, 0) if i in rows else a for i, a in enumerate(args)]
        jitted = jax.jit(lambda *args: call(*args, threads=threads))
        for _ in range(1 if threads else 4):
            answers += [[a for a in jax.tree.leaves(jitted(*many)) if a.shape[:1] == (b,)]]
    for found in answers:
        for one, other in zip(found, answers[0], strict=True):
            assert (np.asarray(one) == np.asarray(other[:1])).all(), (what, len(one))

rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
d, tiny = 64, np.float32(1e-40)
x, w_in, bias, w_out = draw(1, d), draw(1, 255, d), draw(1, 255), 10 * draw(1, 255, d)
w_in[0, 0], bias[0, 0] = 0, tiny                           # the root: nothing but the bias decides
w_in[0, 1:], x[0, ::3], w_out[0, :, ::5] = tiny, tiny, tiny  # and below it, tiny weights
bias[0, 1:] = np.where(rng.random(254) < 0.5, tiny, -tiny)
qkv = draw(1, 9, 3, 2, 20)
qkv[:, :, 1:] *= np.float32(1e-38)
leaves = draw(256, d, 4), draw(256, 4) * tiny, draw(256, 4, 9), draw(256, 9) * tiny
few = np.full((1, 800), tiny)
for isa in compiler.INSTRUCTION_SETS:
    os.environ["UFBERT_ISA"] = isa
    if not native.instruction_set():
        continue
    for kind in native.TYPES:  # packing comes first: it starts the helpers from a thread that is not XLA's
        packed = native.pack(draw(d, 640) * np.float32(1e-38), kind)
        linear = lambda x, threads: native.linear(x, packed, None, 640, threads=threads)
        same(f"linear {kind}", linear, 1e6 * x)
        same(f"linear {kind}, tiny rows", linear, tiny + 0 * x)
    same("tree", native.tree_forward, x, w_in, bias, w_out)
    same("tree saved", native.tree_forward_saving, x, w_in, bias, w_out)
    y, nodes, z = (np.asarray(a) for a in native.tree_forward_saving(x, w_in, bias, w_out))
    assert nodes[0, 0, 1] == 1, "a bias of 1e-40 is zero, which turns left"
    backward = lambda x, nodes, z, g, threads: native.tree_backward(x, w_in, w_out, nodes, z, g, threads=threads)
    same("backward", backward, x, nodes, z, draw(1, d) * tiny, rows=(0, 1, 2, 3))
    same("leaf", native.leaf_forward, x, w_in[0], bias[0], *leaves)
    stacks = np.stack([w_in] * 2)[:, :, :4].reshape(1, 2, 4, d), np.stack([w_out] * 2)[:, :, :4].reshape(1, 2, 4, d)
    routed = lambda x, threads: native.routed_forward(x, w_in[:, :1], bias[:, :1], *stacks, gated=True, threads=threads)
    same("routed", routed, x)
    norm = lambda x, scale, bias, threads: native.layer_norm(x, scale, bias, 1e-5, threads=threads)
    same("norm", norm, x * tiny, draw(d), draw(d) * tiny)
    same("add", native.add, few, few, rows=(0, 1))
    same("attention", native.attention, qkv)
print("equal")
"""


def test_equal_rows_next_to_zero_get_equal_answers_on_every_thread():
    assert python(NEXT_TO_ZERO) == "equal"


def test_both_backends_turn_where_xla_says_at_numbers_next_to_zero(isa):
    rng = np.random.default_rng(0)
    x, w_in, w_out = (rng.normal(size=shape).astype(np.float32) for shape in [(300, 8), (1, 31, 8), (1, 31, 8)])
    w_in *= np.float32(1e-39)
    bias = rng.choice(np.float32([1e-40, -1e-40, 1e-37, -1e-37, 0]), (1, 31))
    nodes, z = jax.jit(fff.path_nodes)(x, w_in, bias)
    _, own_nodes, own_z = native.tree_forward_saving(*map(jnp.asarray, (x, w_in, bias, w_out)))
    np.testing.assert_array_equal(own_nodes, nodes)
    np.testing.assert_array_equal(own_z, z)
    assert len(np.unique(nodes)) > 3


# ---- no width ----


def floats(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng([3, *shape]).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dtype", native.TYPES)
def test_rows_without_width_give_the_bias(isa, dtype):
    bias = floats(5)
    packed = native.pack(np.zeros((0, 5), np.float32), dtype)
    np.testing.assert_array_equal(native.linear(floats(7, 0), packed, bias, 5), jnp.tile(bias, (7, 1)))
    np.testing.assert_array_equal(native.linear(floats(7, 0), packed, None, 5), jnp.zeros((7, 5)))
    assert native.linear(floats(7, 5), native.pack(np.zeros((5, 0), np.float32), dtype), None, 0).shape == (7, 0)
    assert native.linear(floats(0, 0), native.pack(np.zeros((0, 0), np.float32), dtype), None, 0).shape == (0, 0)


def test_other_kernels_without_width_or_trees(isa):
    assert native.layer_norm(floats(4, 0), floats(0), None, 1e-5).shape == (4, 0)
    assert native.attention(floats(2, 5, 3, 2, 0)).shape == (2, 5, 2, 0)
    assert native.attention(floats(2, 5, 3, 0, 4)).shape == (2, 5, 0, 4)
    assert native.attention(floats(2, 0, 3, 2, 4)).shape == (2, 0, 2, 4)
    assert native.add(floats(0), floats(0)).shape == (0,)
    for b in (1, 4, 300):
        assert native.tree_forward(floats(b, 0), floats(1, 255, 0), floats(1, 255), floats(1, 255, 0)).shape == (b, 0)
        none = floats(0, 7, 6), floats(0, 7), floats(0, 7, 6)
        np.testing.assert_array_equal(native.tree_forward(floats(b, 6), *none), jnp.zeros((b, 6)))
        np.testing.assert_array_equal(native.tree_forward(floats(b, 6), *none, residual=floats(b, 6)), floats(b, 6))
        _, nodes, z = native.tree_forward_saving(floats(b, 6), *none)
        dx, *_ = native.tree_backward(floats(b, 6), none[0], none[2], nodes, z, floats(b, 6))
        np.testing.assert_array_equal(dx, jnp.zeros((b, 6)))
        tree = floats(3, 6), floats(3), floats(4, 6, 0), floats(4, 0), floats(4, 0, 5), floats(4, 5)
        y, leaf = native.leaf_forward(floats(b, 6), *tree)
        np.testing.assert_array_equal(y, tree[-1][leaf])
        trees = floats(2, 3, 0), floats(2, 3), floats(2, 4, 5, 0), floats(2, 4, 5, 0)
        assert native.routed_forward(floats(b, 0), *trees, gated=True).shape == (b, 0)


# ---- what cannot be counted, or is of another type ----


def test_more_rows_than_can_be_counted_are_a_sentence():
    many, tree = jnp.zeros((2**31, 0)), (floats(1, 3, 0), floats(1, 3), floats(1, 3, 0))
    with pytest.raises(ValueError, match=r"x of native forward is \(2147483648, 0\): no side may be over 2\^31 - 1"):
        native.tree_forward(many, *tree)
    with pytest.raises(ValueError, match="x of native norm is"):
        native.layer_norm(many, floats(0), None, 1e-5)
    with pytest.raises(ValueError, match="qkv of native attention is"):
        native.attention(jnp.zeros((1, 2**31, 3, 1, 0)))
    with pytest.raises(ValueError, match=r"weights to pack are \(0, 2147483648\)"):
        native.pack(np.zeros((0, 2**31), np.float32), "float32")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_rows_of_another_type_are_a_sentence(dtype):
    x, tree = floats(3, 8).astype(dtype), (floats(1, 3, 8), floats(1, 3), floats(1, 3, 8))
    named = f"as x, not {jnp.dtype(dtype).name}: cast it with .astype first"
    with pytest.raises(TypeError, match=f"native forward takes float32 {named}"):
        jax.jit(native.tree_forward)(x, *tree)
    with pytest.raises(TypeError, match=f"native norm takes float32 {named}"):
        native.layer_norm(x, floats(8), None, 1e-5)
    with pytest.raises(TypeError, match=f"native linear takes float32 {named}"):
        native.linear(x, native.pack(np.zeros((8, 4), np.float32), "int8"), None, 4)


def test_weights_of_another_type_are_a_sentence():
    x, half, whole = floats(3, 8), floats(1, 3, 8).astype(jnp.float16), jnp.ones((1, 3, 8), jnp.int32)
    with pytest.raises(TypeError, match="takes float32 or bfloat16 or int8 as w_out, not float16: cast it"):
        native.tree_forward(x, floats(1, 3, 8), floats(1, 3), half)
    with pytest.raises(TypeError, match="takes float32 or bfloat16 or int8 as w_in, not int32: cast it"):
        native.tree_forward(x, whole, floats(1, 3), floats(1, 3, 8))


# ---- threads, memory and forks ----


def test_more_threads_than_processors_are_as_many_as_those(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [usable_threads(n) for n in (0, 1, 8, 9, 5000)] == [8, 1, 8, 8, 8]
    monkeypatch.setenv("NPROC", "1")
    use_device("cpu", threads=5000)
    assert os.environ["NPROC"] == "8"


FUNCTIONS = """
import ctypes, os, resource, signal, sys, threading
kernels = ctypes.CDLL(sys.argv[1])
kernels.ufbert_packed_size.restype = ctypes.c_int64
kernels.ufbert_packed_size.argtypes = ctypes.c_int64, ctypes.c_int64, ctypes.c_int32
kernels.ufbert_pack.argtypes = (ctypes.c_int64, ctypes.c_int64, *3 * (ctypes.c_void_p,), ctypes.c_int32, ctypes.c_int64)
weights = (ctypes.c_float * (64 * 4096))(*range(64 * 4096))

def pack():
    packed = (ctypes.c_char * kernels.ufbert_packed_size(64, 4096, 0))()
    return kernels.ufbert_pack(64, 4096, weights, packed, None, 0, 0), sum(packed[::1999])

class Attention(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "bthk"] + [(name, ctypes.c_void_p) for name in ("qkv", "segment", "y")]
    _fields_ += [("scale", ctypes.c_float), ("padding_sees", ctypes.c_bool)]

def attend(t, k, h):
    qkv, y = (ctypes.c_float * (t * 3 * h * k))(), (ctypes.c_float * (t * h * k))()
    call = Attention(1, t, h, k, ctypes.addressof(qkv), None, ctypes.addressof(y), 1.0, False)
    call.arrays = qkv, y  # which live as long as the call
    return lambda: kernels.ufbert_attention(ctypes.byref(call), 0)

def leave_memory(room):  # beside what there is
    used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
"""

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set by what /proc says is used")


@only_linux
def test_helper_threads_that_cannot_be_started_are_done_without():
    script = "leave_memory(4 << 20); print(pack() == pack()); leave_memory(1 << 34); print(pack()[0])"
    assert python(FUNCTIONS + script).split() == ["True", "0"]


MEMORY = """
small = attend(30, 8, 4)
assert small() == 0                          # the helpers run
large = attend(1 << 16, 64, 4)               # each head writes 16 MB of keys down
leave_memory(4 << 20)
outcome = large()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(outcome, small(), pack()[0])
"""


@only_linux
def test_memory_that_threads_cannot_have_is_an_outcome():
    assert python(FUNCTIONS + MEMORY).split() == ["2", "0", "0"]


MEMORY_OF_JAX = """
import jax, jax.numpy as jnp
from ufbert.ops import native
x, tree = jnp.ones((1 << 20, 1)), (jnp.ones((1, 255, 1)), jnp.ones((1, 255)), jnp.ones((1, 255, 1)))
call = jax.jit(native.tree_forward)
expected = call(x, *tree).block_until_ready()
leave_memory(100 << 20)                      # every row writes its path down, 256 bytes
try:
    call(x, *tree).block_until_ready()
except (jax.errors.JaxRuntimeError, ValueError) as error:
    print(str(error).splitlines()[0])
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print((call(x, *tree) == expected).all())
"""


@only_linux
def test_memory_that_jax_s_call_cannot_have_is_a_sentence():
    said = python(FUNCTIONS + MEMORY_OF_JAX).splitlines()
    assert said == ["RESOURCE_EXHAUSTED: there is not enough memory for the kernels' intermediate results", "True"]


FORKS = """
packed = (ctypes.c_char * kernels.ufbert_packed_size(1, 1024, 0))()
small = lambda to=packed: kernels.ufbert_pack(1, 1024, weights, to, None, 0, 0)
wanted = pack()
stop = False
def go_on():
    while not stop:
        small()
busy = [threading.Thread(target=go_on) for _ in range(3)]
for thread in busy:
    thread.start()
ends = set()
for _ in range(200):
    child = os.fork()
    if not child:
        signal.alarm(60)
        os._exit(small() + (pack() != wanted))
    ends.add(os.waitpid(child, 0)[1])
stop = True
print(*ends)
"""


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_computes_with_threads_of_its_own():
    assert python(FUNCTIONS + FORKS) == "0"

"""The engine: the answers of the training graph, for every kind of layer, whatever company a text comes in."""

import itertools
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from ufbert import nn
from ufbert.data.encode import bucket, encode_texts
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.inference.batches import fill, fill_rows, size_for, sizes_to
from ufbert.inference.engine import AT_ONCE, Engine
from ufbert.inference.packed import PACKED_LAYERS, pack
from ufbert.inference.predictor import Predictor, changed_routes
from ufbert.ops import fff, native

SENTENCE = "the cat sees the dog in london and a king follows the river to rome where birds find an old house"
WORDS = SENTENCE.split(" ")
LENGTHS = [1, 5, 2, 17, 9, 1, 12, 3]
TEXTS = [" ".join(WORDS[:n]) for n in LENGTHS]

needs_kernels = pytest.mark.skipif(
    bool(native.unavailable()),
    reason="without kernels nothing is packed; where there is a compiler, test_native.py fails then",
)


@pytest.fixture(scope="module")
def made(family):
    """A small model with both heads."""
    return lambda name, **changes: family(name, "masked_lm", "classifier", **changes)


encode = jax.jit(nn.encode, static_argnames="config")


def one_by_one(model: ModelFolder, texts=TEXTS) -> list[np.ndarray]:
    """Every text's hidden states by the training graph, each in a row of its own."""
    config = replace(model.config, tree_backend="gather")
    rows = encode_texts(model.tokenizer, texts, None, config)
    ids, segments, types = map(jnp.asarray, rows.pad(range(len(texts))))
    hidden = np.asarray(encode(model.params, config, ids, segments, type_ids=types)[0])
    return [hidden[i, : len(ids)] for i, ids in enumerate(rows.ids)]


@pytest.mark.parametrize(("kind", "mode"), [*((name, "throughput") for name in FAMILIES), ("tree", "latency")])
def test_answers_are_those_of_the_training_graph(made, kind, mode):
    model = made(kind)
    found = Predictor(model, mode=mode).encode(TEXTS)
    assert [one.shape for one in found] == [
        (n, 32) for n in map(len, encode_texts(model.tokenizer, TEXTS, None, model.config).ids)
    ]
    for one, wanted in zip(found, one_by_one(model), strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", ["crammed", "tree", "hybrid"])
def test_without_kernels_answers_are_the_same(made, kind, monkeypatch):
    model = made(kind)
    wanted = one_by_one(model)
    monkeypatch.setattr(native, "unavailable", lambda: "there is no compiler in this test")
    without = Predictor(model)
    assert not without.engine.is_packed
    jax.tree.map(np.testing.assert_array_equal, without.engine.params, model.params)
    for one, other in zip(without.encode(TEXTS), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    with pytest.raises(
        UserError, match="int8 weights need the native kernels, and there are none: there is no compiler"
    ):
        Predictor(model, "int8")


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_scores_and_guesses_are_those_of_each_text_alone(made, pooling):
    model = made("tree", pooling=pooling)
    predictor = Predictor(model)
    masked = [f"{text} [MASK] and [MASK]" for text in TEXTS]
    together, guesses = predictor.classify(TEXTS, TEXTS[::-1]), predictor.fill_mask(masked, 3)
    for i in (0, 3, 6):
        (alone,) = predictor.classify([TEXTS[i]], [TEXTS[-1 - i]])
        assert alone.label == together[i].label
        assert alone.probability == pytest.approx(together[i].probability, abs=1e-5)
        (own,) = predictor.fill_mask([masked[i]], 3)
        assert [[guess.token for guess in mask] for mask in own] == [[g.token for g in mask] for mask in guesses[i]]
        assert len(own) == 2
    hidden = one_by_one(model)
    for text_hidden, answer in zip(hidden, predictor.classify(TEXTS), strict=True):
        pooled = nn.pool(model.config, jnp.asarray(text_hidden)[None])
        scores = np.asarray(nn.classify(model.params, model.config, pooled))[0]
        assert answer.label == ("no", "yes")[int(scores.argmax())]
        assert answer.probability == pytest.approx(1 / (1 + np.exp(-abs(scores[0] - scores[1]))), abs=1e-4)


@needs_kernels
@pytest.mark.parametrize("kind", ["bert", "crammed", "tree", "ngrams"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_weights_are_near_and_not_equal(made, kind, dtype):
    model = made(kind)
    full, narrow = Predictor(model).encode(TEXTS), Predictor(model, dtype, exact_routing=True).encode(TEXTS)
    errors = [
        np.linalg.norm(one - other, axis=1) / np.linalg.norm(one, axis=1)
        for one, other in zip(full, narrow, strict=True)
    ]
    error = float(np.median(np.concatenate(errors)))
    assert 1e-4 < error < 0.05


@needs_kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_trees_turn_by_their_rounded_weights(made, dtype):
    """Each layer's nodes are those of the rounded weights, or with exact routing of the unrounded ones."""
    model = made("tree", tree_depth=7)
    assert changed_routes(Engine(model), model, TEXTS) == changed_routes(Engine(model, dtype, True), model, TEXTS) == 0
    many = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(20)]
    changed = changed_routes(Engine(model, dtype), model, 2 * many)
    assert changed == pytest.approx(changed_routes(Engine(model, dtype), model, many), abs=1e-6)
    assert 0 < changed < 0.4
    tree = model.params["encoder"]["layer_01"]["tree"]
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(300, 32)), jnp.float32)
    nodes = {}
    for exact in (False, True):
        used = pack(model.params["encoder"], model.config, dtype, exact)["layer_01"]["tree"]
        w_in = native.restore(used["w_in"])
        assert np.array_equal(w_in, tree["w_in"]) == exact
        assert 0 < np.abs(native.restore(used["w_out"]) - tree["w_out"]).max() < 0.02
        nodes[exact] = fff.path_nodes(rows, w_in, used["bias"])[0]
    assert np.any(nodes[True] != nodes[False])


@needs_kernels
def test_rows_of_hashed_tables_are_kept_in_the_narrow_type(made):
    model = made("ngrams")
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        tables = pack(model.params["encoder"], model.config, dtype)["ngrams"]
        assert tables.keys() == {"around", "before", "after"}
        for name, table in tables.items():
            assert sum(leaf.nbytes for leaf in jax.tree.leaves(table)) <= 61 * (32 * size + 4)
            exact = model.params["encoder"]["ngrams"][name]
            np.testing.assert_allclose(native.restore(table), exact, atol=0.0 if dtype == "float32" else 6e-3)


@needs_kernels
def test_packed_weights_are_not_kept_twice(made):
    model = made("tree")
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        layer = Engine(model, dtype).params["encoder"]["layer_00"]
        assert layer["attention"].keys() == {"qkv", "out"}
        assert layer["tree"].keys() == {"w_in", "bias", "w_out"}
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(layer["tree"]["w_out"])) <= 63 * (32 * size + 4)


@needs_kernels
@pytest.mark.parametrize(("name", "kind"), [("tree", "attention"), ("rotary", "glu")])
def test_a_layer_that_cannot_be_packed_is_computed_by_its_module(made, name, kind, monkeypatch):
    model = made(name)
    monkeypatch.delitem(PACKED_LAYERS, kind)
    predictor = Predictor(model)
    assert (
        predictor.engine.params["encoder"]["layer_00"][kind].keys() == model.params["encoder"]["layer_00"][kind].keys()
    )
    for hidden, wanted in zip(predictor.encode(TEXTS), one_by_one(model), strict=True):
        np.testing.assert_allclose(hidden, wanted, atol=1e-4)


GROWTH = """
import gc, sys
import jax
from ufbert.bench.encoder_ours import private_memory
from ufbert.runtime.memory import give_back_freed_memory
from ufbert.inference.predictor import Predictor

for _ in "compiled", "measured":
    predictor = None
    gc.collect()
    give_back_freed_memory()
    before = private_memory()
    predictor = Predictor.load(sys.argv[1], "int8", device="cpu")
    predictor.encode(["the cat sees the dog"])
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(predictor.engine.params))
print(weights, private_memory() - before)
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="what a process uses is read from /proc")
def test_a_packed_model_takes_little_more_memory_than_its_weights(made, tmp_path):
    save_model(tmp_path / "wide", made("tree", d_model=512, n_heads=8, tree_depth=12))
    done = subprocess.run([sys.executable, "-c", GROWTH, tmp_path / "wide"], capture_output=True, text=True, check=True)
    weights, memory = map(int, done.stdout.split())
    assert 1.5e7 < weights < 2.5e7
    assert 0.9 * weights < memory < 1.3 * weights + 1e7, "more than the weights, a tokenizer and a program"


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(0, 80))
def test_groups_hold_every_text_once_and_few_gaps(lengths, most):
    groups = fill(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= most
    if most:
        sums = sorted(sum(lengths[i] for i in group) for group in groups)
        assert all(one + other > most for one, other in itertools.pairwise(sums))


@given(st.integers(1, 10**6))
def test_sizes_are_few_and_waste_three_tokens_or_a_fifth(count):
    size = size_for(count)
    assert 0 <= size - count <= max(3, size / 5)
    assert size_for(size) == size
    assert len(list(sizes_to(512))) == 24
    assert len(list(sizes_to(AT_ONCE))) == 32


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(0, 400))
def test_groups_of_rows_hold_every_text_once_in_powers_of_two(lengths, most):
    groups = fill_rows(lengths, most, 60)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group).bit_count() == 1
        assert len(group) == 1 or len(group) * bucket(max(lengths[i] for i in group), 60) <= most


def test_ten_thousand_texts_waste_little():
    lengths = np.random.default_rng(0).integers(1, 513, 10000).tolist()
    groups = fill(lengths, AT_ONCE)
    assert sum(lengths) / sum(size_for(sum(lengths[i] for i in group)) for group in groups) > 0.98


EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """A list that grows by an entry for whatever jax compiles."""
    events = []

    def listen(name: str, seconds: float, **facts) -> None:
        if name == EVENT:
            events.append(facts)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("kind", "dtype", "mode", "kernels", "programs"),
    [
        ("bert", "float32", "latency", True, 10),  # 4, 8, ..., 32, 40, 48
        ("tree", "int8", "throughput", True, 32),
        ("fourier", "bfloat16", "throughput", True, 6),  # 1, 2, 4, ..., 32 rows of 40 tokens
        ("crammed", "float32", "latency", False, 5),  # rows of 8, 16, 24, 32 and 48 tokens
    ],
)
def test_after_warming_up_no_length_and_no_number_of_texts_compiles_anything(
    made, kind, dtype, mode, kernels, programs, compiled, monkeypatch
):
    model = made(kind, d_model=16, n_layers=1)
    if not kernels:
        monkeypatch.setattr(native, "unavailable", lambda: "there is no compiler in this test")
    elif native.unavailable():
        pytest.skip("without kernels nothing is packed; where there is a compiler, test_native.py fails then")
    predictor = Predictor(model, dtype, mode=mode, truncate=True)
    predictor.warm_up()
    assert predictor.engine._hidden._cache_size() == programs
    assert len(compiled) >= programs
    compiled.clear()
    texts = [" ".join(["the"] * n) for n in range(1, 50)]
    assert {len(ids) for ids in encode_texts(model.tokenizer, texts, None, model.config).ids} >= set(range(3, 41))
    for text in texts:
        predictor.classify(text)
    for count in (3, 130):
        many = (8 * texts)[:count]
        predictor.classify(many)
        for pooled in (None, "mean", "cls", "pooler"):
            predictor.encode(many, pooled)
        predictor.fill_mask([f"[MASK] {text}" for text in many])
    assert compiled == []


def test_warming_up_for_short_texts_leaves_out_longer_ones(made, monkeypatch):
    def shapes(kind: str, mode: Literal["latency", "throughput"], most: int) -> list[tuple[int, ...]]:
        return [batch.ids.shape for batch in Engine(made(kind), mode=mode)._shapes(most)]

    if not native.unavailable():
        for mode in ("latency", "throughput"):
            assert shapes("crammed", mode, 18) == [(1, 4), (1, 8), (1, 12), (1, 16), (1, 20)]
    assert shapes("fourier", "throughput", 80) == [(1, 40), (2, 40)]
    assert shapes("fourier", "throughput", 10) == [(1, 40)]
    monkeypatch.setattr(native, "unavailable", lambda: "there is no compiler in this test")
    assert shapes("crammed", "throughput", 18) == [(1, 8), (2, 8), (1, 16), (1, 24)]
    assert shapes("crammed", "latency", 18) == [(1, 8), (1, 16), (1, 24)]


@pytest.mark.parametrize("kind", ["rotary", "tree", "switch", "hybrid"])
def test_padding_changes_nothing(made, kind):
    """A text is computed as in a row without padding, or of the one length that the model reads."""
    model = made(kind)
    config = replace(model.config, tree_backend="gather")
    rows = encode_texts(model.tokenizer, [" ".join(WORDS[:7])], None, config)
    n = len(rows.ids[0])
    ids, segments, types = map(jnp.asarray, rows.pad([0], config.only_len or n))
    wanted = np.asarray(encode(model.params, config, ids, segments, type_ids=types)[0])[0, :n]
    engine = Engine(model, mode="latency")
    ((_, batch),) = engine.batches(rows)
    assert batch.ids.shape[1] > n
    np.testing.assert_allclose(engine.hidden(rows)[0], wanted, atol=1e-4)


def test_eight_threads_get_serial_answers(made):
    model = made("tree")
    predictor, cut = Predictor(model, mode="latency"), Predictor(model, truncate=True)
    serial = predictor.classify(TEXTS)
    long = [" ".join(9 * WORDS), *TEXTS]
    wanted = cut.classify(long)
    start = threading.Barrier(8)

    def ask(number: int):
        start.wait(timeout=600)
        for _ in range(5):
            if number % 2:
                assert predictor.classify(TEXTS) == serial
            else:
                assert cut.classify(long) == wanted
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_eight_threads_share_a_tokenizer(made):
    """Each cuts texts at its own length, which is a state of the tokenizer."""
    model = made("crammed")

    def lengths(most: int) -> set[int]:
        rows = (encode_texts(model.tokenizer, 8 * [" ".join(9 * WORDS)], None, model.config, most) for _ in range(50))
        return {len(ids) for row in rows for ids in row.ids}

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lengths, range(41, 49))) == [{most} for most in range(41, 49)]


def test_bad_requests_get_a_sentence(made):
    predictor = Predictor(made("crammed"))
    for text, message in (
        ("  ", "Text 2, '  ', is empty."),
        (" ".join(9 * WORDS), r"Text 2, '.*\.\.\.', has more than the 48 word pieces that this model reads \(\d+\)"),
        ("caf\udce9", "Text 2, 'caf.*', is not valid Unicode"),
    ):
        for ask in (predictor.encode, predictor.classify):
            with pytest.raises(UserError, match=message):
                ask(["fine", text])
    with pytest.raises(UserError, match="There are 2 texts and 1 second texts"):
        predictor.classify(["a", "b"], ["c"])
    assert predictor.encode([]) == predictor.classify([]) == predictor.fill_mask([]) == []
    cut = Predictor(made("crammed"), truncate=True)
    assert cut.encode([" ".join(9 * WORDS)])[0].shape == (48, 32)


def test_a_model_that_computes_no_finite_numbers_gets_a_sentence(made):
    model = made("crammed")
    broken = {**model.params["classifier"]["out"], "bias": np.array([np.nan, 0.0], np.float32)}
    wrecked = replace(model, params={**model.params, "classifier": {**model.params["classifier"], "out": broken}})
    with pytest.raises(
        UserError, match="Text 1, 'one', is given no finite number by this model, whose weights have diverged"
    ):
        Predictor(wrecked).classify(["one"])
    norm = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), model.params["encoder"]["final_norm"])
    wrecked = replace(model, params={**model.params, "encoder": {**model.params["encoder"], "final_norm": norm}})
    for ask in (lambda one: one.encode(["one"]), lambda one: one.fill_mask(["one [MASK]"])):
        with pytest.raises(UserError, match="is given no finite number"):
            ask(Predictor(wrecked))

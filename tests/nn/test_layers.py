"""What the layers of the encoder do in training and in inference, and how Fourier models are asked."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert import nn
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.data.encode import encode_texts
from ufbert.glue.finetune import teacher_scores
from ufbert.glue.tasks import Examples
from ufbert.hub.folder import ModelFolder, TaskInfo, load_model
from ufbert.inference.predictor import Predictor
from ufbert.ops import native, tree_kernels

SMALL = ModelConfig(
    vocab_size=60, max_len=16, d_model=32, n_layers=2, n_heads=2, d_hidden=24, pooler_width=16, init_std=0.2
)
IDS = jnp.asarray(np.random.default_rng(0).integers(5, 60, (3, 16)), jnp.int32)


def config(**changes) -> ModelConfig:
    return replace(SMALL, dropout=0.0, **changes)


encode = jax.jit(nn.encode, static_argnames=("config", "deterministic", "statistics"))


def run(cfg: ModelConfig, params=None, ids=IDS, **options):
    params = nn.init(cfg, jax.random.key(0)) if params is None else params
    hidden, aux = encode(params, cfg, ids, **options)
    names = {name for layer in aux.values() for name in layer.losses}
    return np.asarray(hidden), {name: sum(float(layer.losses[name]) for layer in aux.values()) for name in names}


def test_a_leaf_tree_is_soft_in_training_and_hard_in_inference():
    cfg = config(feedforward=("leaf_tree",), tree_depth=3, leaf_width=4)
    soft, hard = run(cfg, deterministic=False)[0], run(cfg)[0]
    assert np.abs(soft - hard).max() > 1e-2
    annealed = replace(cfg, leaf_temperature=1e-6)
    np.testing.assert_allclose(run(annealed, deterministic=False, progress=1.0)[0], hard, atol=1e-4)
    np.testing.assert_allclose(run(annealed, deterministic=False, progress=0.0)[0], soft, atol=1e-5)
    through = replace(cfg, leaf_training="hard")
    np.testing.assert_allclose(run(through, deterministic=False)[0], hard, atol=1e-4)


def test_hardening_follows_its_weight_and_its_ramp():
    cfg = config(feedforward=("leaf_tree",), tree_depth=2, leaf_width=4, leaf_hardening=2.0, leaf_hardening_ramp=0.5)
    full = run(cfg, deterministic=False, progress=0.5)[1]["hardening"]
    assert 0 < full < 2.0 * 2 * np.log(2)
    for progress, share in ((0.0, 0.0), (0.25, 0.5), (1.0, 1.0)):
        found = run(cfg, deterministic=False, progress=progress)[1]["hardening"]
        np.testing.assert_allclose(found, share * full, rtol=1e-5)
    assert run(cfg)[1] == {}
    np.testing.assert_allclose(
        run(replace(cfg, leaf_hardening=1.0), deterministic=False)[1]["hardening"], full / 2, rtol=1e-5
    )


def test_region_leak_needs_a_key():
    cfg = config(feedforward=("leaf_tree",), tree_depth=2, leaf_width=4, leaf_leak=0.5)
    still = run(cfg, deterministic=False)[0]
    assert np.abs(run(cfg, deterministic=False, key=jax.random.key(1))[0] - still).max() > 1e-3


def test_a_master_leaf_speaks_to_every_token():
    cfg = config(feedforward=("leaf_tree",), tree_depth=2, leaf_width=4, master_leaf=8)
    params = nn.init(cfg, jax.random.key(0))
    layer = params["encoder"]["layer_00"]["leaf_tree"]
    assert layer["master_in"]["kernel"].shape == (32, 8)
    assert float(layer["master_share"][0]) == 0.5
    plain = {name: value for name, value in layer.items() if not name.startswith("master")}
    alone = {"encoder": {**params["encoder"], "layer_00": {**params["encoder"]["layer_00"], "leaf_tree": plain}}}
    alone["encoder"]["layer_01"] = {**alone["encoder"]["layer_01"]}
    second = alone["encoder"]["layer_01"]["leaf_tree"]
    alone["encoder"]["layer_01"]["leaf_tree"] = {k: v for k, v in second.items() if not k.startswith("master")}
    without = jax.tree.map(lambda a: a, params)
    for name in ("layer_00", "layer_01"):
        without["encoder"][name]["leaf_tree"]["master_share"] = jnp.zeros((1,))
    np.testing.assert_allclose(run(cfg, without)[0], run(replace(cfg, master_leaf=0), alone)[0], atol=1e-5)
    assert np.abs(run(cfg, without)[0] - run(cfg, params)[0]).max() > 1e-2


def test_inference_of_a_switch_layer_does_not_depend_on_the_batch():
    cfg = config(feedforward=("switch",), n_experts=3, capacity_factor=0.5)
    params = nn.init(cfg, jax.random.key(0))
    whole = run(cfg, params)[0]
    np.testing.assert_allclose(run(cfg, params, IDS[1:2])[0], whole[1:2], atol=1e-5)
    dropped, losses = run(cfg, params, deterministic=False)
    assert np.abs(dropped - whole).max() > 1e-2
    assert set(losses) == {"router_balance", "router_z"}
    assert losses["router_balance"] >= 2 * 0.01 * 0.99  # two layers, one at perfect balance each


def test_switch_padding_counts_for_nothing():
    cfg = config(feedforward=("switch",), n_experts=3)
    params = nn.init(cfg, jax.random.key(0))
    segments = jnp.ones_like(IDS).at[:, 10:].set(0)
    one = run(cfg, params, segment_ids=segments, deterministic=False)
    other = run(cfg, params, IDS.at[:, 10:].set(7), segment_ids=segments, deterministic=False)
    np.testing.assert_array_equal(one[0][:, :10], other[0][:, :10])
    assert one[1] == other[1]


@pytest.mark.parametrize("kind", ["leaf_tree", "routed_tree", "switch", "tree"])
def test_bfloat16_compute_routes_as_float32_does(kind):
    """One layer on the same float32 input: the counts of what was used are the same numbers."""
    cfg = config(feedforward=(kind,), n_layers=1, tree_depth=4, leaf_width=4, n_experts=5, mixer=("fourier",))
    params = nn.init(cfg, jax.random.key(0))
    counts = []
    for dtype in ("float32", "bfloat16"):
        _, aux = nn.encode(params, replace(cfg, dtype=dtype), IDS, statistics=True)
        counts.append(aux)
    assert jax.tree.leaves(counts[0])
    jax.tree.map(np.testing.assert_array_equal, *counts)


def test_the_uniform_start_is_louder_than_the_papers():
    sizes = {}
    for start in ("normal", "uniform"):
        cfg = config(feedforward=("tree",), tree_depth=8, n_trees=1, tree_init=start, d_model=256, init_std=0.02)
        layer = nn.init(cfg, jax.random.key(0))["encoder"]["layer_00"]["tree"]
        sizes[start] = float(layer["w_out"].std())
        assert float(jnp.abs(layer["w_in"]).max()) > 0
        assert bool(layer["bias"].any()) == (start == "uniform")
    np.testing.assert_allclose(sizes["normal"], 0.02, rtol=0.05)
    np.testing.assert_allclose(sizes["uniform"], (9 * 3) ** -0.5, rtol=0.05)


def test_queries_and_keys_can_be_normalised_and_rotated():
    plain, normed = config(positions="rotary"), config(positions="rotary", qk_norm=True)
    params = nn.init(normed, jax.random.key(0))
    attention = params["encoder"]["layer_00"]["attention"]
    assert attention["query_norm"]["scale"].shape == (16,)
    louder = jax.tree.map(lambda a: a, params)
    louder["encoder"]["layer_00"]["attention"]["query"]["kernel"] *= 50.0
    np.testing.assert_allclose(run(normed, params)[0], run(normed, louder)[0], atol=1e-4)
    base = nn.init(plain, jax.random.key(0))
    assert np.abs(run(plain, base)[0] - run(plain, base, IDS[:, ::-1])[0][:, ::-1]).max() > 1e-3
    shifted = run(plain, base, position_ids=jnp.arange(16)[None] + 9)[0]
    np.testing.assert_allclose(run(plain, base)[0], shifted, atol=1e-4)  # only distances matter
    xla = run(replace(plain, attention_impl="xla"), base)[0]
    np.testing.assert_allclose(run(plain, base)[0], xla, atol=1e-5)


@pytest.fixture
def fourier_model(run_folder):
    tokenizer = load_model(run_folder / "model").tokenizer
    cfg = config(vocab_size=tokenizer.get_vocab_size(), mixer=("fourier", "attention"), fixed_len=12)
    params = nn.init(cfg, jax.random.key(0))
    params["classifier"] = nn.init_classifier(cfg, jax.random.key(1), 2)
    return ModelFolder(cfg, params, tokenizer, TaskInfo("toy", ("no", "yes"), {}))


def test_a_fourier_model_has_one_length_and_one_answer(fourier_model):
    texts = ["the cat", "the dog sees the king in the old castle and the river finds the bird", "a bird"]
    rows = encode_texts(fourier_model.tokenizer, texts, None, fourier_model.config, 64)
    assert rows.pad([0]).ids.shape == (1, 12)
    assert rows.pad([0, 1, 2]).ids.shape == (3, 12)
    together = teacher_scores(fourier_model, Examples(texts, None, None), FinetuneConfig(max_len=64))
    predictor = Predictor(fourier_model, truncate=True)
    for text, scores in zip(texts, together, strict=True):
        odds = np.exp(scores - scores.max())
        (answer,) = predictor.classify([text])
        assert answer.label == ("no", "yes")[int(scores.argmax())]
        assert answer.probability is not None
        np.testing.assert_allclose(answer.probability, odds.max() / odds.sum(), atol=1e-5)


def test_native_trees_train_as_gathered_ones_alone_and_several_at_once():
    """Also under the `vmap` of fine-tuning, whose runs have weights of their own."""
    if native.unavailable():
        pytest.skip(f"this machine has no native kernels ({native.unavailable()}); gather is used instead, and tested")
    cfg = config(feedforward=("tree",), tree_depth=4)
    params = jax.vmap(lambda key: nn.init(cfg, key))(jax.random.split(jax.random.key(0), 2))

    def slopes(params, backend):
        def loss(params):
            return jnp.sum(jnp.sin(nn.encode(params, replace(cfg, tree_backend=backend), IDS)[0]))

        return jax.grad(loss)(params)

    found, wanted = (jax.jit(jax.vmap(lambda p, b=b: slopes(p, b)))(params) for b in ("native", "gather"))
    alone = jax.jit(lambda p: slopes(p, "native"))(jax.tree.map(lambda leaf: leaf[1], params))
    assert float(jnp.abs(wanted["encoder"]["layer_00"]["tree"]["w_in"]).max()) > 1e-4
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5), found, wanted)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other[1], rtol=1e-5, atol=2e-5), alone, found)


def test_a_model_for_native_kernels_runs_without_them_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler in this test")
    cfg = config(feedforward=("tree",), tree_depth=7, tree_backend="native")
    assert [nn.tree_backend(cfg, 2), nn.tree_backend(cfg, 2)] == ["gather", "gather"]
    said = "no native tree kernels: no compiler in this test; gather computes the trees instead\n"
    assert capsys.readouterr().err == said
    np.testing.assert_array_equal(run(cfg)[0], run(replace(cfg, tree_backend="gather"))[0])


def test_a_model_for_a_gpus_kernels_runs_without_them_and_says_so(monkeypatch, capsys):
    cfg = config(feedforward=("tree",), tree_depth=7, tree_backend="pallas")
    monkeypatch.setattr(native, "unavailable", lambda: "")
    assert nn.tree_backend(cfg, 2) == "native"
    assert capsys.readouterr().err == (
        "no pallas tree kernels: the default device is no NVIDIA GPU; native computes the trees instead\n"
    )
    monkeypatch.setattr(tree_kernels, "unavailable", lambda: "")
    assert nn.tree_backend(cfg, 2) == "pallas"


def test_layers_of_a_kind_are_drawn_apart_by_one_program():
    cfg = config(feedforward=("dense", "tree"), n_layers=6, d_hidden=7, tree_depth=2)
    before = nn.model._init_layer._cache_size()
    layers = nn.init(cfg, jax.random.key(0))["encoder"]
    assert nn.model._init_layer._cache_size() == before + 2
    for part in ("dense", "tree"):
        drawn = [np.asarray(jax.tree.leaves(layers[f"layer_{i:02d}"][part])[-1]) for i in range(part == "tree", 6, 2)]
        assert len(np.unique(drawn)) > 0.9 * sum(one.size for one in drawn)


def test_auto_takes_what_was_measured_fastest(monkeypatch):
    tree = config(feedforward=("tree",), tree_depth=11)
    monkeypatch.setattr(native, "unavailable", lambda: "")
    assert nn.tree_backend(tree, 1) == "native"
    monkeypatch.setattr(native, "unavailable", lambda: pytest.fail("a dense model needs no kernels"))
    assert nn.tree_backend(config(feedforward=("dense",)), 1) != "native"
    monkeypatch.setattr(native, "unavailable", lambda: "")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert [nn.tree_backend(tree, rows) for rows in (1, 4096)] == ["gather", "gather"]
    shallow = replace(tree, tree_depth=4)
    assert [nn.tree_backend(shallow, rows) for rows in (1, 4096)] == ["gather", "masked"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [nn.tree_backend(model, 1) for model in (tree, shallow)] == ["gather", "masked"]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert [nn.tree_backend(model, 1) for model in (tree, shallow)] == ["masked", "masked"]

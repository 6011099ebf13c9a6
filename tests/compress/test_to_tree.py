"""A dense feedforward as a tree: exact where it can be, refits that only help, and children that answer alike everywhere."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import COMPRESS

from ufbert import nn
from ufbert.cli import call
from ufbert.compress.report import read_results
from ufbert.compress.to_tree.children import (
    Gauge,
    TreeSettings,
    activations,
    answers,
    fit,
    neurons_of,
    to_trees,
    unexplained,
    without,
)
from ufbert.compress.to_tree.neurons import Neurons, moments, most_useful, refitted
from ufbert.compress.to_tree.splits import grow, leaves
from ufbert.data.encode import Encoded
from ufbert.errors import UserError
from ufbert.hub.folder import flat_shapes, flatten, load_model
from ufbert.inference.engine import Engine
from ufbert.nn.registry import FEEDFORWARDS


def draw(f=24, d=8, n=400, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(n, d), (d, f), (f,), (f, d), (d,)]
    x, *weights = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, Neurons(*weights)


def even(x, neurons):
    return Gauge(np.ones(len(x), np.float32), np.ones(len(neurons.b_out), np.float32))


def error(x, neurons, settings):
    """Of the answers on the sample itself, for each width."""
    wanted = activations(x, neurons, "gelu") @ neurons.w_out + neurons.b_out
    trees = fit(x, neurons, "gelu", settings, even(x, neurons))
    return [unexplained(wanted, answers(x, neurons, tree, "gelu")) for tree in trees]


@pytest.mark.parametrize("split", ["tokens", "neurons"])
def test_neurons_that_are_active_on_one_side_of_a_hyperplane_become_a_tree_without_error(split):
    rng = np.random.default_rng(0)
    side = np.repeat([1.0, -1.0], 200).astype(np.float32)
    x = rng.normal(size=(400, 8)).astype(np.float32)
    x[:, 0] = side * rng.uniform(2.0, 4.0, 400)  # two groups of tokens, with a gap between
    w_in = 0.1 * rng.normal(size=(8, 24)).astype(np.float32)
    w_in[0] = np.repeat([1.0, -1.0], 12)
    neurons = Neurons(
        w_in, np.full(24, -0.1, np.float32), rng.normal(size=(24, 8)).astype(np.float32), np.ones(8, np.float32)
    )
    settings = TreeSettings(neurons=(13,), depth=1, split=split, choice="contribution", refit="none")
    (tree,) = fit(x, neurons, "relu", settings, even(x, neurons))
    wanted = activations(x, neurons, "relu") @ neurons.w_out + neurons.b_out
    np.testing.assert_allclose(answers(x, neurons, tree, "relu"), wanted, atol=1e-4)
    (narrow,) = fit(x, neurons, "relu", replace(settings, depth=0), even(x, neurons))
    assert unexplained(wanted, answers(x, neurons, narrow, "relu")) > 0.1, (
        "as many neurons for all tokens do not suffice"
    )


@pytest.mark.parametrize("depth", [0, 2])
def test_a_refit_never_increases_the_error_on_its_sample(depth):
    x, neurons = draw()
    for choice in ("contribution", "greedy"):
        settings = TreeSettings(neurons=(depth + 3, depth + 8), depth=depth, choice=choice)
        none, mean, ridge = (error(x, neurons, replace(settings, refit=refit)) for refit in ("none", "mean", "ridge"))
        for i in range(2):
            assert ridge[i] < mean[i] < none[i]
        assert ridge[1] < ridge[0]


def test_a_refit_is_the_ridge_regression_of_what_is_left_out():
    x, neurons = draw(f=6)
    active = activations(x, neurons, "gelu")
    tokens, wanted = np.linspace(0.5, 2.0, len(x)).astype(np.float32), active @ neurons.w_out
    sample = moments(active, wanted, tokens, np.ones(6, np.float32), 6)
    out = refitted(sample, neurons.w_out, np.arange(3), "ridge", ridge=0.1)
    kept = sample.candidates[:3]
    share = tokens / tokens.sum()
    centred = active[:, kept] - share @ active[:, kept]
    gram = (centred * share[:, None]).T @ centred
    left = wanted - active[:, kept] @ neurons.w_out[kept]
    penalty = 0.1 * np.mean(np.diag(gram)) * np.eye(3)
    change = np.linalg.solve(gram + penalty, (centred * share[:, None]).T @ (left - share @ left))
    np.testing.assert_allclose(out.w_out, neurons.w_out[kept] + change, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(share @ (active[:, kept] @ out.w_out + out.b_out - wanted), 0.0, atol=1e-4)


def test_the_greedy_choice_takes_at_each_step_the_neuron_that_lowers_the_error_most():
    x, neurons = draw(f=7)
    active = activations(x, neurons, "gelu")
    active, wanted = active - active.mean(axis=0), (active - active.mean(axis=0)) @ neurons.w_out

    def left(kept):
        return np.square(wanted - active[:, kept] @ np.linalg.lstsq(active[:, kept], wanted)[0]).sum()

    sample = moments(active, wanted, np.ones(len(x), np.float32), np.ones(7, np.float32), 7)
    order = [int(sample.candidates[place]) for place in most_useful(sample, np.ones(8, np.float32), 4)]
    for i in range(4):
        assert order[i] == min(set(range(7)) - set(order[:i]), key=lambda j: left([*order[:i], j]))


@pytest.mark.parametrize("split", ["tokens", "neurons", "random"])
def test_the_tokens_of_the_sample_are_spread_evenly_over_the_leaves(split):
    x, neurons = draw(n=800)
    decisions = grow(x, np.abs(activations(x, neurons, "gelu")), 3, split, seed=1)
    assert np.bincount(leaves(x, decisions), minlength=8).tolist() == [100] * 8
    np.testing.assert_allclose(np.linalg.norm(decisions.node, axis=1), 1.0, rtol=1e-5)
    if split == "neurons":
        np.testing.assert_array_equal(decisions.neurons.sum(axis=0), 1, "every neuron is in one cluster")


IDS = np.random.default_rng(0).integers(5, 40, (4, 12))


def inputs_of(model):
    found = jax.jit(nn.feedforward_inputs, static_argnums=1)(model.params, model.config, IDS, 0 * IDS + 1, 0 * IDS)
    return [np.asarray(x).reshape(-1, x.shape[-1]) for x in found]


def hidden(model, config=None, params=None):
    encode = jax.jit(nn.encode, static_argnums=1)
    return np.asarray(encode(params or model.params, config or model.config, IDS)[0])


def test_the_inputs_of_feedforwards_are_those_that_the_blocks_read(numbered):
    model = numbered("bert", "classifier")
    above = model.params["encoder"]["layer_01"]
    (_, x), dense = inputs_of(model), neurons_of(above["dense"])
    y = x + activations(x, dense, "gelu") @ dense.w_out + dense.b_out
    y = (y - y.mean(axis=1, keepdims=True)) / np.sqrt(y.var(axis=1, keepdims=True) + model.config.norm_eps)
    scale, bias = (np.asarray(above["feedforward_norm"][part]) for part in ("scale", "bias"))
    y = y * scale + bias
    np.testing.assert_allclose(y.reshape(4, 12, -1), hidden(model), atol=1e-4)


@pytest.mark.parametrize(("use_bias", "depth", "shared"), [(True, 2, 0), (False, 1, 5), (True, 0, 0), (False, 0, 0)])
def test_all_neurons_reproduce_the_dense_model(numbered, use_bias, depth, shared):
    model = numbered("bert", "classifier", n_layers=1, use_bias=use_bias)
    settings = TreeSettings(neurons=(24 + depth + shared,), depth=depth, shared=shared)
    ((config, params),) = to_trees(model.config, model.params, inputs_of(model), settings)
    shapes = {path: array.shape for path, array in flatten(params).items()}
    assert shapes == flat_shapes(config, ("classifier",), 2)
    np.testing.assert_allclose(hidden(model, config, params), hidden(model), atol=1e-5)


def test_a_child_answers_alike_in_training_and_in_the_engine_and_more_neurons_come_nearer(numbered):
    model = numbered("bert", "classifier", n_layers=1)
    samples, wanted = inputs_of(model), hidden(model)
    off = []
    for config, params in to_trees(
        model.config, model.params, samples, TreeSettings(neurons=(6, 18), depth=2, shared=1)
    ):
        y = hidden(model, config, params)
        off.append(float(np.square(y - wanted).mean()))
        engine = Engine(replace(model, config=config, params=params))
        rows = Encoded(IDS.tolist(), (0 * IDS).tolist(), config.max_len, 0, 0, 0)
        np.testing.assert_allclose(np.stack(engine.hidden(rows)), y, atol=2e-5)
    config, params = without(model.config, model.params, samples)
    off.insert(0, float(np.square(hidden(model, config, params) - wanted).mean()))
    assert off == sorted(off, reverse=True)
    assert off[2] < 0.5 * off[0]


def test_settings_that_do_not_fit_are_sentences(numbered):
    model = numbered("bert", "classifier")
    samples = inputs_of(model)

    def refused(sentence, model=model, samples=samples, **settings):
        with pytest.raises(UserError, match=sentence):
            to_trees(model.config, model.params, samples, TreeSettings(**{"neurons": (8,), **settings}))

    refused("leave none for a leaf", neurons=(8, 4), depth=4)
    refused("a layer has 24", neurons=(30,), depth=2)
    refused("a layer has 24", neurons=(60,), depth=2, shared=34)
    refused("only where neurons are split", depth=2, choice="cluster", split="tokens")
    refused("16 leaves need at least 64 tokens", neurons=(9,), samples=[x[:63] for x in samples])
    refused("dense feedforward", model=numbered("crammed"))
    refused("trees already", model=replace(model, config=replace(model.config, feedforward=("dense", "tree"))))


@pytest.mark.long
def test_the_command_leaves_children_and_controls_that_load_and_are_compared(tuned_folder, toy_task, tmp_path):
    out = tmp_path / "out"
    given = ["--method=to-tree", "--tree-depth=1", "--neurons", "8", "--calibration-tokens=200", f"--out={out}"]
    call(
        "compress",
        [str(tuned_folder), *given, "--controls", "narrow", "--budget=2steps", *toy_task, *COMPRESS, "--types"],
    )
    results = read_results(out)
    names = ["tree_8", "narrow_8"]
    assert [row.name for row in results.rows] == ["before", *names]
    for name, folder in zip(names, [out, *(out / name for name in names[1:])], strict=True):
        child = load_model(folder / "model")
        layer = FEEDFORWARDS[child.config.feedforward[0]]
        assert layer.neurons(child.config)[0] == int(name.rpartition("_")[2])
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2, "each child is tuned by the budget"
    assert [row.neurons for row in results.rows] == [24, 8, 8]
    assert not any(row.milliseconds for row in results.rows), "no types, no timing"
    assert "Narrow children have dense feedforwards" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("sentence", "given"),
    [
        ("looks at what the layers read", []),
        ("none twice", ["--neurons", "8", "8"]),
        ("has no use for it", ["--keep=0.5"]),
    ],
)
def test_a_command_that_cannot_be_followed_is_a_sentence(sentence, given, tuned_folder, toy_task, tmp_path):
    rows = toy_task if given else []
    with pytest.raises(UserError, match=sentence):
        call("compress", [str(tuned_folder), "--method=to-tree", f"--out={tmp_path / 'out'}", *given, *rows, *COMPRESS])
    assert not (tmp_path / "out").exists(), "the mended command may name it again"

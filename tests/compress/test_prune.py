"""Structured pruning: what is cut out answers as what was masked, everywhere, and the wrong is refused in a sentence."""

import signal
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from conftest import COMPRESS

from ufbert import nn
from ufbert.cli import call
from ufbert.compress import prune
from ufbert.compress.depth import cut_tree, layer_pairs, layers_to_keep, with_depth, with_layers, with_own_leaves
from ufbert.compress.material import TaskMaterial
from ufbert.compress.parts import by_magnitude, head_groups, keep_best, masks_of, neuron_groups, without
from ufbert.compress.prune import cubic, parse_latency
from ufbert.compress.report import read_results
from ufbert.compress.tune import masked
from ufbert.cost.flops import forward_flops_per_token
from ufbert.data.encode import Encoded
from ufbert.errors import Interrupted, UserError
from ufbert.hub.convert import export_model, import_weights, read_checkpoint
from ufbert.hub.folder import ModelFolder, flatten, load_model, save_model
from ufbert.hub.onnx_export import export_onnx
from ufbert.inference.engine import Engine

IDS = jnp.asarray(np.random.default_rng(0).integers(5, 60, (3, 40)))


def hidden(model: ModelFolder) -> np.ndarray:
    encode = jax.jit(partial(nn.encode, config=model.config))
    return np.asarray(encode(model.params, ids=IDS[:, : model.config.only_len or 16])[0])


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
    whole = numbered(name, n_heads=4)
    model = with_own_leaves(whole)
    np.testing.assert_allclose(hidden(model), hidden(whole), atol=1e-5)
    small, reference = pruned(model)
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
    export_onnx(loaded, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.asarray(IDS[:, :16], np.int64)
    found = session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    np.testing.assert_allclose(found, hidden(reference), atol=1e-4)
    with pytest.raises(UserError, match=r"\(head_width, layer_hidden\), as pruning leaves it; .* --to onnx"):
        export_model(loaded, tmp_path / "hf", "hf")


def test_a_model_of_fewer_neurons_alone_travels_to_hugging_face_and_back(numbered, tmp_path):
    model = numbered("bert", "masked_lm", pooler_width=32)
    groups = neuron_groups(model.config)
    kept = keep_best(by_magnitude(model.params, groups), groups, {group.out: 9 for group in groups})
    params, config = without(model.params, model.config, kept, groups)
    assert (config.d_hidden, config.layer_hidden) == (9, ())
    export_model(replace(model, params=params, config=config), tmp_path / "hf", "hf")
    tensors, values, _ = read_checkpoint(tmp_path / "hf")
    assert values["intermediate_size"] == 9
    back = import_weights(tensors, values, "it")
    for path, array in flatten(params).items():
        np.testing.assert_array_equal(flatten(back.params)[path], array)


def forced(model: ModelFolder, path: str, node: int, right: bool) -> None:
    """Make a node of a tree of neurons send everything one way, and be silent."""
    layer, kind = path.split(".")[1:3]
    part = model.params["encoder"][layer][kind]
    names = ("w_in", "bias") if kind == "tree" else ("node", "node_bias")
    at = (0, node) if kind == "tree" else node
    part[names[0]] = part[names[0]].at[at].set(0.0)
    part[names[1]] = part[names[1]].at[at].set(1.0 if right else -1.0)
    if kind == "tree":
        part["w_out"] = part["w_out"].at[at].set(0.0)


@pytest.mark.parametrize("name", ["tree", "leaf tree"])
def test_a_shallower_tree_answers_as_that_whose_dead_nodes_send_all_tokens_one_way(numbered, name):
    model = numbered(name, n_layers=1, tree_depth=3)
    kind = model.config.feedforward[0]
    # The root's left half is dead: its right child takes the root's place, and nothing else changes.
    forced(model, f"encoder.layer_00.{kind}", 0, right=True)
    feed = model.params["encoder"]["layer_00"][kind]
    dead = [1, 3, 4, 7, 8, 9, 10]  # of a heap; a leaf tree's leaves follow its 7 nodes
    if kind == "tree":
        feed["w_out"] = feed["w_out"].at[0, jnp.array(dead)].set(0.0)
    else:
        feed["leaf_out"] = feed["leaf_out"].at[:4].set(0.0)
    small = with_depth(model, 2, None, 1, 0)
    assert small.config.tree_depth == 2
    np.testing.assert_allclose(hidden(small), hidden(model), atol=1e-5)


def test_the_cheapest_cut_crosses_every_path_once():
    rng = np.random.default_rng(0)
    for leaves in (False, True):
        scores = rng.random(8 if leaves else 15)
        nodes, ends = cut_tree(scores, 3, 2, leaves=leaves)
        assert len(nodes) == (3 if leaves else 7)
        assert len(ends) == (4 if leaves else 0)
        kept = {*nodes, *(end + 7 for end in ends)}
        for leaf in range(7, 15):
            path = [leaf]
            while path[-1]:
                path.append((path[-1] - 1) // 2)
            assert len(kept.intersection(path)) <= 3
    # Of a tree of two levels every cut is known: the root and its lesser child, or both children.
    assert cut_tree(np.array([0.0, 1.0, 9.0]), 1, 0, leaves=False) == ([2], [])
    assert cut_tree(np.array([9.0, 1.0, 2.0]), 1, 0, leaves=False) == ([0], [])
    assert cut_tree(np.array([3.0, 1.0]), 1, 0, leaves=True) == ([], [0])


def test_layers_go_that_matter_least_and_the_rest_answers(numbered):
    model = numbered("crammed", n_layers=3)
    silent = model.params["encoder"]["layer_01"]
    for part in ("attention", "glu"):
        silent[part]["out"]["kernel"] = jnp.zeros_like(silent[part]["out"]["kernel"])
    small = with_layers(model, [0, 2])
    assert small.config.n_layers == 2
    np.testing.assert_allclose(hidden(small), hidden(model), atol=1e-5)
    assert layers_to_keep(model, 2, None, 1, 0) == [0, 2]
    assert layer_pairs([0, 2], 3) == ((0, 1), (1, 2))
    with pytest.raises(UserError, match="There is no layer 3 to keep"):
        with_layers(model, [0, 3])
    with pytest.raises(UserError, match="in pairs cannot go"):
        with_layers(numbered("skips"), [0, 1])


def test_many_go_at_first_and_few_at_last():
    left = [cubic(100, 20, x / 8) for x in range(9)]
    assert (left[0], left[-1]) == (100, 20)
    steps = -np.diff(left)
    assert (np.diff(steps) <= 1).all()
    assert steps[0] > 4 * steps[-2]


def options(folder, out, *more: str) -> list[str]:
    return [str(folder), f"--out={out}", "--budget=8steps", "--calibration=2", *COMPRESS, *more]


@pytest.mark.long
def test_a_stopped_pruning_goes_on_to_the_same_child(tuned_folder, toy_task, tmp_path, monkeypatch):
    cut = ["--method=prune", "--keep=0.5", "--keep-heads=1", *toy_task]
    call("compress", options(tuned_folder, tmp_path / "whole", *cut))
    results = read_results(tmp_path / "whole")
    before, after = results.rows
    assert after.parameters < before.parameters
    assert after.flops < before.flops
    assert results.updates == 8
    child, out, plain = load_model(tmp_path / "whole" / "model"), tmp_path / "stopped", TaskMaterial.batch
    assert (child.config.d_hidden, child.config.n_heads, child.config.head_width) == (12, 1, 16)
    stops = [6, 3]  # after the ramp, and before that during it, at its first stages' end

    def batch(self, step):
        if step >= 2 and step == stops[-1]:
            stops.pop()
            stops.insert(0, 10**6)
            signal.raise_signal(signal.SIGTERM)
        return plain(self, step)

    monkeypatch.setattr(TaskMaterial, "batch", batch)
    for resume in ([], ["--resume"]):
        with pytest.raises(Interrupted, match="go on with the same command and --resume"):
            call("compress", options(tuned_folder, out, *cut, *resume))
    with pytest.raises(UserError, match=r"was started with --keep=0\.5; it cannot go on with --keep=0\.25"):
        call("compress", options(tuned_folder, out, *cut, "--keep=0.25", "--resume"))
    call("compress", options(tuned_folder, out, *cut, "--resume"))
    with pytest.raises(UserError, match="is finished"):
        call("compress", options(tuned_folder, out, *cut, "--resume"))
    wanted, found = flatten(child.params), flatten(load_model(out / "model").params)
    for path, array in wanted.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--keep=0"], "--keep is 0; it is the share of the hidden neurons that stays, above 0"),
        (["--keep=2"], "--keep is 2; it is the share"),
        ([], "Nothing is to go: give --keep"),
        (["--keep-heads=3"], "--keep-heads is 3, and a layer of the model has 2"),
        (["--keep-layers=3"], "--keep-layers is 3, and the model has 2"),
        (["--keep-depth=2"], "has no trees, and --keep-depth"),
        (["--target-latency=5"], "'5' is not a time; 10ms is one"),
        (["--target-latency=1ms", "--keep=0.5"], "chooses --keep and --keep-heads itself"),
        (["--target-latency=0.0001ms"], "is below what an almost empty model takes here"),
        (["--target-latency=100s"], "so that nothing need go for 100s"),
        (["--keep=0.5", "--student=tiny"], "--student belongs to --method distill; --method prune has no use for it"),
        (["--keep=0.5", "--corpus=demo"], "has no masked-LM head, so it cannot be tuned on text"),
        (["--keep=0.5", "--shape=1x999"], "has rows of 999 tokens; the model reads 48"),
        (["--keep=0.5", "--resume"], "There is no compression in"),
    ],
)
def test_wrong_prunings_are_refused_in_a_sentence(tuned_folder, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        call("compress", options(tuned_folder, tmp_path / "child", "--method=prune", *more))
    assert not (tmp_path / "child").exists(), "the mended command may name it again"


def test_a_latency_is_reached_by_the_largest_share_that_is_fast_enough(numbered, tmp_path, monkeypatch):
    save_model(tmp_path / "model", numbered("bert", n_heads=8))
    times = lambda models, shape, blocks: {"it": [1e-3 * models["it"][0].config.n_heads]}  # noqa: E731
    monkeypatch.setattr(prune, "time_models", times)
    out = tmp_path / "child"
    call("compress", options(tmp_path / "model", out, "--method=prune", "--target-latency=5.5ms"))
    child = load_model(out / "model")
    assert (child.config.n_heads, child.config.d_hidden) == (5, 15)
    assert (
        "Chosen for 5.5ms: 5 of 8 heads, 15 of 24 neurons a layer, 5.00 ms in float32."
        in (out / "report.md").read_text()
    )


@pytest.mark.long
def test_a_pretrained_model_is_pruned_on_text(numbered, tmp_path):
    save_model(tmp_path / "model", numbered("crammed", "masked_lm", n_layers=3))
    rng = np.random.default_rng(0)
    lines = [" ".join(f"word{i}" for i in rng.integers(0, 50, 60)) for _ in range(80)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    more = [
        f"--corpus=text:{tmp_path / 'text.txt'}",
        "--keep-layers=2",
        "--keep=0.5",
        "--spread=free",
        "--train-rows=0",
    ]
    call("compress", options(tmp_path / "model", tmp_path / "child", "--method=prune", *more))
    results = read_results(tmp_path / "child")
    assert results.unit == "nats"
    assert load_model(tmp_path / "child" / "model").config.n_layers == 2
    assert "Layers that stay: " in (tmp_path / "child" / "report.md").read_text()


def test_a_folder_without_a_classifier_is_tuned_on_no_task(numbered, toy_task, tmp_path):
    save_model(tmp_path / "model", numbered("bert", "masked_lm"))
    with pytest.raises(UserError, match="has no classifier, so it cannot be tuned on a task; fine-tune it first"):
        call("compress", options(tmp_path / "model", tmp_path / "child", "--method=prune", "--keep=0.5", *toy_task))
    assert parse_latency("0.5s") == 500.0

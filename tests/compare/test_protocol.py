"""The models of a comparison: presets, variants of them, the sweep from one deep tree to all dense, and what is refused."""

from dataclasses import replace

import pytest
from made import ASKED

from ufbert.compare import memory
from ufbert.compare.collect import control_of, random_twin_of
from ufbert.compare.memory import most_bytes, refuse_too_large
from ufbert.compare.protocol import models_of, refuse_shapes, same_comparison
from ufbert.config.presets import load_preset, scaled
from ufbert.cost.flops import neurons
from ufbert.errors import UserError
from ufbert.options.compare import CompareOptions
from ufbert.plan.counts import planned_model
from ufbert.plan.target import Target

OPTIONS = CompareOptions(out="c", tokens=1e6, scale="mini")


def test_presets_variants_and_files_are_models(tmp_path):
    own = tmp_path / "my_layer.py"
    own.write_text('from ufbert.config.presets import load_preset\nconfig = load_preset("crammed_bert")\n')
    words = ("crammed_bert", "narrow: --config=crammed_bert --model.d-hidden=64", str(own))
    models = models_of(replace(OPTIONS, presets=words), {"scale": "mini", "train.n_evals": 9, "tasks": "RTE"})
    shared = {"scale": "mini", "train.n_evals": 9}
    assert models == {
        "crammed_bert": {**shared, "config": "crammed_bert"},
        "narrow": {**shared, "config": "crammed_bert", "model.d_hidden": 64},
        "my_layer": {**shared, "config": str(own)},
    }


def test_the_sweep_goes_from_one_deep_tree_to_a_dense_layer_of_the_same_neurons():
    models = models_of(replace(OPTIONS, sweep="1,8,512,all"), {"scale": "mini"})
    assert list(models) == ["trees_1x9", "trees_8x6", "trees_512x0", "trees_all"]
    found = {}
    for name, given in models.items():
        run = scaled(load_preset(given["config"]), "mini")
        changes = {key.removeprefix("model."): value for key, value in given.items() if key.startswith("model.")}
        found[name] = neurons(replace(run.model, **changes))
    assert found == {
        "trees_1x9": (10, 1023), "trees_8x6": (56, 1016), "trees_512x0": (512, 512), "trees_all": (1023, 1023),
    }  # fmt: skip
    assert list(models_of(replace(OPTIONS, scale="base", sweep="1,2"), {})) == ["trees_1x11", "trees_2x10"]


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"presets": ("crammed_bert", "crammed_bertt")}, {}, r"model crammed_bertt: There is no preset .*did you mean"),
        ({"presets": ("crammed_bert", "crammed_bert")}, {}, "named twice"),
        ({"presets": ("crammed_bert",)}, {}, "at least two models"),
        ({"presets": ("a b", "c")}, {}, "no name of a model"),
        ({"presets": ("a", "b: --model.n-layrs=2")}, {}, "n_layers"),
        ({"presets": ("a", "b"), "scale": "auto"}, {}, "needs a --scale"),
        ({"presets": ("a", "b")}, {"config": "tiny"}, "--config does not go with compare"),
        ({"sweep": "1,two"}, {}, "no number of trees; take 1 to 1024, or all"),
        ({"sweep": "1,2000"}, {}, "no number of trees"),
    ],
)
def test_models_that_are_none_are_refused(changes, given, words):
    with pytest.raises(UserError, match=words):
        models_of(replace(OPTIONS, **changes), given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out": ""}, "needs --out"),
        ({"tokens": 0.0}, "--budget, the same time for all, or --tokens"),
        ({"init_from": "x"}, "--init-from does not go"),
        ({"shapes": ("8",)}, "'8' is not a shape"),
        ({"shapes": ()}, "--no-speed"),
        ({"at_once": 0}, "--at-once"),
        ({"price": float("inf")}, "--price"),
        ({"glue_dir": "g", "glue_source": "dir:g"}, "give one of the two"),
        ({"glue_seeds": "0,0"}, "twice"),
        ({"blocks": 0}, "--blocks is 0"),
    ],
)
def test_wrong_options_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        replace(OPTIONS, **changes)


def test_a_model_that_reads_other_lengths_than_are_timed_is_refused():
    runs = {name: scaled(load_preset(name), "mini") for name in ("crammed_bert", "fnet")}
    refuse_shapes(runs, ["1x128", "8x128"])
    with pytest.raises(UserError, match=r"fnet reads texts of 128 tokens only, and --shapes asks for 1x64: leave out"):
        refuse_shapes({"fnet": runs["fnet"]}, ["8x128", "1x64"])
    with pytest.raises(UserError, match="crammed_bert reads at most 128 tokens, and --shapes asks for 2x512"):
        refuse_shapes(runs, ["2x512"])


def test_a_model_that_does_not_fit_is_refused_and_what_surely_fits_is_not_compiled(monkeypatch):
    runs = {"crammed_bert": load_preset("crammed_bert")}
    planned = planned_model(runs["crammed_bert"], dtype="float32", trees="gather")
    small = Target("a machine", None, on_cpu=True, local=True, dtype="float32")
    counted = []

    class Counts:
        def memory(self, rows: int) -> float:
            return 5e9

    def count_run(run):
        counted.append(run)
        return Counts()

    monkeypatch.setattr(memory, "count_run", count_run)
    monkeypatch.setattr(Target, "memory", property(lambda self: most_bytes(planned)))
    refuse_too_large(runs, small, 1)
    assert not counted
    monkeypatch.setattr(Target, "memory", property(lambda self: 6e9))
    refuse_too_large(runs, small, 1)
    assert len(counted) == 1
    with pytest.raises(
        UserError, match=r"crammed_bert does not fit: its training, with 2 at once, takes 10.00 GB .* are 6.00"
    ):
        refuse_too_large(runs, small, 2)


def test_controls_are_recognised_by_their_architecture():
    configs = {
        name: scaled(load_preset(name), "mini").model
        for name in (
            "ultrafastbert_1x11", "path_dense_1x11", "path_dense_128x4", "ultrafastbert_128x4", "crammed_bert",
            "fixed_tree_1x11", "no_feedforward",
        )
    }  # fmt: skip
    controls = {name: control_of(config, configs) for name, config in configs.items()}
    assert {name: control for name, control in controls.items() if control} == {
        "ultrafastbert_1x11": "path_dense_1x11",
        "fixed_tree_1x11": "path_dense_1x11",
        "ultrafastbert_128x4": "path_dense_128x4",
    }
    twins = {name: random_twin_of(config, configs) for name, config in configs.items()}
    assert {name: twin for name, twin in twins.items() if twin} == {"ultrafastbert_1x11": "fixed_tree_1x11"}
    other = {"path_dense_1x11": replace(configs["path_dense_1x11"], positions="rotary")}
    assert control_of(configs["ultrafastbert_1x11"], other) == ""


def test_a_comparison_goes_on_with_its_rows_and_protocol_only():
    same_comparison(ASKED, replace(ASKED, models=[*ASKED.models, "fnet"], tasks=["rte", "cola"], seeds=[0, 1, 2]))
    with pytest.raises(UserError, match="started with --glue-source dir:glue; it cannot go on with hf"):
        same_comparison(ASKED, replace(ASKED, source="hf"))
    with pytest.raises(UserError, match="baseline is 'x', which is none of its models"):
        replace(ASKED, baseline="x")

"""Options: preset < scale < recipe < what was given, for the command line and for Python alike."""

import json
from pathlib import Path

import pytest

from ufbert.cli import parse, split_verb
from ufbert.config.presets import load_preset, scaled, with_recipe
from ufbert.cost.speeds import Speeds
from ufbert.errors import UserError
from ufbert.options.given import from_given, named_values, over
from ufbert.options.train import PlanOptions, TrainOptions
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.resolve import Platform, resolve, resumed_options, with_batch

BEFORE = Path(__file__).parent.parent / "fixtures" / "before_house"

CPU = Platform(
    on_cpu=True,
    bfloat16=False,
    speeds=lambda run: Speeds(4e11, 4e11, 2e10, source="a test"),
    trees=lambda run: "native",
)


def resolved(*args: str):
    options, given = parse(TrainOptions, args, "train.py")
    return resolve(options, given, parse_budget(options.budget), CPU)


def test_a_preset_is_below_a_scale_below_a_recipe_below_what_is_given():
    preset = load_preset("crammed_bert")
    base = resolved("--config=crammed_bert", "--scale=base", "--budget=5steps")
    assert base.run == preset
    tiny = resolved("--config=crammed_bert", "--scale=tiny", "--budget=5steps")
    assert tiny.run == scaled(preset, "tiny")
    modern = resolved("--config=crammed_bert", "--scale=tiny", "--recipe=modern", "--budget=5steps")
    assert modern.run == with_recipe(scaled(preset, "tiny"), "modern", "tiny")
    named = resolved(
        "--config=crammed_bert", "--scale=tiny", "--recipe=modern", "--train.peak-lr=1e-3", "--budget=5steps"
    )
    assert named.run.train.peak_lr == 1e-3
    assert over(modern.run, {"train.peak_lr": 1e-3}) == named.run


def test_a_default_that_is_given_wins_over_a_scale():
    """`--model.d-model=768` says something at a scale that has 128, though 768 is the default of the option."""
    assert resolved("--scale=tiny", "--budget=5steps", "--model.d-model=768").run.model.d_model == 768


def test_settings_are_checked_against_the_preset_they_are_given_over():
    """100 is no multiple of the 12 heads that a model has by default, but of the two that it has at the scale tiny."""
    assert resolved("--scale=tiny", "--model.d-model=100", "--budget=5steps").run.model.d_model == 100
    assert resolved("--scale=tiny", "--model.d-model=100", "--budget=10m").run.model.d_model == 100
    with pytest.raises(UserError, match="is not a multiple of"):
        resolved("--scale=tiny", "--model.d-model=101", "--budget=5steps")


def test_a_scale_that_auto_would_not_take_for_another_preset_is_said():
    """Losses of models of different size and vocabulary do not compare."""
    slow = CPU._replace(speeds=lambda run: Speeds(1e11, 1e11, 1e10, source="a test"))
    options, given = parse(TrainOptions, ["--budget=6h"], "train.py")
    caution = resolve(options, given, parse_budget("6h"), slow).caution
    assert caution.startswith("scale auto takes mini here; for bert_base, crammed_bert")
    assert "it would take tiny; for fnet_ultrafast it would take small: give --scale to all runs whose" in caution
    assert "for tiny" not in caution  # a model of another published size
    assert resolved("--budget=6h", "--scale=mini").caution == resolved("--budget=5steps").caution == ""


def test_an_open_scale_and_batch_follow_the_budget():
    assert resolved("--budget=5steps").scale == "tiny"
    hours = resolved("--budget=6h")
    assert hours.scale == "mini"
    assert hours.tokens is not None
    assert "tokens/s" in hours.reason
    assert with_batch(hours.run, "mini", hours.tokens).train.batch_rows > hours.run.train.micro_rows
    assert with_batch(hours.run, "base", None).train.batch_rows == 8192
    given = resolved("--budget=6h", "--train.batch-rows=64").run
    assert with_batch(given, "mini", 1e12) == given


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (["--train.mask-rate", "0.3", "0.2", "--budget=5m"], {"train.mask_rate": (0.3, 0.2), "budget": "5m"}),
        (["--train.mask_rate", "0.3"], {"train.mask_rate": (0.3,)}),
        (["--no-resume", "--train.shard-params"], {"resume": False, "train.shard_params": True}),
        (["--when-done=echo --seed=5"], {"when_done": "echo --seed=5"}),
        ([], {}),
    ],
)
def test_what_a_command_line_names_is_what_is_given(args, given):
    assert parse(TrainOptions, args, "train.py")[1] == given


def test_python_names_options_as_the_command_line_does():
    by_dots = named_values(TrainOptions, {"budget": "5m", "train.peak_lr": 1e-3, "out": "~/x"})
    by_dicts = named_values(TrainOptions, {"budget": "5m", "train": {"peak_lr": 1e-3}, "out": "~/x"})
    assert (
        by_dots == by_dicts == parse(TrainOptions, ["--budget=5m", "--train.peak-lr=1e-3", "--out=~/x"], "train.py")[1]
    )
    assert "~" not in by_dots["out"]
    with pytest.raises(UserError, match=r"no option 'train.peek_lr'; did you mean train.peak_lr\?"):
        named_values(TrainOptions, {"train.peek_lr": 1e-3})
    with pytest.raises(UserError, match="--seed is 'one'; it must be a whole number"):
        from_given(TrainOptions, {"seed": "one"})
    with pytest.raises(UserError, match="--price is nan"):
        from_given(PlanOptions, {"price": float("nan")})


def test_help_shows_the_values_of_the_preset_and_scale(capsys):
    with pytest.raises(SystemExit):
        parse(TrainOptions, ["--help", "--config=crammed_bert", "--scale=mini", "--recipe=modern"], "train.py")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--model.d-model INT Width of the residual stream. (default: 256)" in text
    assert "AdamW's, so one rate serves both. (default: 0.005)" in text
    with pytest.raises(SystemExit):
        parse(TrainOptions, ["--help"], "train.py")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert (
        "--model.feedforward {dense,glu,tree,leaf_tree,routed_tree,switch} [{dense,glu,tree,leaf_tree,routed_tree,switch} ...]"
        in text
        or "tree" in text
    )
    assert "D of a KxD tree layer" in text


def test_a_resumed_run_may_write_its_budget_another_way(tmp_path):
    config = json.loads((BEFORE / "run" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"budget": "24h"}))
    assert resumed_options({"budget": "1d"}, tmp_path).budget == "24h"
    with pytest.raises(UserError, match="was started with budget=24h; it cannot be resumed with budget=2d"):
        resumed_options({"budget": "2d"}, tmp_path)


def test_an_unknown_verb_is_named_with_its_likeness():
    assert split_verb(["bench", "layer", "--help"])[1] == ["--help"]
    with pytest.raises(UserError, match=r"no verb 'trian'; did you mean train\?"):
        split_verb(["trian"])

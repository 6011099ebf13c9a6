"""Variants are read to the letter: what is no option, has no right value or cannot be compared is refused, by name."""

import json
from dataclasses import replace

import pytest

from ufbert import cli
from ufbert.config.presets import load_preset, scaled
from ufbert.cost.speeds import Speeds
from ufbert.errors import UserError
from ufbert.hub.folder import load_model
from ufbert.options.study import StudyOptions
from ufbert.options.train import TrainOptions
from ufbert.pretrain.resolve import Platform
from ufbert.study.variants import (
    cell_words,
    checked,
    decide,
    expected_seconds,
    parse_variant,
    read_variants,
    refuse_unequal,
    steps_for,
    tokens_in,
    variants_of,
)

OPTIONS = StudyOptions(out="study", budget="10steps", corpus="demo")
BASE = {"config": "tiny", "scale": "mini"}


def unmeasured(*_: object):
    raise AssertionError("a budget of steps or tokens asks for no speed")


PLATFORM = Platform(True, False, unmeasured, unmeasured)


def test_a_variant_of_the_command_line_has_values_of_the_right_types():
    name, given = parse_variant(
        "trees: --model.feedforward=tree,glu --train.peak-lr=3e-3 --data.document-attention=false"
    )
    assert name == "trees"
    assert given == {
        "model.feedforward": ("tree", "glu"),
        "train.peak_lr": 0.003,
        "data.document_attention": False,
    }
    assert parse_variant("plain") == ("plain", {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: --model.n-layrs=3", "model.n_layers"),
        ("a: --model.n-layers=three", "a whole number"),
        ("a: --model.n-layers=0", "at least 1"),
        ("a: --model.n-layers", "--OPTION=VALUE"),
        ("a: --model.n-layers=3 --model.n-layers=4", "twice"),
        ("a: --seed=3", "seed"),
        ("a: --model.activation='gelu", "quotation"),
    ],
)
def test_a_wrong_option_is_refused_with_the_name_of_its_variant(text, words):
    with pytest.raises(UserError, match="variant 'a'") as error:
        parse_variant(text)
    assert words in str(error.value)


def test_a_file_of_variants_may_have_tables_or_dotted_names(tmp_path):
    toml, dotted = tmp_path / "v.toml", tmp_path / "v.json"
    toml.write_text(
        '[base]\nscale = "mini"\n[variants.trees]\nmodel.n_trees = 4\n[variants.trees.train]\nmask_rate = [0.3, 0.2]\n'
    )
    values = {"base": {"scale": "mini"}, "variants": {"trees": {"model.n_trees": 4, "train.mask_rate": [0.3, 0.2]}}}
    dotted.write_text(json.dumps(values))
    assert read_variants(toml) == read_variants(dotted)
    assert read_variants(toml)["trees"] == {"scale": "mini", "model.n_trees": 4, "train.mask_rate": (0.3, 0.2)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[variants.a]\nmodel.n_tres = 4", "n_trees"),
        ("[variants.a]\nmodel.n_trees = 'four'", "model.n_trees is 'four'"),
        ("[variants.a.colours]\nred = 1", "'colours' is a table"),
        ("[variants.a]\nbudget = '5m'", "the study's"),
        ("[variants.a", "not readable TOML"),
        ("[variant.a]\nscale = 'mini'", "variants is missing"),
    ],
)
def test_a_wrong_file_of_variants_is_refused_with_file_and_variant(tmp_path, text, words):
    path = tmp_path / "v.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_variants(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "'a'" in str(error.value) or "variants.a" not in text or "TOML" in words


def test_options_of_the_study_hold_for_all_and_the_variant_wins():
    options = StudyOptions(out="s", budget="5steps", variants=("a", "b: --train.peak-lr=0.5"))
    given = {**BASE, "train.peak_lr": 0.1, "out": "s", "budget": "5steps", "variants": options.variants}
    assert variants_of(options, given) == {
        "a": {**BASE, "train.peak_lr": 0.1},
        "b": {**BASE, "train.peak_lr": 0.5},
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": ()}, "needs variants"),
        ({"variants": ("a", "a")}, "named twice"),
        ({"variants": ("../a",)}, "no name of a variant"),
        ({"variants": ("dense",), "baseline": "dens"}, "did you mean dense"),
        ({"variants": ("dense",), "gap_from": "dense", "gap_to": "all"}, "--gap-to 'all'"),
    ],
)
def test_wrong_names_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        variants_of(StudyOptions(**{"out": "s", "budget": "5steps", **changes}), BASE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out": ""}, "needs --out"),
        ({"budget": ""}, "one budget"),
        ({"tokens": 1e6}, "one budget"),
        ({"rates": "1e-3,fast"}, "not a list"),
        ({"rates": "1e-3,0.001"}, "twice"),
        ({"rates": "-1"}, "above 0"),
        ({"seeds": "0,0"}, "twice"),
        ({"at_once": 0}, "--at-once"),
        ({"gap_from": "a"}, "two ends"),
    ],
)
def test_wrong_options_of_a_study_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        StudyOptions(**{"out": "s", "budget": "5steps", **changes})


def test_every_variant_takes_the_fewest_updates_that_read_the_tokens():
    run = scaled(load_preset("tiny"), "mini")
    for batch_rows in (32, 64, 320):
        ramped = decide(StudyOptions(out="s", tokens=2e6), "a", {**BASE, "train.batch_rows": batch_rows}, PLATFORM).run
        assert ramped.train.batch_rows == batch_rows
        steps = steps_for(ramped, 2e6)
        assert tokens_in(ramped, steps) >= 2e6 > tokens_in(ramped, steps - 1)
    assert tokens_in(run, 1) == 32 * 128


def test_equal_time_takes_the_batch_of_the_speed_expected_and_keeps_it_ever_after():
    speeds = Speeds(1e12, 1e12, 1e14, source="a test")
    measured = Platform(True, False, lambda run: speeds, lambda run: "gather")
    options = StudyOptions(out="s", budget="20m")
    first = decide(options, "a", BASE, measured)
    assert (first.budget, first.tokens > 1e8) == ("20m", True)
    assert first.run.train.batch_rows > 32
    again = decide(options, "a", BASE, PLATFORM, batch_rows=first.run.train.batch_rows)  # asks for no speed
    assert again.run == first.run
    assert expected_seconds(first, measured) == pytest.approx(1200.0)


def test_a_study_needs_a_scale_and_refuses_what_contradicts_itself():
    with pytest.raises(UserError, match=r"variant a: .*--scale"):
        decide(OPTIONS, "a", {"config": "tiny"}, PLATFORM)
    with pytest.raises(UserError, match=r"variant a: .*not a multiple"):
        decide(OPTIONS, "a", {**BASE, "model.n_heads": 7}, PLATFORM)


@pytest.mark.parametrize(
    "other", [{"scale": "tiny"}, {"data.seq_len": 64}, {"train.eval_mask_rate": 0.15}, {"train.micro_rows": 16}]
)
def test_variants_with_other_held_out_rows_or_masks_do_not_compare(other):
    first, second = decide(OPTIONS, "a", BASE, PLATFORM), decide(OPTIONS, "b", {**BASE, **other}, PLATFORM)
    with pytest.raises(UserError, match="The variants a and b do not compare"):
        refuse_unequal([first, second])
    refuse_unequal([first, decide(OPTIONS, "c", {**BASE, "data.short_until": 0.0, "model.n_trees": 2}, PLATFORM)])


def test_the_words_of_a_cell_name_every_decision_and_train_reads_them_back():
    asked = {**BASE, "model.feedforward": ("glu", "tree"), "data.document_attention": False}
    variant = decide(OPTIONS, "a", asked, PLATFORM)
    words = cell_words(OPTIONS, variant, 20_000_000, 0.25, 7)
    assert words == [
        "--config=tiny", "--scale=mini", "--model.feedforward", "glu", "tree", "--data.no-document-attention",
        "--train.batch-rows=32",
        "--data.max-tokens=20000000", "--train.peak-lr=0.25", "--corpus=demo", "--budget=10steps", "--seed=7",
    ]  # fmt: skip
    _, given = cli.parse(TrainOptions, words, "ufbert train")
    decisions = {"train.batch_rows": 32, "data.max_tokens": 20_000_000, "train.peak_lr": 0.25, "corpus": "demo"}
    assert given == {**asked, **decisions, "budget": "10steps", "seed": 7}


def test_a_study_may_start_from_a_model(run_folder):
    options = replace(OPTIONS, init_from=str(run_folder / "model"))
    asked = variants_of(replace(options, variants=("a", "b: --train.peak-lr=1e-4")), {"init_from": options.init_from})
    variants = [decide(options, name, own, PLATFORM) for name, own in asked.items()]
    refuse_unequal(variants)
    config = load_model(run_folder / "model", lazily=True).config
    assert [variant.run.model for variant in variants] == [config, config]
    assert variants[0].run.train.peak_lr != variants[1].run.train.peak_lr == 1e-4
    words = cell_words(options, variants[1], 1000, None, 0)
    _, given = cli.parse(TrainOptions, words, "train")
    assert given["init_from"] == options.init_from
    with pytest.raises(UserError, match="variant a: init_from is the study's"):
        checked({"init_from": "x"}, "variant a")

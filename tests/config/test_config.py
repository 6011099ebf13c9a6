"""Numbers of configurations: what cannot be computed with is a sentence."""

import dataclasses
import math
import re
from typing import Annotated, get_args, get_origin

import pytest

from ufbert.config import DataConfig, FinetuneConfig, ModelConfig, PretrainConfig, RunConfig
from ufbert.config.run import LATER_FIELDS, known_fields
from ufbert.errors import UserError
from ufbert.options.finetune import FinetuneOptions
from ufbert.options.train import TrainOptions

GROUPS = {"model": ModelConfig, "train": PretrainConfig, "data": DataConfig, "tune": FinetuneConfig}
FIELDS = [(group, f) for group, cls in GROUPS.items() for f in dataclasses.fields(cls)]


def kind_of(hint):
    """The type of a field without its bounds."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_no_fraction_may_be_beyond_single_precision(value):
    checked = 0
    for group, f in FIELDS:
        is_list = get_origin(f.type) is tuple and kind_of(get_args(f.type)[0]) is float
        if is_list or kind_of(f.type) is float:
            given = (0.5, value) if is_list else value
            wanted = "a list, each entry a finite number" if is_list else "a finite number"
            sentence = rf"^{group}\.{f.name} is {re.escape(str(given))}; it must be {wanted}"
            with pytest.raises(UserError, match=sentence):
                GROUPS[group](**{f.name: given})
            checked += 1
    assert checked > 35


def test_a_checkpoint_knows_a_run_by_a_later_field_only_if_that_is_set():
    usual, names = known_fields(RunConfig()), {f.name for _, f in FIELDS}
    assert names >= LATER_FIELDS
    assert not LATER_FIELDS & {name for part in usual.values() for name in part}
    assert usual["data"] == dataclasses.asdict(DataConfig())
    run = RunConfig(model=ModelConfig(unet_skips=True), train=PretrainConfig(aim_updates=7))
    changed = known_fields(run)
    assert changed["model"] == {**usual["model"], "unet_skips": True}
    assert changed["train"] == {**usual["train"], "aim_updates": 7}


def test_every_whole_number_has_a_range():
    checked = 0
    for group, f in FIELDS:
        if kind_of(f.type) is int:
            for value in (-1, 10**5000):
                with pytest.raises(UserError, match=rf"^{group}\.{f.name} "):
                    GROUPS[group](**{f.name: value})
            checked += 1
    assert checked > 30


def test_no_rate_or_share_may_be_negative():
    for group, f in FIELDS:
        if kind_of(f.type) is float:
            with pytest.raises(UserError, match=rf"^{group}\.(mask_rate|{f.name}) is -0\.5; it must"):
                GROUPS[group](**{f.name: -0.5})


@pytest.mark.parametrize(
    ("cls", "fields", "words"),
    [
        (FinetuneConfig, {"max_len": 2}, r"tune\.max_len is 2; \[CLS\], \[SEP\] and at least one piece"),
        (FinetuneConfig, {"epochs": 0}, r"tune\.epochs is 0; it must be a whole number at least 1"),
        (FinetuneConfig, {"batch_rows": 0}, r"tune\.batch_rows is 0"),
        (FinetuneConfig, {"warmup": 1.5}, r"tune\.warmup is 1\.5; it must be a finite number at least 0 and at most 1"),
        (FinetuneConfig, {"adam_b2": 1.0}, r"tune\.adam_b2 is 1\.0; it must be a finite number at least 0 and below 1"),
        (FinetuneConfig, {"temperature": 0.0}, r"tune\.temperature is 0\.0; it must be a finite number above 0"),
        (FinetuneConfig, {"epochs": 10**12}, r"tune\.epochs is 1000000000000; it must be .* at most 10,000"),
        (DataConfig, {"near_window": 10**11}, r"data\.near_window is 100000000000; it must be .* at most 100,000,000"),
        (DataConfig, {"tokenizer_chars": 10**13}, r"data\.tokenizer_chars is"),
        (PretrainConfig, {"n_evals": 10**9}, r"train\.n_evals is 1000000000; it must be .* at most"),
        (PretrainConfig, {"micro_rows": 10**9}, r"train\.micro_rows is 1000000000"),
        (ModelConfig, {"n_layers": 10**9}, r"model\.n_layers is 1000000000; it must be .* at most"),
        (ModelConfig, {"max_len": 10**12}, r"model\.max_len is"),
        (ModelConfig, {"n_trees": 2**20, "tree_depth": 20}, r"model\.n_trees 1048576 of model\.tree_depth 20"),
        (PretrainConfig, {"peak_lr": 0.0}, r"train\.peak_lr is 0\.0; it must be a finite number above 0"),
        (DataConfig, {"seq_len": 2}, r"data\.seq_len is 2; it must be .* at least 3"),
        (TrainOptions, {"seed": -1}, r"--seed is -1; it must lie between 0 and 4294967295"),
        (TrainOptions, {"seed": 2**32}, r"--seed is 4294967296"),
        (TrainOptions, {"price": math.nan}, r"--price is nan; it must be a finite number"),
        (TrainOptions, {"max_hours_wall": -1.0}, r"--max-hours-wall is -1\.0"),
        (FinetuneOptions, {"model": "x", "train_rows": -1}, r"--train-rows is -1; it must lie between 0"),
        (FinetuneOptions, {"model": "x", "labels": "values"}, "--labels goes with --train"),
        (FinetuneOptions, {"model": "x", "labels": "values", "task_file": "t.json"}, "--labels goes with --train"),
        (
            RunConfig,
            {"data": DataConfig(seq_len=3), "train": PretrainConfig(mask_rate=(0.15,))},
            "is no token; raise either",
        ),
    ],
)
def test_numbers_out_of_range_are_named_with_their_range(cls, fields, words):
    with pytest.raises(UserError, match=words):
        cls(**fields)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ("-1", "names -1; a seed must lie between 0 and 4294967295"),
        ("0,4294967296", "names 4294967296; a seed must"),
        ("99999999999999999999", "names 99999999999999999999; a seed must"),
        ("1" * 5000, "is not a list of whole numbers"),
    ],
)
def test_seeds_that_cannot_be_told_apart_are_refused(seeds, words):
    with pytest.raises(UserError, match=words):
        FinetuneOptions("x", seeds=seeds).seed_list  # noqa: B018
    assert FinetuneOptions("x", seeds="0,4294967295").seed_list == (0, 2**32 - 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feedforward": ("dense",), "d_hidden": 64}, "dense 64 feedforward"),
        ({"feedforward": ("glu",), "d_hidden": 64}, "glu 64 feedforward"),
        ({"feedforward": ("tree",), "n_trees": 2, "tree_depth": 3}, "tree 2x3 feedforward"),
        ({"feedforward": ("routed_tree",), "tree_depth": 4, "leaf_width": 60}, "routed_tree 1x4 of 60 feedforward"),
        (
            {"feedforward": ("routed_tree",), "tree_depth": 4, "leaf_width": 60, "master_leaf": 9},
            "routed_tree 1x4 of 60 + 9 feedforward",
        ),
        ({"feedforward": ("dense", "switch"), "n_experts": 4, "d_hidden": 64}, "dense 64+switch 4 of 64 feedforward"),
        ({"feedforward": ("none",)}, "none feedforward"),
    ],
)
def test_the_architecture_of_a_reader_has_the_sizes_of_feedforwards(changes, said):
    model = dataclasses.replace(ModelConfig(n_layers=2, d_model=128, n_heads=2), **changes)
    assert model.architecture() == f"2 layers x 128, {said}"

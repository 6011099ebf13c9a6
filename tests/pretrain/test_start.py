"""Runs that start from a model: what it had, what is new, what is refused, and how such a run goes on without it."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import SMALL

from ufbert.cli import call, parse
from ufbert.config.presets import nearest_scale
from ufbert.cost.speeds import Speeds
from ufbert.errors import UserError
from ufbert.hub.folder import flatten, load_model, save_model
from ufbert.options.train import PlanOptions, PrepareOptions, TrainOptions
from ufbert.plan.prepare import plan_preparation
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.corpus import locate_rows
from ufbert.pretrain.resolve import Platform, decided, resolve
from ufbert.pretrain.start import start_params, start_sha256
from ufbert.runtime.metrics import read_records

SPEEDS = Speeds(4e11, 4e11, 2e10, source="a test")
CPU = Platform(on_cpu=True, bfloat16=False, speeds=lambda run: SPEEDS, trees=lambda run: "native")
SHAPE = [
    "--data.seq-len=32", "--data.eval-rows=16", "--train.batch-rows=8", "--train.micro-rows=8", "--train.n-evals=2",
    "--train.n-checkpoints=2", "--device=cpu",
]  # fmt: skip
"""The rows and batches of conftest's SMALL, without its architecture."""


def resolved(*args: str, cls=TrainOptions):
    options, given = parse(cls, args, "train.py")
    return resolve(options, given, parse_budget(options.budget), CPU)


def heldout(folder):
    return [record["heldout_loss"] for record in read_records(folder / "metrics.jsonl") if "heldout_loss" in record]


@pytest.fixture
def saved(family, tmp_path):
    """(name of a family, its heads) -> the folder of such a model."""

    def save(name: str, *heads: str, **changes):
        folder = tmp_path / name / "model"
        save_model(folder, family(name, *heads, **changes))
        return folder

    return save


@pytest.fixture(scope="module")
def continued(run_folder, corpus_file, tmp_path_factory):
    """A finished run from the model of `run_folder`, on the same text, whose start is gone."""
    place = tmp_path_factory.mktemp("start")
    shutil.copytree(run_folder / "model", place / "model")
    args = ["--budget=8steps", f"--init-from={place / 'model'}", f"--corpus=text:{corpus_file}", *SHAPE]
    call("train", [*args, f"--out={place / 'run'}", "--price=3"])
    shutil.rmtree(place / "model")
    return place / "run"


def test_a_run_starts_at_the_loss_that_its_model_ended_with_and_says_so(run_folder, continued):
    ended = json.loads((run_folder / "summary.json").read_text())
    summary = json.loads((continued / "summary.json").read_text())
    assert heldout(continued)[0] == heldout(run_folder)[-1] == ended["heldout_loss"]  # of the same rows and masks
    place = continued.parent / "model"
    sha256 = json.loads((continued / "config.json").read_text())["init_sha256"]
    assert summary["started_from"] == f"{place}, sha256 {sha256}"
    assert summary["started_heldout_loss"] == ended["heldout_loss"]
    assert summary["heldout_loss"] == heldout(continued)[-1] != ended["heldout_loss"]
    assert summary["architecture"] == ended["architecture"]
    report = (continued / "report.html").read_text()
    assert str(place) in report[: report.index("</h1>")]
    assert f"{place}, sha256 {sha256}" in report
    assert "started_from" not in ended
    before, after = load_model(run_folder / "model"), load_model(continued / "model")
    assert after.config == before.config
    assert after.tokenizer.to_str() == before.tokenizer.to_str()


def test_the_headline_names_the_model_and_what_is_new(run_folder, corpus_file, tmp_path, capsys):
    args = [f"--init-from={run_folder / 'model'}", f"--corpus=text:{corpus_file}", *SHAPE, f"--out={tmp_path / 'run'}"]
    call("train", ["--budget=1steps", "--recipe=modern", *args])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{run_folder / 'model'}: 2 layers x 32, tree 1x3 (native) feedforward" in said
    assert "starts with the encoder and the masked-LM head" in said
    assert "new: the optimizer's state" in said
    assert "of --recipe modern only the training part applies" in said
    assert "the model that it started from gives" in said


def test_a_run_goes_on_without_its_start(continued, tmp_path):
    """Its last checkpoint and all after it are lost, and the model folder is gone: it ends in the same bits."""
    cut = tmp_path / "run"
    shutil.copytree(continued, cut, ignore=shutil.ignore_patterns("summary.json", "model", "report.html"))
    shutil.rmtree(cut / "checkpoints" / "8")
    summary = call("train", ["--resume", f"--out={cut}"])
    assert summary["steps"] == 8
    assert summary["started_from"] == json.loads((continued / "summary.json").read_text())["started_from"]
    for path, array in flatten(load_model(continued / "model").params).items():
        np.testing.assert_array_equal(array, flatten(load_model(cut / "model").params)[path], err_msg=path)
    for path in (cut / "checkpoints").iterdir():
        shutil.rmtree(path)
    (cut / "summary.json").unlink()
    with pytest.raises(UserError, match="There is no model folder at"):  # nothing is begun from random weights
        call("train", ["--resume", f"--out={cut}"])


def test_the_start_is_a_checkpoint_from_the_first_moment(run_folder, corpus_file, tmp_path, monkeypatch):
    """A kill before the first regular checkpoint, and a rollback, go back to the model, whatever became of its folder."""
    from ufbert.pretrain import loop

    seen = []
    monkeypatch.setattr(loop, "_take_steps", lambda session, key: seen.extend(session.checkpoints.steps()))
    args = [f"--init-from={run_folder / 'model'}", f"--corpus=text:{corpus_file}", *SHAPE, f"--out={tmp_path / 'run'}"]
    call("train", ["--budget=1steps", *args])
    assert seen == [0]


def test_an_imported_bert_is_trained_on_in_its_own_shape(family, corpus_file, tmp_path):
    from ufbert.hub.convert import export_model

    model = family("bert", "masked_lm")
    export_model(model, tmp_path / "hf", "hf")
    call("import", [str(tmp_path / "hf"), f"--out={tmp_path / 'bert'}"])
    args = [f"--init-from={tmp_path / 'bert'}", f"--corpus=text:{corpus_file}", *SHAPE, f"--out={tmp_path / 'run'}"]
    summary = call("train", ["--budget=30steps", *args, "--train.peak-lr=1e-2"])
    assert summary["heldout_loss"] < heldout(tmp_path / "run")[0] - 0.2
    trained = load_model(tmp_path / "run" / "model")
    assert trained.config == load_model(tmp_path / "bert").config
    assert trained.heads == ("masked_lm",)


@pytest.mark.parametrize(
    ("name", "heads", "words"),
    [
        ("bert", ("masked_lm",), "starts with the encoder and the masked-LM head; new: the optimizer's state"),
        ("bert", (), "starts with the encoder; new: the optimizer's state and the masked-LM head"),
        ("bert", ("classifier",), "the masked-LM head; left out: its classifier"),
        ("crammed", ("classifier",), "starts with the encoder; new: the optimizer's state; left out: its classifier"),
        ("switch", ("masked_lm",), "starts with the encoder and the masked-LM head"),
        ("leaf tree", ("masked_lm",), "starts with the encoder and the masked-LM head"),
        ("skips", ("masked_lm",), "starts with the encoder and the masked-LM head"),
        ("skips", (), "starts with the encoder; new: the optimizer's state and the masked-LM head"),
    ],
)
def test_what_a_folder_has_is_kept_and_the_rest_is_new_or_left_out(name, heads, words, saved):
    folder = saved(name, *heads)
    found, model = resolved(f"--init-from={folder}", "--budget=5steps", "--data.seq-len=32"), load_model(folder)
    assert found.run.model == model.config
    assert words in found.start
    params = start_params(str(folder), start_sha256(str(folder)), found.run.model, jax.random.key(5))
    assert list(params) == ["encoder", "masked_lm"]
    flat, theirs = flatten(params), flatten(model.params)
    for path, array in flat.items():
        if path in theirs:
            np.testing.assert_array_equal(array, theirs[path], err_msg=path)
        else:
            assert path.startswith("masked_lm.")
    new = {path for path in flat if path not in theirs}
    assert bool(new) == (name in ("bert", "skips") and "masked_lm" not in heads)
    assert all(path in flat or path.split(".")[0] in ("pooler", "classifier") for path in theirs)


def test_a_pooler_is_left_out_and_said(run_folder, tmp_path):
    from ufbert import nn

    model = load_model(run_folder / "model")
    pooler = nn.init(model.config, jax.random.key(0), ("pooler",))["pooler"]
    save_model(tmp_path / "model", replace(model, params={**model.params, "pooler": pooler}))
    assert "left out: its pooler" in resolved(f"--init-from={tmp_path / 'model'}", "--budget=5steps", *SHAPE).start


def test_the_rows_fit_the_model(saved):
    assert resolved(f"--init-from={saved('bert')}", "--budget=5steps").run.data.seq_len == 48  # all that it reads
    assert resolved(f"--init-from={saved('fourier')}", "--budget=5steps").run.data.seq_len == 40  # the one length
    with pytest.raises(UserError, match=r"reads rows of one length: data\.seq_len must be 40"):
        resolved(f"--init-from={saved('fourier')}", "--budget=5steps", "--data.seq-len=32")
    with pytest.raises(UserError, match=r"data\.seq_len 64 is longer than model\.max_len 48"):
        resolved(f"--init-from={saved('crammed')}", "--budget=5steps", "--data.seq-len=64")
    longer = ["--budget=5steps", "--data.seq-len=64", "--model.max-len=64"]
    assert resolved(f"--init-from={saved('crammed')}", *longer).run.model.max_len == 64  # sinusoids go on for ever
    for name in ("bert", "fourier"):
        with pytest.raises(UserError, match=r"--model\.max-len=64 contradicts"):
            resolved(f"--init-from={saved(name)}", *longer)


def test_the_training_part_of_a_recipe_applies_at_a_share_of_its_rate(saved):
    from ufbert.config import RunConfig
    from ufbert.config.presets import scaled, with_recipe
    from ufbert.pretrain.start import LR_SHARE

    folder = saved("crammed", "masked_lm")
    found = resolved(f"--init-from={folder}", "--budget=5steps", "--recipe=modern", "--data.seq-len=32")
    modern = with_recipe(scaled(RunConfig(), "tiny"), "modern", "tiny").train
    assert found.scale == "tiny"  # the nearest in width
    assert found.run.train == replace(modern, peak_lr=LR_SHARE * modern.peak_lr)
    assert found.run.model == load_model(folder).config
    given = resolved(f"--init-from={folder}", "--budget=5steps", "--train.peak-lr=0.5", "--model.dropout=0")
    assert given.run.train.peak_lr == 0.5
    assert given.run.model.dropout == 0
    hours = resolved(f"--init-from={folder}", "--budget=6h")
    assert hours.tokens is not None
    assert "tokens/s expected" in hours.reason
    assert [nearest_scale(width) for width in (32, 180, 190, 384, 512, 768, 4096)] == [
        "tiny", "tiny", "mini", "small", "small", "base", "base"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config=tiny"], "--config=tiny and --init-from=.*: a run starts from a preset or from a model"),
        (["--scale=mini"], "--scale=mini and --init-from=.*: the size is the model's"),
        (["--model.d-model=64"], r"--model.d-model=64 contradicts .*model.d_model is 32"),
        (["--model.feedforward", "tree"], r"--model.feedforward=tree contradicts .*model.feedforward is dense"),
        (["--model.mixer", "fourier"], "--model.mixer=fourier contradicts"),
        (["--model.ngram-rows=9"], "--model.ngram-rows=9 contradicts .*model.ngram_rows is 0"),
        (["--model.vocab-size=500"], "--model.vocab-size=500 contradicts"),
        (["--model.norm-eps=1e-5"], "--model.norm-eps=1e-05 contradicts"),
        (["--model.no-head-bias"], "--model.head-bias=False contradicts"),
        (["--model.zero-init-out"], "--model.zero-init-out=True contradicts"),
        (["--model.unet-skips"], "--model.unet-skips=True contradicts"),
        (["--model.no-tie-head"], "--model.tie-head=False contradicts"),
    ],
)
def test_an_option_that_contradicts_the_model_is_a_sentence(args, words, saved):
    with pytest.raises(UserError, match=words):
        resolved(f"--init-from={saved('bert', 'masked_lm')}", "--budget=5steps", *args)


def test_options_that_say_the_same_or_nothing_of_the_function_are_accepted(saved):
    folder = saved("bert", "classifier")
    same = ["--model.d-model=32", "--model.feedforward", "dense", "dense", "--model.norm=post"]
    free = ["--model.dtype=float32", "--model.tree-backend=gather", "--model.dropout=0.2", "--model.pooling=mean"]
    head = ["--model.no-head-transform", "--model.no-tie-head"]  # it has no head yet
    found = resolved(f"--init-from={folder}", "--budget=5steps", *same, *free, *head).run.model
    assert (found.dtype, found.dropout, found.pooling) == ("float32", 0.2, "mean")
    assert not found.head_transform
    assert not found.tie_head


def test_what_is_no_model_folder_is_a_sentence(run_folder, tmp_path):
    with pytest.raises(UserError, match="There is no model folder at absent"):
        resolved("--init-from=absent", "--budget=5steps")
    with pytest.raises(UserError, match="its model/ folder is one"):
        resolved(f"--init-from={run_folder}", "--budget=5steps")
    model = load_model(run_folder / "model")
    params = jax.tree.map(lambda leaf: leaf.at[0].set(np.nan), model.params)
    save_model(tmp_path / "model", replace(model, params=params))
    place = str(tmp_path / "model")
    with pytest.raises(UserError, match="has weights that are no finite numbers: encoder"):
        start_params(place, start_sha256(place), model.config, jax.random.key(0))


def test_a_model_that_has_changed_since_is_not_taken_for_the_start(run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    place, model = str(tmp_path / "model"), load_model(run_folder / "model")
    before = start_sha256(place)
    save_model(place, replace(model, params=jax.tree.map(lambda leaf: leaf + 1, model.params)))
    with pytest.raises(UserError, match="has changed since the run was started from it"):
        start_params(place, before, model.config, jax.random.key(0))


def test_the_text_is_of_the_models_tokenizer_and_a_given_one_must_have_its_vocabulary(
    run_folder, corpus_file, tmp_path
):
    place = run_folder / "model"
    args = [f"--init-from={place}", f"--corpus=text:{corpus_file}", f"--prepared={tmp_path}", "--budget=5steps", *SHAPE]

    def located(*more: str):
        options, given = parse(TrainOptions, [*args, *more], "train.py")
        return locate_rows(decided(options, resolve(options, given, parse_budget("5steps"), CPU))[0])

    tokenizer = load_model(place).tokenizer
    plain = located()
    assert plain.tokenizer is not None
    assert plain.tokenizer.to_str() == tokenizer.to_str()
    assert located(f"--tokenizer={place / 'tokenizer.json'}").recipe == plain.recipe
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n")
    with pytest.raises(UserError, match=r"vocab\.txt has another vocabulary than .*model"):
        located(f"--tokenizer={tmp_path / 'vocab.txt'}")


def test_prepare_and_plan_know_the_model(run_folder, corpus_file, tmp_path, capsys):
    place = run_folder / "model"
    args = ["--budget=3steps", f"--init-from={place}", *SHAPE]
    text = [f"--corpus=text:{corpus_file}", f"--prepared={tmp_path}"]
    folder = call("prepare", [*args, *text])
    assert f"text for {place}" in capsys.readouterr().out
    options, given = parse(TrainOptions, [*args, *text], "train.py")
    options, tokens = decided(options, resolve(options, given, parse_budget("3steps"), CPU))
    from ufbert.pretrain.corpus import with_text

    ready = locate_rows(with_text(options, tokens)).ready
    assert ready is not None
    assert ready.folder == folder
    plan, given = parse(PlanOptions, ["--budget=1d", f"--init-from={place}", "--no-check"], "plan")
    found = resolve(plan, given, parse_budget("1d"), CPU)
    assert found.run.model == load_model(place).config
    assert plan_preparation(plan, given, found).command == f"ufbert prepare --budget=1d --init-from={place}"
    assert resolved(f"--init-from={place}", cls=PrepareOptions).run.model == found.run.model


def test_a_run_from_a_preset_is_stored_as_before(run_folder):
    stored = json.loads((run_folder / "config.json").read_text())
    assert (stored["init_from"], stored["init_sha256"], stored["config"]) == ("", "", "tiny")
    assert SMALL[0] == "--config=tiny"

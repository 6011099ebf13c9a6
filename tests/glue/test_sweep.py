"""The command: whole sweeps, what they leave, what they refuse, and how they go on."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPO
from terminal import Screen, terminal, told

from ufbert.cli import call
from ufbert.errors import UserError
from ufbert.glue import sweep as sweeping
from ufbert.glue.finetune import finetune_task
from ufbert.glue.run import subset
from ufbert.glue.tasks import Examples
from ufbert.hub.folder import load_model
from ufbert.inference.predictor import Predictor
from ufbert.runtime.claim import claimed


@pytest.fixture(scope="module")
def toy_glue(tmp_path_factory):
    """Tasks that a word decides, and a cut of MNLI."""
    root, rng = tmp_path_factory.mktemp("glue"), random.Random(1)
    words = ["cat", "dog", "king", "house", "bird"]

    def sentence(flag=0):
        return f"the {rng.choice(words)} sees the {rng.choice(words)}{' river' if flag else ''}"

    def write(folder, split, lines):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")

    nli = ("entailment", "neutral", "contradiction")
    for split, n in (("train", 160), ("dev", 48)):
        flags = [i % 2 for i in range(n)]
        write("SST-2", split, ["sentence\tlabel", *(f"{sentence(f)}\t{f}" for f in flags)])
        write("CoLA", split, [f"x\t{f}\t\t{sentence(f)}" for f in flags])
        rows = (f"{i}\t{sentence(f)}\t{sentence()}\t{5.0 * f}" for i, f in enumerate(flags))
        write("STS-B", split, ["index\tsentence1\tsentence2\tscore", *rows])
        rows = (f"{i}\t{sentence(f)}\t{sentence()}\t{'not_' * f}entailment" for i, f in enumerate(flags))
        write("RTE", split, ["index\tsentence1\tsentence2\tlabel", *rows])
        rows = (f"{i}\t{sentence(f)}\t{sentence()}\t{nli[f]}" for i, f in enumerate(flags))
        write("MNLI-devsplit", split, ["index\tsentence1\tsentence2\tgold_label", *rows])
    write("RTE", "test", ["index\tsentence1\tsentence2", *(f"{i}\t{sentence(i % 2)}\t{sentence()}" for i in range(10))])
    return root


def finetune(args):
    return call("finetune", args).to_json()


def options(run_folder, toy_glue, out, *more):
    return [f"--model={run_folder / 'model'}", f"--glue-source=dir:{toy_glue}", f"--out={out}", "--device=cpu", *more]


@pytest.mark.long
def test_all_tasks_of_a_source_in_one_command(run_folder, toy_glue, tmp_path, command):
    out = tmp_path / "out"
    with terminal() as written:
        found = finetune(options(run_folder, toy_glue, out, "--seeds=0,1", "--tune.lr=4e-3", "--tune.epochs=6"))
        screen = Screen(written())
    said = " ".join(screen.lines)
    assert "left out: MRPC, QQP, MNLI, QNLI, WNLI" in said
    assert "protocol small with epochs 6, lr 0.004, 2 seed(s): 6 epochs, batch 16, learning rate 0.004" in said
    assert "[5/5] mnli-devsplit" in said
    assert told(screen) >= {
        "reading the rows", "reading the model folder", "tokenising the rows and starting the runs", "compiling the update",
        "scoring the rows of every split", "drawing the report",
    }  # fmt: skip
    assert "left in all" not in said  # that was to be rewritten
    assert all(line.startswith("results ") for line in screen.too_long.values())  # it holds paths
    assert screen.lines[screen.row] == ""
    assert list(found["tasks"]) == ["cola", "sst2", "stsb", "rte", "mnli-devsplit"]
    assert json.loads((out / "glue.json").read_text()) == json.loads(json.dumps(found))
    sst2 = found["tasks"]["sst2"]
    dev = sst2["dev"]["dev"]
    assert dev["median"]["accuracy"] > 0.9
    assert dev["median"]["accuracy"] == np.median([one["accuracy"] for one in dev["seeds"].values()])
    assert dev["majority"] == {"accuracy": 0.5}
    assert found["tasks"]["mnli-devsplit"]["cut_of"] == "mnli"
    saved = load_model(out / "sst2")
    assert saved.task.labels == ("negative", "positive")
    assert saved.task.metrics == dev["seeds"][sst2["saved_seed"]]
    lines = (out / "submission" / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    assert len(lines) == 11
    predictions = (out / "predictions" / "sst2.dev.tsv").read_text().splitlines()
    assert len(predictions) == 49
    for name in ("glue.md", "report.html"):
        assert "small with epochs 6" in (out / name).read_text()
    assert not (out / "partial").exists()
    answer = command("predict", f"--model={out / 'sst2'}", "the cat sees the dog river")
    assert answer.stdout.startswith("positive")
    value = command("predict", f"--model={out / 'stsb'}", "the cat sees the dog river", "the king sees")
    assert float(value.stdout) > 2.0
    wrong = command("fill-mask", f"--model={out / 'sst2'}", "the [MASK]")
    assert wrong.returncode == 2
    assert "no masked-LM head" in wrong.stderr


def test_mnli_first_starts_the_small_tasks_from_mnli(run_folder, toy_glue, tmp_path):
    args = ("--protocol=mnli-first", "--tasks=rte,mnli-devsplit", "--seeds=0,1", "--tune.epochs=1")
    found = finetune(options(run_folder, toy_glue, tmp_path / "out", *args))
    assert list(found["tasks"]) == ["mnli-devsplit", "rte"]
    starts = {name: entry["starts_from"] for name, entry in found["tasks"].items()}
    assert starts == {"mnli-devsplit": "model", "rte": "mnli-devsplit"}
    with pytest.raises(UserError, match="needs MNLI among the tasks"):
        finetune(options(run_folder, toy_glue, tmp_path / "no", "--protocol=mnli-first", "--tasks=rte"))


def test_the_bert_protocol_keeps_the_best_of_its_rates(run_folder, toy_glue, tmp_path):
    args = ("--protocol=bert", "--tasks=sst2", "--seeds=0", "--tune.epochs=1")
    entry = finetune(options(run_folder, toy_glue, tmp_path / "out", *args))["tasks"]["sst2"]
    assert set(entry["rates"]) == {"5e-05", "4e-05", "3e-05", "2e-05"}
    assert (
        entry["rates"][f"{entry['lr']:g}"] == max(entry["rates"].values()) == entry["dev"]["dev"]["median"]["accuracy"]
    )


def test_a_teacher_can_be_a_sweep_and_must_fit(run_folder, toy_glue, tmp_path):
    common = ("--seeds=0,1", "--tune.epochs=2", "--tasks=sst2")
    finetune(options(run_folder, toy_glue, tmp_path / "teacher", *common))
    taught = options(run_folder, toy_glue, tmp_path / "out", *common, f"--teacher={tmp_path / 'teacher'}")
    assert "taught by" in finetune(taught)["protocol"]["mode"]
    wrong = f"--teacher={tmp_path / 'teacher' / 'sst2'}"
    with pytest.raises(UserError, match="was not fine-tuned for rte's labels"):
        finetune(options(run_folder, toy_glue, tmp_path / "no", "--tasks=rte", wrong))


def test_a_sweep_folder_in_use_or_damaged_is_a_sentence(run_folder, toy_glue, tmp_path):
    args = options(run_folder, toy_glue, tmp_path / "out", "--tasks=rte", "--seeds=0")
    with claimed(tmp_path / "out"):
        for more in ([], ["--resume"]):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
                finetune([*args, *more])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="There is no sweep in"):
        finetune([*args, "--resume"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for text, words in (("", "damaged"), ("[]", "damaged"), ('{"options": 5}', "damaged"), ("{}", "damaged")):
        (tmp_path / "out" / "glue.json").write_text(text)
        with pytest.raises(UserError, match=words):
            finetune([*args, "--resume"])
    (tmp_path / "out" / "glue.json").write_text('{"options": {}, "format_version": 2}')
    with pytest.raises(UserError, match=r"is not a glue\.json of format version 1"):
        finetune([*args, "--resume"])


def test_a_sweep_goes_on_at_the_task_and_at_the_run(run_folder, toy_glue, tmp_path, monkeypatch, capsys):
    args = ("--tasks=cola,rte", "--seeds=0,1", "--runs-at-once=1", "--tune.epochs=2")
    whole = finetune(options(run_folder, toy_glue, tmp_path / "whole", *args))
    calls = []

    def dies_at_the_fourth(*given, **named):
        calls.append(given[3])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return finetune_task(*given, **named)

    monkeypatch.setattr(sweeping, "finetune_task", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        finetune(options(run_folder, toy_glue, tmp_path / "cut", *args))
    with pytest.raises(UserError, match="exists already; pass --resume"):
        finetune(options(run_folder, toy_glue, tmp_path / "cut", *args))
    with pytest.raises(UserError, match="was started with seeds=0,1; it cannot go on with seeds=0"):
        finetune(options(run_folder, toy_glue, tmp_path / "cut", *args, "--resume", "--seeds=0"))
    capsys.readouterr()
    found = finetune(options(run_folder, toy_glue, tmp_path / "cut", *args, "--resume"))
    said = capsys.readouterr().out
    assert "[1/2] cola: done before" in said
    assert "rte, seed 0" in said
    assert len(calls) == 5  # the fourth run once more, and no other
    for name, entry in whole["tasks"].items():
        assert found["tasks"][name] | {"seconds": 0} == entry | {"seconds": 0}


@pytest.mark.long
def test_a_killed_sweep_leaves_nothing_half_and_goes_on(run_folder, toy_glue, tmp_path, command):
    out = tmp_path / "out"
    args = options(run_folder, toy_glue, out, "--tasks=cola,sst2", "--seeds=0", "--tune.epochs=2")
    process = subprocess.Popen(
        [sys.executable, str(REPO / "finetune.py"), *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ},
    )  # fmt: skip
    deadline = time.monotonic() + 900
    while not (out / "cola").is_dir():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = command(*args, "--resume", script="finetune.py")
    assert again.returncode == 0, again.stderr
    assert list(json.loads((out / "glue.json").read_text())["tasks"]) == ["cola", "sst2"]
    assert not list(out.rglob(".*partial*"))


@pytest.mark.parametrize("at_once", [0, 1])
def test_runs_that_diverge_do_not_count_and_a_task_without_others_leaves_no_model(
    run_folder, toy_glue, tmp_path, monkeypatch, capsys, at_once
):
    from ufbert import nn
    from ufbert.glue.finetune import Diverged, Trace, Tuned
    from ufbert.glue.scores import dev_metrics
    from ufbert.hub.folder import TaskInfo, with_task

    def stub(model, data, tune, runs, **named):
        """Seed 1 of SST-2 alone does not diverge."""
        classifier = nn.init_classifier(model.config, jax.random.key(0), 2)
        scores = {"dev": np.eye(2)[[i % 2 for i in range(48)]]}
        metrics = dev_metrics(data, scores)
        tuned = with_task(model, classifier, TaskInfo("sst2", data.task.label_names, metrics["dev"]))
        trace = Trace([{"epoch": 1, "loss": 0.5, "accuracy": 1.0}], np.ones(10), scores, 0)
        well = data.task.name == "sst2"
        return [Tuned(run, tuned, metrics, trace) if well and run.seed == 1 else Diverged(run, 7) for run in runs]

    monkeypatch.setattr(sweeping, "finetune_task", stub)
    args = ("--tasks=cola,sst2", "--seeds=0,1,2", f"--runs-at-once={at_once}")
    last = f"--when-done=echo $UFBERT_EXIT_CODE $UFBERT_RUN >> {tmp_path / 'log'}"
    with pytest.raises(UserError, match=r"No run of cola kept a finite loss, .* no model .* lower rate \(--tune\.lr\)"):
        finetune(options(run_folder, toy_glue, tmp_path / "out", *args, last))
    assert (tmp_path / "log").read_text() == f"2 {tmp_path / 'out'}\n"  # a rented machine must stop all the same
    said = capsys.readouterr().out
    assert re.search(r"seed 2 at 0\.00\d+: the loss was not finite at update 7, so that this run does not", said)
    results = json.loads((tmp_path / "out" / "glue.json").read_text())
    assert list(results["tasks"]) == ["sst2"]
    assert list(results["tasks"]["sst2"]["dev"]["dev"]["seeds"]) == ["1"]
    assert (tmp_path / "out" / "sst2").is_dir()
    assert not (tmp_path / "out" / "cola").exists()
    with pytest.raises(UserError, match="No run of cola kept a finite loss"):
        finetune(options(run_folder, toy_glue, tmp_path / "one", "--tasks=cola", "--seeds=0"))
    first = ("--protocol=mnli-first", "--tasks=rte,mnli-devsplit", "--seeds=0")
    with pytest.raises(UserError, match="No run of mnli-devsplit; rte, for want of mnli-devsplit kept"):
        finetune(options(run_folder, toy_glue, tmp_path / "first", *first))


def test_what_is_wrong_is_said_before_anything_is_written(run_folder, toy_glue, tmp_path):
    def refused(match, *more, source=toy_glue):
        with pytest.raises(UserError, match=match):
            finetune(options(run_folder, source, tmp_path / "out", *more))
        assert not (tmp_path / "out").exists()

    refused("not a list of whole numbers", "--seeds=a")
    refused("names a seed twice", "--seeds=1,1")
    refused("names -1; a seed must lie between 0 and 4294967295", "--seeds=-1", "--tasks=no such task")
    refused(
        "at most 4 tokens has no room for 3 special tokens and a piece of each", "--tasks=cola,rte", "--tune.max-len=4"
    )
    refused("does not go with --from-scratch", "--probe", "--from-scratch")
    refused("--train-rows 1000 is more than the 160 rows", "--tasks=sst2", "--train-rows=1000")
    refused(r"did you mean sst2\?", "--tasks=sst3")
    broken = tmp_path / "broken"
    shutil.copytree(toy_glue, broken)
    (broken / "SST-2" / "train.tsv").write_text("sentence\tlabel\ngood\t1\nbad\n")
    refused(r"train\.tsv, line 3", "--tasks=sst2", source=broken)
    with pytest.raises(UserError, match="There is no sweep in"):
        finetune(options(run_folder, toy_glue, tmp_path / "none", "--resume"))


def test_broken_rows_can_be_left_out_and_are_counted(run_folder, toy_glue, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(toy_glue, broken)
    with (broken / "SST-2" / "train.tsv").open("a") as file:
        file.write("no label\nfine\t7\n")
    args = ("--tasks=sst2", "--seeds=0", "--tune.epochs=1", "--skip-bad-rows")
    entry = finetune(options(run_folder, broken, tmp_path / "out", *args))["tasks"]["sst2"]
    assert (entry["skipped_rows"], entry["train_rows"]) == (2, 160)


def test_subsets_are_seeded_and_keep_rows_together():
    rows = Examples([str(i) for i in range(50)], [f"p{i}" for i in range(50)], [float(i) for i in range(50)])
    one, other = subset(rows, 20, seed=3), subset(rows, 20, seed=3)
    assert one == other != subset(rows, 20, seed=4)
    assert all(f"p{t}" == p and float(t) == y for t, p, y in zip(one.texts, one.pairs, one.labels, strict=True))


@pytest.mark.long
@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("fnet_hybrid", ["--model.max-len=32", "--model.fixed-len=32"]),
        ("switch_8e", ["--model.max-len=32", "--data.short-until=0"]),
        ("original_fff", ["--model.max-len=32", "--data.short-until=0", "--model.tree-depth=2"]),
    ],
)
def test_every_family_pretrains_fine_tunes_and_answers(preset, more, corpus_file, toy_glue, tmp_path):
    sizes = ["--model.vocab-size=300", "--model.d-model=32", "--model.n-heads=2", "--model.d-hidden=32"]
    sizes += ["--data.seq-len=32", "--data.eval-rows=8", "--train.batch-rows=8", "--train.micro-rows=8", "--device=cpu"]
    sizes += ["--train.n-checkpoints=1"]
    run = tmp_path / "run"
    where = [f"--config={preset}", "--scale=tiny", "--budget=12steps", f"--corpus=text:{corpus_file}", f"--out={run}"]
    summary = call("train", [*where, *sizes, *more])
    assert np.isfinite(summary["heldout_loss"])
    args = options(run, toy_glue, tmp_path / "out", "--tasks=sst2", "--tune.lr=1e-3", "--tune.epochs=2", "--seeds=0")
    found = finetune(args)
    assert found["tasks"]["sst2"]["dev"]["dev"]["median"]["accuracy"] > 0.4
    predictor = Predictor.load(tmp_path / "out" / "sst2")
    assert predictor.config.only_len == (32 if preset == "fnet_hybrid" else 0)
    assert predictor.classify(["the cat sees the dog river"])[0].label in ("negative", "positive")

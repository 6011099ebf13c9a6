"""Cells run once, side by side if asked, and go on after a stop; one that fails stops no other; results are paired by seed."""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL

from ufbert import cli
from ufbert.bench import harness
from ufbert.config.presets import load_preset
from ufbert.errors import Interrupted, UserError
from ufbert.runtime.run_folder import RunFile, Summary, read_run, write_run, write_summary
from ufbert.study import cells, children, report, results
from ufbert.study import run as study_run
from ufbert.study.cells import Cell, CellFile, Session, StudyFile, VariantFile, read_cell
from ufbert.study.report import show_results, write_results

STUDY = StudyFile(
    corpus="demo", budget="5m", tokens=0.0, max_tokens=1000, baseline="trees", seeds=[0, 1], rates=[],
    variants={name: VariantFile([f"--of={name}"], 8) for name in ("trees", "k", "all")},
)  # fmt: skip


def finish(folder: Path, cell: Cell, loss: float, commit: str = "c0ffee", at_once: int = 1) -> None:
    """Write what a finished cell leaves."""
    place = cell.folder(folder)
    session = Session("ufbert train", commit, "a <CPU>", 2, at_once, began=1.0, load_before=0.5, seconds=3.0)
    cells.write_cell(place, CellFile(cell.variant, cell.rate, cell.seed, ["--a=1"], [session]))
    write_run(place / "run", RunFile("5m", "tiny", "demo", "base", load_preset("tiny"), started_at=1.0))
    evaluation = {"heldout_accuracy": 0.1, "fraction": 0.1, "memory_bytes": 1, "skipped_updates": 0}
    lines = [
        {"step": n, "heldout_loss": loss + 4 - n, "tokens": 1_250_000 * 2**n, "spent": 10.0 * n, **evaluation}
        for n in range(5)
    ]
    (place / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(place / "run", Summary(loss, 9.0, 40.0, tokens=20_000_000, parameters=1234, flops_per_token=5e6))


def test_other_seeds_wait_for_the_first_and_take_its_best_rate(tmp_path):
    study = replace(STUDY, rates=[0.1, 0.2], variants=dict.fromkeys("ab", STUDY.variants["k"]), baseline="a")
    firsts = [Cell(name, rate, 0) for name in "ab" for rate in (0.1, 0.2)]
    assert cells.open_cells(study, tmp_path, set()) == firsts
    finish(tmp_path, firsts[0], 3.0)
    assert cells.open_cells(study, tmp_path, set()) == firsts[1:]
    finish(tmp_path, firsts[1], 2.5)
    assert cells.open_cells(study, tmp_path, set()) == [*firsts[2:], Cell("a", 0.2, 1)]
    failed = set(firsts[2:])  # no rate of b has a loss: it gets no other seed
    assert cells.open_cells(study, tmp_path, failed) == [Cell("a", 0.2, 1)]
    finish(tmp_path, Cell("a", 0.2, 1), 2.4)
    assert cells.open_cells(study, tmp_path, failed) == []
    assert cells.n_cells(study) == 6
    (row,) = results.results_of(tmp_path, study).rows
    assert (row.rate, row.losses, row.rates) == (0.2, {0: 2.5, 1: 2.4}, {"0.1": 3.0, "0.2": 2.5})


def fill(folder: Path, **losses: tuple[float, ...]) -> None:
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            finish(folder, Cell(name, None, seed), loss)


def test_differences_and_shares_of_the_gap_are_paired_by_seed(tmp_path):
    fill(tmp_path, trees=(3.0, 4.0), k=(3.1, 4.2), all=(2.9, 3.8))
    study = replace(STUDY, gap_from="k", gap_to="all")
    found = results.results_of(tmp_path, study)
    trees, k, all_ = found.rows
    assert trees.difference is None
    assert k.difference == pytest.approx((0.15, 0.0707107, 2))
    assert trees.gap_closed == pytest.approx((0.5, 0.0, 2), abs=1e-9)
    assert k.gap_closed == pytest.approx((0.0, 0.0, 2), abs=1e-9)
    assert all_.gap_closed == pytest.approx((1.0, 0.0, 2), abs=1e-9)
    assert any("0.3000 nats apart (± 0.1414 over 2 seeds)" in note for note in found.notes)


def test_one_seed_has_no_spread_and_says_so(tmp_path):
    fill(tmp_path, trees=(3.0,), k=(3.2,))
    found = results.results_of(tmp_path, replace(STUDY, seeds=[0]))
    assert found.rows[1].difference == pytest.approx((0.2, None, 1))
    assert any("one seed, no spread" in note for note in found.notes)
    assert found.waiting == ["all"]


@pytest.mark.parametrize(
    ("k", "all_"), [((3.0, 3.1), (2.99, 3.09)), ((3.0, 3.6), (2.9, 3.1)), ((2.0, 2.0), (3.0, 3.0))]
)
def test_ends_of_a_gap_that_lie_too_close_give_no_share_but_the_difference(tmp_path, k, all_):
    fill(tmp_path, trees=(3.0, 3.1), k=k, all=all_)
    found = results.results_of(tmp_path, replace(STUDY, gap_from="k", gap_to="all"))
    assert [row.gap_closed for row in found.rows] == [None] * 3
    width = sum(a - b for a, b in zip(k, all_, strict=True)) / 2
    assert any("too little" in note and f"{width:+.4f} nats" in note for note in found.notes)


def test_curves_are_compared_at_equal_tokens_between_evaluations_only(tmp_path):
    curve = [results.Point(*values, 0.1) for values in ((0.0, 0.0, 9.0), (100.0, 1.0, 4.0), (400.0, 2.0, 2.0))]
    assert results.loss_at(curve, 200.0) == pytest.approx(3.0)  # half-way in the logarithm
    assert results.loss_at(curve, 401.0) is None
    fill(tmp_path, trees=(3.0, 4.0))
    (row,) = results.results_of(tmp_path, STUDY).rows
    assert row.at_tokens == pytest.approx({"1.25e+06": 7.5, "2.5e+06": 6.5, "5e+06": 5.5, "1e+07": 4.5, "2e+07": 3.5})


def test_cells_of_several_commits_or_beside_other_work_are_named(tmp_path):
    finish(tmp_path, Cell("trees", None, 0), 3.0, commit="aaa")
    finish(tmp_path, Cell("k", None, 0), 3.0, commit="bbb", at_once=2)
    notes = results.results_of(tmp_path, STUDY).notes
    assert any("NOT ONE COMMIT: cells ran at aaa, bbb" in note for note in notes)
    assert any("beside other work" in note and note.endswith("k-seed0") for note in notes)


def test_tables_and_page_hold_what_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fill(tmp_path, trees=(3.0, 4.0), k=(3.1, 4.2), all=(2.9, 3.8))
    (tmp_path / "cells" / "k-seed1" / "run" / "summary.json").unlink()
    record = read_cell(tmp_path / "cells" / "k-seed1")
    assert record is not None
    cells.write_cell(tmp_path / "cells" / "k-seed1", replace(record, failed="no | luck <b>"))
    cells.write_study(tmp_path, replace(STUDY, gap_from="k", gap_to="all"))
    show_results(write_results(tmp_path, cells.read_study(tmp_path)))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "FAILED k-seed1: no | luck <b>" in printed
    table = (tmp_path / "results.md").read_text()
    assert "| trees | 3.5000 ± 0.7071 | - | 0.500 | 2 |" in table
    assert "| all | 3.3500 ± 0.6364 | -0.1500 ± 0.0707 | 1.000 | 2 |" in table
    page = (tmp_path / "report.html").read_text()
    assert "no | luck &lt;b&gt;" in page
    assert page.count("<svg") == 1
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["rows"][0]["losses"] == {"0": 3.0, "1": 4.0}
    assert stored["failed"] == {"k-seed1": "no | luck <b>"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus": "text:a"}, "started with corpus=demo"),
        ({"tokens": 5.0}, "started with tokens"),
        ({"variants": {"trees": VariantFile(["--x=1"], 8)}}, "variant trees was started with --of=trees"),
    ],
)
def test_a_study_goes_on_only_as_it_began(changes, words):
    with pytest.raises(UserError, match=words):
        cells.same_study(STUDY, replace(STUDY, **changes))


def test_variants_and_seeds_may_be_added_and_decisions_stay():
    more = {**STUDY.variants, "new": VariantFile([], 16), "k": VariantFile(["--of=k"], 99)}
    found = cells.same_study(
        replace(STUDY, fingerprint="f"), replace(STUDY, variants=more, seeds=[0, 1, 2], max_tokens=7)
    )
    assert (found.variants["k"].batch_rows, found.max_tokens, found.fingerprint) == (8, 1000, "f")
    assert (list(found.variants)[-1], found.seeds) == ("new", [0, 1, 2])


TRAIN = """
import os, shutil, signal, sys, time
from pathlib import Path
home, words = Path(sys.argv[1]), sys.argv[2:]
out = Path(next(w for w in words if w.startswith("--out="))[6:])
out.mkdir(parents=True, exist_ok=True)
shutil.copy(home / "config.json", out / "config.json")
with (home / "calls.txt").open("a") as file:
    file.write(f"{out.parent.name} {'resumed' if '--resume' in words else 'new'} {os.environ.get('NPROC')}\\n")
if (home / f"fail-{out.parent.name}").exists():
    print("error: no luck.", file=sys.stderr)
    sys.exit(2)
if (home / f"wait-{out.parent.name}").exists():
    (home / f"wait-{out.parent.name}").unlink()
    def save(*_):
        (out / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        time.sleep(0.01)
for name in ("summary.json", "metrics.jsonl"):
    shutil.copy(home / name, out / name)
"""
"""A stand-in for `ufbert train`."""


@pytest.fixture
def study_of(tmp_path, corpus_file, monkeypatch):
    """Runs `ufbert study` with the stand-in; calls.txt of its folder has a line for each cell that was run."""
    home = tmp_path / "home"
    finish(home, Cell("x", None, 0), 3.0)
    for path in (home / "cells" / "x-seed0" / "run").iterdir():
        path.rename(home / path.name)
    (home / "train.py").write_text(TRAIN)
    (home / "calls.txt").touch()
    monkeypatch.setattr(children, "PROGRAM", (sys.executable, str(home / "train.py"), str(home)))
    monkeypatch.setattr(children, "POLL", 0.01)
    monkeypatch.setattr(report, "_pictures", lambda rows: "")  # another test draws them
    monkeypatch.setenv("NPROC", "all")

    def call(*more: str, variants: tuple[str, ...] = ("a", "b: --model.n-trees=2")) -> list[str]:
        before = len((home / "calls.txt").read_text().splitlines())
        words = ["--budget=4steps", f"--corpus=text:{corpus_file}", f"--out={tmp_path / 'study'}"]
        try:
            cli.call("study", [*SMALL, *words, f"--prepared={tmp_path / 'prepared'}", *more, *variants])
        finally:
            call.ran = (home / "calls.txt").read_text().splitlines()[before:]
        return call.ran

    call.home, call.folder, call.ran = home, tmp_path / "study", []
    return call


def test_a_finished_cell_is_not_run_again_and_more_may_be_added(study_of, capsys, monkeypatch):
    monkeypatch.setattr(study_run, "expected_seconds", lambda variant, platform: 1800.0)
    assert study_of("--plan") == []
    assert "2 cells, 0 finished; 1.00 hours" in capsys.readouterr().out
    assert not study_of.folder.exists()
    assert study_of() == ["a-seed0 new all", "b-seed0 new all"]
    assert study_of() == []
    assert study_of("--seeds=0,1", variants=("a", "b: --model.n-trees=2", "c")) == [
        "c-seed0 new all", "a-seed1 new all", "b-seed1 new all", "c-seed1 new all",
    ]  # fmt: skip
    record = read_cell(study_of.folder / "cells" / "b-seed0")
    assert record is not None
    (session,) = record.sessions
    assert "--model.n-trees=2" in record.words
    assert "--train.batch-rows=8" in record.words
    assert session.exit_code == 0
    assert session.command.startswith("ufbert train --config=tiny")
    assert session.commit == harness.commit()
    assert session.cores >= 1
    with pytest.raises(UserError, match=r"variant b was started with .*n-trees=2; it cannot go on with .*n-trees=3"):
        study_of(variants=("a", "b: --model.n-trees=3"))
    assert study_of.ran == []


def test_a_failed_cell_is_recorded_and_tried_again_while_the_others_go_on(study_of, capsys):
    (study_of.home / "fail-a-seed0").touch()
    with pytest.raises(UserError, match=r"1 of 2 cells failed: a-seed0 \(no luck\)"):
        study_of("--at-once=2")
    assert sorted(line.split()[0] for line in study_of.ran) == ["a-seed0", "b-seed0"]
    assert {line.split()[2] for line in study_of.ran} == {str(max(1, children.machine_facts()["cores"] // 2))}
    record = read_cell(study_of.folder / "cells" / "a-seed0")
    assert record is not None
    assert record.failed == "no luck."
    assert "FAILED a-seed0: no luck." in capsys.readouterr().out
    (study_of.home / "fail-a-seed0").unlink()
    assert study_of() == ["a-seed0 resumed all"]
    assert "beside other work, so that seconds say little: a-seed0" in " ".join(capsys.readouterr().out.split())


def test_a_signal_saves_the_cells_at_work_and_the_same_command_goes_on(study_of):
    (study_of.home / "wait-a-seed0").touch()
    with pytest.raises(Interrupted, match="the same command goes on") as stop:
        study_of()
    assert stop.value.code == 143
    assert study_of.ran == ["a-seed0 new all"]
    assert (study_of.folder / "cells" / "a-seed0" / "run" / "saved").exists()
    assert study_of() == ["a-seed0 resumed all", "b-seed0 new all"]
    record = read_cell(study_of.folder / "cells" / "a-seed0")
    assert record is not None
    assert [session.exit_code for session in record.sessions] == [143, 0]


def test_a_report_is_drawn_of_what_is_there(tmp_path, capsys):
    with pytest.raises(UserError, match="There is no study"):
        cli.call("study", ["--report", f"--out={tmp_path}"])
    fill(tmp_path, trees=(3.0,), k=(3.2, 3.1))
    cells.write_study(tmp_path, STUDY)
    cli.call("study", ["--report", f"--out={tmp_path}", "--baseline=k"])
    assert "not run yet: all" in capsys.readouterr().out
    assert "difference to k" in (tmp_path / "results.md").read_text()
    with pytest.raises(UserError, match="--baseline 'x' is no variant"):
        cli.call("study", ["--report", f"--out={tmp_path}", "--baseline=x"])


@pytest.mark.long
def test_a_study_of_real_runs_ends_with_two_models_that_read_the_same_rows(command, corpus_file, tmp_path):
    held = tmp_path / "held.txt"
    words = ["fox", "sea", "sees", "likes", "the", "rome", "london", "old", "in", "bird"]
    held.write_text("\n\n".join(" ".join(random.Random(n).choices(words, k=30)) for n in range(20)) + "\n")
    words = ["study", *SMALL, f"--corpus=text:{corpus_file}", f"--heldout=text:{held}", "--tokens=1e3", "--out=s"]
    words += ["--at-once=2", f"--prepared={tmp_path / 'prepared'}", "trees", "dense: --model.feedforward=glu"]
    done = command(*words, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [read_run(tmp_path / "s" / "cells" / name / "run") for name in ("trees-seed0", "dense-seed0")]
    assert {run.budget for run in runs} == {"4steps"}
    assert len({run.prepared_data.fingerprint for run in runs if run.prepared_data}) == 1
    assert all(
        (tmp_path / "s" / "cells" / name / "run" / "model").is_dir() for name in os.listdir(tmp_path / "s" / "cells")
    )
    assert "less trees" in done.stdout

"""`ufbert report`: any run at any time, several over each other, and sentences for what has no page."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import write_sweep
from pages import FIXTURES, check_page, facts_of, write_run

from ufbert import cli
from ufbert.compress.report import CompressFile, CompressResults, Row
from ufbert.errors import UserError
from ufbert.report.overlay import interpolated, marks
from ufbert.report.run_report import duration
from ufbert.runtime.claim import claimed


def drawn(*words: str):
    """Draw a page with the verb, and return it parsed."""
    return check_page(cli.call("report", words).read_text())


def words_of(page) -> str:
    (verdict,) = [e for e in page.all("p") if e.attributes.get("class") == "verdict"]
    return verdict.text


def test_a_finished_run_says_how_good_it_is_and_how_it_came_about(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    page = drawn(str(run))
    assert capsys.readouterr().out == f"report {run / 'report.html'}\n"
    words = words_of(page)
    assert words.startswith("The run is finished: 60 updates on 0.02 M tokens in 60.0 s.")
    assert "so the model has learnt 1.000 nats beyond that" in words
    assert "reaches 122 subtrees, which are dead weight" in words
    facts = facts_of(page)
    assert list(facts)[:4] == ["command", "commit", "processor", "load"]
    assert facts["command"] == "ufbert train --budget=60steps"
    assert "the [MASK] sees <the> house" in page.text
    assert "dog 50%, cat 25%" in page.text
    assert "tree 1x2 feedforward" in page.all("h1")[0].text  # as trained
    assert len([svg for svg in page.all("svg") if svg.attributes.get("role") == "img"]) == 4


def test_a_model_that_has_learnt_nothing_is_called_that(tmp_path):
    run = write_run(tmp_path / "run", unigram_loss=1.0)
    assert "learnt next to nothing beyond that" in words_of(drawn(str(run)))


def test_a_run_at_work_and_a_dead_one_have_pages_and_damage_is_counted(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "loss": \n\x00\xff\n{"step"')
    with claimed(run):
        words = words_of(drawn(str(run)))
    assert "The run is running, as of step 60" in words
    assert "Damaged lines of metrics.jsonl, left out: 3." in words
    assert "killed perhaps" in words_of(drawn(str(run)))


def test_several_runs_lie_over_each_other_against_tokens_and_time(tmp_path):
    runs = [write_run(tmp_path / name, spent_seconds=60.0 * i) for i, name in enumerate(("one", "two", "three"), 1)]
    path = runs[1] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"heldout_loss": ', '"heldout_loss": 1'))
    loss = json.loads((runs[1] / "summary.json").read_text())
    (runs[1] / "summary.json").write_text(json.dumps(loss | {"heldout_loss": loss["heldout_loss"] + 0.25}))
    page = drawn(*map(str, runs), f"--out={tmp_path / 'page.html'}")
    assert page.all("h1")[0].text == "3 runs: one, two, three"
    charts = [svg for svg in page.all("svg") if svg.attributes.get("role") == "img"]
    assert [chart.all("title")[0].text for chart in charts] == [
        "Held-out loss against tokens", "Held-out loss against time"
    ]  # fmt: skip
    assert all(name in charts[0].all("desc")[0].text for name in ("one goes from", "two goes from", "three goes from"))
    words = words_of(page)
    assert words.startswith("one has the lowest held-out loss")
    assert "have not had equal time" in words
    assert facts_of(page)["commit"] == "abc"
    assert not (runs[0] / "report.html").exists()


def test_runs_of_other_text_do_not_compare_and_say_so(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    config = json.loads((two / "config.json").read_text())
    config["prepared_data"] = {"folder": "elsewhere", "fingerprint": "other", "vocab_size": 300}
    (two / "config.json").write_text(json.dumps(config))
    assert "not read the same text" in words_of(drawn(str(one), str(two), f"--out={tmp_path / 'page.html'}"))


def test_a_sweep_has_a_page_with_right_and_wrong_answers(tmp_path):
    folder = write_sweep(tmp_path / "sweep", tasks=("rte", "stsb"))
    before = (folder / "glue.json").read_bytes()
    page = drawn(str(folder))
    heads = [[th.text for th in table.all("thead")[0].all("th")] for table in page.all("table")]
    answers = page.all("table")[heads.index(["task", "text", "given", "answer"])]
    rows = [[cell.text for cell in row.children if not isinstance(cell, str)] for row in answers.all("tr")[1:]]
    same = [given == answer for task, _, given, answer in rows if task == "RTE"]
    assert same == [True, True, False, False]
    assert (folder / "glue.json").read_bytes() == before


def write_compression(folder: Path) -> Path:
    """A compression at work that has made three updates of its tuning."""
    begun = CompressFile("ufbert-compress-run", 1, {"method": "prune", "folder": "runs/sst2"}, "0" * 64)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(begun)))
    lines = [json.dumps({"step": i, "lr": 1e-4, "spent": 1.0 * i, "loss": 1.0 / i}) + "\n" for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_a_compression_has_a_page_while_it_is_at_work_and_after(tmp_path):
    folder = write_compression(tmp_path / "half")
    page = drawn(str(folder))
    assert page.all("h1")[0].text == "prune: runs/sst2"
    assert words_of(page).startswith("Not finished: 3 updates of the tuning so far")
    assert [title.text for title in page.all("title")][-1] == "Loss of the tuning"
    size = {"architecture": "2 layers", "parameters": 9, "flops": 1e6}
    rows = [Row(name="before", bytes=8, lost=0.0, scores={"accuracy": 0.9}, **size)]
    rows.append(Row(name="after", bytes=4, lost=1.2, scores={"accuracy": 0.888}, **size))
    results = CompressResults(method="prune", model="runs/sst2", rows=rows, metrics=("accuracy",), unit="points")
    (folder / "compress.json").write_text(json.dumps(asdict(results)))
    page = drawn(str(folder))
    assert words_of(page) == "after, against the model before: 0.50 of the bytes, loses 1.2 points of accuracy."
    children = [
        replace(rows[1], name=name, lost=lost) for name, lost in (("tree_8", 1.0), ("tree_4", 2.0), ("none", 9.0))
    ]
    trees = replace(results, rows=[rows[0], *children, replace(rows[1], name="narrow_8", lost=-0.5)])
    (folder / "compress.json").write_text(json.dumps(asdict(trees)))
    assert words_of(drawn(str(folder))) == (
        "tree_8, against the model before: 0.50 of the bytes, loses 1.0 points of accuracy. "
        "Beside it, none loses 9.0 points, narrow_8 gains 0.5 points."
    )
    for damaged in (
        replace(results, rows=rows[:1]),
        replace(results, metrics=()),
        replace(results, rows=[rows[0], replace(rows[1], milliseconds={"int8": (1.0, 2.0, 3.0)})]),
    ):
        (folder / "compress.json").write_text(json.dumps(asdict(damaged)))
        with pytest.raises(UserError, match=r"compress\.json is damaged: it does not say what was compared"):
            cli.call("report", [str(folder)])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "needs a run folder"),
        (["none"], "There is no folder none"),
        (["."], "is not a run folder; nor is it a comparison, a study, a compression, or a sweep"),
        (["model"], "model is not a run folder of ufbert"),
        (["empty"], "has no metrics yet, so there is nothing to draw"),
        (["broken"], r"broken.config\.json is not readable JSON"),
        (["run", "other"], "needs --out FILE"),
        (["run", "run", "--out=a.html"], "named twice"),
        (["run", "glue", "--out=a.html"], "glue is a sweep; only runs are drawn over each other"),
        (["run", "half", "--out=a.html"], "half is not a run folder of ufbert"),
        (["run", "none", "--out=a.html"], "There is no folder none"),
        (["run", "--out=glue"], "--out glue is a folder"),
        (["run", "--out=glue/glue.json/a.html"], "Cannot write"),
    ],
)
def test_what_has_no_page_is_a_sentence_and_nothing_is_written(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "glue"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    write_run(tmp_path / "run")
    write_compression(tmp_path / "half")
    for name in ("empty", "broken"):
        write_run(tmp_path / name)
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    (tmp_path / "broken" / "config.json").write_text('{"format": "ufbert-run", ')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence):
        cli.call("report", words)
    assert sorted(tmp_path.rglob("*")) == before


def test_losses_are_interpolated_in_the_logarithm_and_not_beyond_what_was_measured():
    curve = [(0.0, 9.0), (100.0, 4.0), (400.0, 2.0)]
    assert interpolated(curve, 200.0) == pytest.approx(3.0)
    assert [interpolated(curve, x) for x in (50.0, 401.0)] == [None, None]
    assert marks(10e6, 2.5e6) == [625_000.0, 1.25e6, 2.5e6, 5e6, 10e6]
    assert [duration(s) for s in (12.34, 600.0, 90_000.0)] == ["12.3 s", "10.0 minutes", "25.0 hours"]

"""A sweep's pages hold its numbers, and broken sweeps are a sentence."""

import json
import re

import pytest
from conftest import REPO, write_sweep

from ufbert.errors import UserError
from ufbert.glue.compare import glue_table
from ufbert.glue.report import glue_markdown, write_glue_report
from ufbert.glue.results import read_results
from ufbert.report.page import grid, markdown_grid


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "sweep", tasks=("rte", "stsb", "MNLI-devsplit", "mnli"))


def test_the_report_holds_the_numbers_and_how_they_came_about(sweep):
    results = read_results(sweep)
    markdown = write_glue_report(sweep, results)
    assert markdown == (sweep / "glue.md").read_text()
    html = (sweep / "report.html").read_text()
    rte = results.tasks["rte"].dev["dev"]
    low, high = (f"{100 * x:.1f}" for x in rte.spread["accuracy"])
    each = " | ".join(f"{100 * rte.seeds[seed]['accuracy']:.1f}" for seed in (0, 1, 2))
    median, base = f"{100 * rte.median['accuracy']:.1f}", f"{100 * rte.majority['accuracy']:.1f}"
    assert f"| RTE | accuracy | {median} | {low} to {high} | {each} | {base} | 277, official |" in markdown
    for words in (
        "crammed (fine-tuned): 5 epochs, batch 16", "| MNLI-devsplit | accuracy |", "277, a part of the task",
        "| MNLI mismatched | accuracy |", "277 of 9,832", "| STS-B | spearman |", "not computed for want of CoLA, SST-2",
        "| RTE | 277 | 5 | 0 | model | 4e-05 | 12 | 0 |",
    ):  # fmt: skip
        assert words in markdown
    for words in (median, "MNLI mismatched, seed 0", "5 epochs, batch 16", "cpu &lt;1&gt;", "not computed for want of"):
        assert words in html
    assert html.count("<svg") == 1 + 4  # all scores, and the curves of each task
    assert html.count("MNLI") > 3
    counts = rte.confusion[0]
    assert all(f"{n:,} <span" in html for row in counts for n in row)
    assert not re.search(r'(src|href)="(?!#)', html)  # nothing is fetched
    assert not list(sweep.glob(".*.partial"))


def test_a_sweep_without_tasks_curves_or_confusions_has_a_page(tmp_path):
    folder = write_sweep(tmp_path / "none", tasks=())
    write_glue_report(folder, read_results(folder))
    assert "<svg" not in (folder / "report.html").read_text()
    folder = write_sweep(tmp_path / "values", tasks=("stsb",))
    found = json.loads((folder / "glue.json").read_text())
    found["tasks"]["stsb"]["curves"] = {"0": []}
    (folder / "glue.json").write_text(json.dumps(found))
    write_glue_report(folder, read_results(folder))
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 1
    assert "Confusions" not in html


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "other", "is not a glue.json of format version 1"),
        (("format_version",), 2, "is not a glue.json of format version 1"),
        (("tasks",), None, "tasks is null; it must be an object"),
        (("tasks", "rte", "lr"), "fast", 'tasks.rte.lr is "fast"; it must be a finite number'),
        (("tasks", "rte", "metrics"), [], "seeds; none may be 0"),
        (("tasks", "rte", "dev", "dev", "seeds"), {}, "seeds; none may be 0"),
        (("tasks", "rte", "dev", "dev", "median"), {}, "lacks 'accuracy'"),
        (("tasks", "rte", "dev", "dev", "spread", "accuracy"), [0.1], r"spread.accuracy is \[0.1\]"),
        (("tasks", "rte", "dev", "dev", "confusion", "0"), [[1, 2]], "not 2 by 2"),
        (("protocol",), {"name": "crammed"}, "protocol.text is missing"),
    ],
)
def test_a_broken_sweep_is_a_sentence(sweep, path, value, words):
    found = json.loads((sweep / "glue.json").read_text())
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (sweep / "glue.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=words) as caught:
        read_results(sweep)
    assert "glue.json" in str(caught.value)


def test_missing_and_cut_off_files_are_a_sentence(sweep):
    text = (sweep / "glue.json").read_text()
    (sweep / "glue.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="is not readable JSON: it is cut short"):
        read_results(sweep)
    (sweep / "glue.json").write_text("[]")
    with pytest.raises(UserError, match=r"glue\.json holds \[\] where an object belongs"):
        read_results(sweep / "glue.json")
    with pytest.raises(UserError, match="does not exist"):
        read_results(sweep / "none")


def test_tables_escape_what_would_end_a_cell():
    assert "<td>a &lt; b</td>" in grid(["x"], [["a < b"]])
    assert markdown_grid(["x", "n"], [["a|b", "1"]], numbers=(1,)) == "| x | n |\n| --- | --: |\n| a\\|b | 1 |"


def test_a_sweep_of_an_earlier_version_is_read_and_compared():
    folder = REPO / "tests" / "fixtures" / "before_house" / "glue"
    results = read_results(folder)
    assert glue_markdown(results) == (folder / "glue.md").read_text()
    assert json.loads(json.dumps(results.to_json())) == json.loads((folder / "glue.json").read_text())
    assert glue_table([folder, folder]).count("+0.0 [+0.0, +0.0] ≈") == 3

"""A sweep's pages hold its numbers, and broken sweeps are a sentence."""

import json
import re

import pytest
from conftest import write_sweep

from ufbert.errors import UserError
from ufbert.report.glue_report import write_glue_report
from ufbert.report.glue_results import read_results
from ufbert.report.page import grid, markdown_grid


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "sweep", tasks=("rte", "stsb", "MNLI-devsplit", "mnli"))


def test_the_report_holds_the_numbers_and_how_they_came_about(sweep):
    table, page = write_glue_report(sweep)
    assert (table, page) == (sweep / "glue.md", sweep / "report.html")
    markdown, html = table.read_text(), page.read_text()
    results = read_results(sweep)
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
    _, page = write_glue_report(write_sweep(tmp_path / "none", tasks=()))
    assert "<svg" not in page.read_text()
    folder = write_sweep(tmp_path / "values", tasks=("stsb",))
    found = json.loads((folder / "glue.json").read_text())
    found["tasks"]["stsb"]["curves"] = {"0": []}
    (folder / "glue.json").write_text(json.dumps(found))
    html = write_glue_report(folder)[1].read_text()
    assert html.count("<svg") == 1
    assert "Confusions" not in html


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "other", "is not a glue.json of format version 1"),
        (("format_version",), 2, "is not a glue.json of format version 1"),
        (("tasks",), None, "is not a whole glue.json"),
        (("tasks", "rte", "lr"), "fast", "is not a whole glue.json"),
        (("tasks", "rte", "metrics"), [], "without a metric or a seed"),
        (("tasks", "rte", "dev", "dev", "seeds"), {}, "without a metric or a seed"),
        (("tasks", "rte", "dev", "dev", "median"), {}, "lacks 'accuracy'"),
        (("tasks", "rte", "dev", "dev", "spread", "accuracy"), [0.1], "is not a whole glue.json"),
        (("tasks", "rte", "dev", "dev", "confusion", "0"), [[1, 2]], "not 2 by 2"),
        (("protocol",), {"name": "crammed"}, "lacks 'text'"),
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
        write_glue_report(sweep)
    assert "glue.json" in str(caught.value)


def test_missing_and_cut_off_files_are_a_sentence(sweep):
    text = (sweep / "glue.json").read_text()
    (sweep / "glue.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="is not JSON"):
        read_results(sweep)
    (sweep / "glue.json").write_text("[]")
    with pytest.raises(UserError, match=r"is not a glue\.json"):
        read_results(sweep / "glue.json")
    with pytest.raises(UserError, match="does not exist"):
        read_results(sweep / "none")


def test_tables_escape_what_would_end_a_cell():
    assert "<td>a &lt; b</td>" in grid(["x"], [["a < b"]])
    assert markdown_grid(["x", "n"], [["a|b", "1"]], numbers=(1,)) == "| x | n |\n| --- | --: |\n| a\\|b | 1 |"

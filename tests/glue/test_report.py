"""A sweep's pages hold its numbers, and broken sweeps are a sentence."""

import json
import re

import pytest
from conftest import REPO, write_sweep
from pages import check_page, facts_of

from ufbert.errors import UserError
from ufbert.glue.compare import glue_table
from ufbert.glue.report import glue_markdown, glue_page, print_results, shortfalls, write_glue_report
from ufbert.glue.results import DevResult, GlueResults, ProtocolResult, TaskResult, read_results
from ufbert.glue.scores import averages
from ufbert.report.page import html, markdown_grid


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "sweep", tasks=("rte", "stsb", "MNLI-devsplit", "mnli"))


def test_the_report_holds_the_numbers_and_how_they_came_about(sweep):
    results = read_results(sweep)
    markdown = write_glue_report(sweep, results)
    assert markdown == (sweep / "glue.md").read_text()
    text = (sweep / "report.html").read_text()
    page = check_page(text)
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
        assert words in text
    assert text.count('role="img"') == 1 + 2 * 4  # all scores, and the loss and the score of each task
    assert text.count("MNLI") > 3
    cells = {cell.text.split(" (")[0] for cell in page.all("td")}
    assert all(f"{n:,}" in cells for row in rte.confusion[0] for n in row)
    assert {"command", "commit", "processor", "load"} <= facts_of(page).keys()
    assert not list(sweep.glob(".*.partial"))


def test_a_sweep_without_tasks_curves_or_confusions_has_a_page(tmp_path):
    folder = write_sweep(tmp_path / "none", tasks=())
    write_glue_report(folder, read_results(folder))
    assert not check_page((folder / "report.html").read_text()).all("svg")
    folder = write_sweep(tmp_path / "values", tasks=("stsb",))
    found = json.loads((folder / "glue.json").read_text())
    found["tasks"]["stsb"]["curves"] = {"0": []}
    (folder / "glue.json").write_text(json.dumps(found))
    write_glue_report(folder, read_results(folder))
    text = (folder / "report.html").read_text()
    assert text.count('role="img"') == 1
    assert "Confusions" not in text


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
    assert markdown_grid(["x", "n"], [["a|b", "1"]], numbers=(1,)) == "| x | n |\n| --- | --: |\n| a\\|b | 1 |"


def test_a_sweep_of_an_earlier_version_is_read_and_compared():
    folder = REPO / "tests" / "fixtures" / "before_house" / "glue"
    results = read_results(folder)
    assert glue_markdown(results) == (folder / "glue.md").read_text()
    assert json.loads(json.dumps(results.to_json())) == json.loads((folder / "glue.json").read_text())
    assert glue_table([folder, folder]).count("+0.0 [+0.0, +0.0] ≈") == 3


def own_results(metrics, label_names, dev_counts, majority, median):
    """Results of a task of one's own with one dev split, one seed and these scores."""
    classes = len(label_names)
    confusion = {0: [[count, *[0] * (classes - 1)] for count in dev_counts]} if classes else {}
    dev = DevResult(
        rows=sum(dev_counts), official_rows=0, seeds={0: median}, median=median,
        spread={name: (value, value) for name, value in median.items()}, majority=majority, confusion=confusion,
    )  # fmt: skip
    task = TaskResult(
        folder="reviews", cut_of="", metrics=metrics, label_names=label_names, train_rows=9, skipped_rows=0, truncated_rows=0,
        lr=1e-3, saved_seed=0, dev={"dev": dev}, curves={}, starts_from="model", seconds=1.0,
    )  # fmt: skip
    protocol = ProtocolResult("small", "2 epochs", "fine-tuned")
    return GlueResults("runs/m/model", "a.csv", protocol, {}, {}, {"reviews": task}, averages({"reviews": task}))


STARS = (("accuracy",), ("bad", "good"), [30, 70], {"accuracy": 0.7})
SPAM = (("f1",), ("ham", "spam"), [60, 40], {"f1": 0.0})


@pytest.mark.parametrize(
    ("kind", "median", "words"),
    [
        (STARS, 0.65, "accuracy 65.0 is worse than always answering good (70.0%)."),
        (STARS, 0.7, "accuracy 70.0 is no better than always answering good (70.0%)."),
        (STARS, 0.71, None),
        (
            (("accuracy",), ("a", "b", "c"), [40, 40, 20], {"accuracy": 0.4}),
            0.3,
            "always answering a or always b (40.0%).",
        ),
        (SPAM, 0.5, "f1 50.0 is worse than always answering spam (57.1)."),  # F1 counts spam, which is not the majority
        (SPAM, 0.58, None),
        ((("matthews",), ("a", "b"), [50, 50], {"matthews": 0.0}), 0.1, "is not to be told from chance"),
        ((("matthews",), ("a", "b"), [50, 50], {"matthews": 0.0}), 0.3, None),
        ((("pearson",), (), [100], {"pearson": 0.0}), 0.0, "texts can reach 20.0 on 100 rows."),
        ((("pearson",), (), [100], {"pearson": 0.0}), -0.9, "is not to be told from chance"),
        ((("spearman",), (), [100], {"spearman": 0.0}), 0.4, None),
    ],
)
def test_what_no_knowledge_reaches_is_said_in_words(kind, median, words, capsys):
    metrics, label_names, counts, majority = kind
    results = own_results(metrics, label_names, counts, majority, dict.fromkeys(metrics, median))
    if words is None:
        assert shortfalls(results) == []
        return
    (text,) = shortfalls(results)
    assert words in text
    assert text in glue_markdown(results)
    assert text in html(glue_page(results))
    print_results(results)
    printed = capsys.readouterr().out
    assert text in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80


def test_a_task_of_ones_own_has_its_name_and_none_of_glues_averages():
    results = own_results(*STARS, median={"accuracy": 0.8})
    for text in (glue_markdown(results), html(glue_page(results))):
        assert "reviews: runs/m/model" in text
        for words in ("GLUE", "nine numbers", "eight tasks", "official", "for want of", "Averages"):
            assert words not in text


def test_the_scores_of_a_whole_sweep_fit_a_terminal(sweep, capsys):
    print_results(read_results(sweep))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert re.search(r"^MNLI mismatched +accuracy +\d", printed, re.MULTILINE)

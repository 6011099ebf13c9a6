"""Differences and their intervals against known answers, and what the table warns of."""

import json
import re

import numpy as np
import pytest
from conftest import write_sweep

from ufbert.errors import UserError
from ufbert.glue.compare import Difference, compare, glue_table
from ufbert.glue.metrics import DRAWS, accuracy, interval, pearson, resampled_scores
from ufbert.options.finetune import GlueTableOptions


def table(*folders):
    return glue_table(folders)


def row(text, task):
    """The cells of a task's row."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {task} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_interval_of_a_difference_in_accuracy_is_the_normal_one_for_many_rows():
    rng = np.random.default_rng(5)
    labels = np.zeros(2000)
    first, other = (rng.random((2, 2000)) < np.array([[0.30], [0.25]])).astype(float)  # 1 is an error
    gain = (other == labels).astype(float) - (first == labels)
    scores = resampled_scores(accuracy, [first[None], other[None]], labels, np.random.default_rng(0))
    low, high = interval(*scores, paired=True, rng=np.random.default_rng(0))
    half = 1.96 * gain.std() / np.sqrt(2000)
    assert low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(gain.mean() + half, abs=0.1 * half)


def test_right_against_wrong_on_every_row_leaves_no_doubt():
    labels = np.arange(50.0) % 2
    scores = resampled_scores(accuracy, [labels[None], 1 - labels[None]], labels, np.random.default_rng(0))
    assert interval(*scores, paired=False, rng=np.random.default_rng(0)) == (-1.0, -1.0)


def test_seeds_alone_give_the_range_of_five_medians():
    first, other = np.zeros((DRAWS, 5)), np.tile([0.1, 0.2, 0.3, 0.4, 0.5], (DRAWS, 1))
    assert interval(first, other, True, np.random.default_rng(0)) == (pytest.approx(0.1), pytest.approx(0.5))


def test_equal_seeds_are_drawn_together_and_others_apart():
    scores = np.tile([0.1, 0.2, 0.6], (DRAWS, 1))
    assert interval(scores, scores, True, np.random.default_rng(0)) == (0.0, 0.0)
    low, high = interval(scores, scores, False, np.random.default_rng(0))
    assert low == pytest.approx(-0.5)
    assert high == pytest.approx(0.5)


def test_a_resampled_correlation_stays_one():
    labels = np.arange(30.0)
    (scores,) = resampled_scores(pearson, [2 * labels[None] + 1], labels, np.random.default_rng(0))
    np.testing.assert_allclose(scores, 1.0)


def test_identical_predictions_differ_by_nothing(tmp_path):
    text = table(write_sweep(tmp_path / "a"), write_sweep(tmp_path / "b"))
    for task in ("RTE", "STS-B"):
        cells = row(text, task)
        assert cells[3] == cells[4]
        assert cells[5] == "+0.0 [+0.0, +0.0] ≈"
    assert "WARNING" not in text
    assert "bootstrap draws, each of dev rows" in text
    assert "The range of 3 seeds holds their true median in 75 % of cases" in text


def test_a_clear_difference_is_not_marked_and_a_small_one_is(tmp_path):
    first = write_sweep(tmp_path / "a", skill=0.6)
    text = table(first, write_sweep(tmp_path / "b", skill=0.95), write_sweep(tmp_path / "c", skill=0.61))
    assert "≈" not in row(text, "RTE")[5]
    assert row(text, "RTE")[7].endswith("≈")
    low, high = map(float, re.findall(r"[-+]\d+\.\d", row(text, "RTE")[5])[1:])
    assert 20 < low < 35 < high < 50
    assert text == table(first, tmp_path / "b", tmp_path / "c")
    assert row(text, "A")[1:3] == ["runs/a/model", "crammed (fine-tuned): 5 epochs, batch 16"]


def test_without_prediction_files_the_interval_is_of_seeds_and_says_so(tmp_path):
    first, other = write_sweep(tmp_path / "a"), write_sweep(tmp_path / "b", skill=0.8, predictions=False)
    text = table(first, other)
    assert row(text, "RTE")[5].endswith("†")
    assert "† No prediction files with equal rows" in text
    one = [write_sweep(tmp_path / name, seeds=(0,), predictions=False, skill=s) for name, s in (("c", 0.6), ("d", 0.9))]
    assert row(table(*one), "RTE")[5].endswith("(no interval)")
    assert "[" not in row(table(*one), "RTE")[5]


def test_one_seed_each_still_has_the_chance_of_the_rows(tmp_path):
    text = table(write_sweep(tmp_path / "a", seeds=(0,), skill=0.6), write_sweep(tmp_path / "b", seeds=(1,), skill=0.9))
    assert re.search(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]$", row(text, "RTE")[5])
    assert "leaves out what another seed" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "dir:elsewhere"}, "B and A differ in the source (dir:glue; dir:elsewhere)"),
        (
            {"protocol": {"name": "bert", "text": "3 epochs", "mode": "probe"}},
            "B and A differ in the protocol's name (crammed; bert)",
        ),
        (
            {"protocol": {"name": "crammed", "text": "3 epochs", "mode": "fine-tuned"}},
            "B and A differ in the protocol's text",
        ),
    ],
)
def test_other_protocols_and_sources_are_warned_of(tmp_path, change, words):
    text = table(write_sweep(tmp_path / "a"), write_sweep(tmp_path / "b", **change))
    assert f"**WARNING: {words}" in text


def test_other_rows_are_not_subtracted(tmp_path):
    first, other = write_sweep(tmp_path / "a"), write_sweep(tmp_path / "b")
    path = other / "predictions" / "rte.dev.tsv"
    path.write_text(path.read_text().replace("pair 3\t", "another 3\t"))
    assert row(table(first, other), "RTE")[5] == "not the same dev rows"
    found = json.loads((other / "glue.json").read_text())
    found["tasks"]["stsb"]["dev"]["dev"]["rows"] = 100
    found["tasks"]["rte"]["train_rows"] = 5
    (other / "glue.json").write_text(json.dumps(found))
    text = table(first, other)
    assert row(text, "STS-B")[2:] == ["277 / 100", *row(text, "STS-B")[3:5], "not the same dev rows"]
    assert "the train rows of RTE (277; 5)" in text


def test_tasks_that_one_lacks_are_left_empty_and_cuts_are_named(tmp_path):
    first = write_sweep(tmp_path / "a", tasks=("rte",))
    text = table(first, write_sweep(tmp_path / "b", tasks=("rte", "MNLI-devsplit")))
    assert row(text, "MNLI-devsplit (a part of MNLI)")[3] == ""
    assert row(text, "MNLI-devsplit (a part of MNLI)")[5] == ""
    assert "nine numbers" not in text


def test_averages_stand_below_where_all_have_them(tmp_path):
    average = {"nine": {"name": "nine numbers", "sentence": "The mean.", "value": 0.7, "missing": []}}
    other = {"nine": {**average["nine"], "value": 0.725}}
    text = table(write_sweep(tmp_path / "a", averages=average), write_sweep(tmp_path / "b", averages=other))
    assert row(text, "nine numbers") == ["nine numbers", "mean", "", "70.0", "72.5", "+2.5 (no interval)"]


def test_predictions_of_another_run_are_refused(tmp_path):
    first, other = write_sweep(tmp_path / "a"), write_sweep(tmp_path / "b", skill=0.9)
    (first / "predictions" / "rte.dev.tsv").write_bytes((other / "predictions" / "rte.dev.tsv").read_bytes())
    with pytest.raises(UserError, match="is not of the run in"):
        table(first, other)


def test_the_command_takes_folders_and_files_prints_and_writes(tmp_path, capsys):
    first, other = write_sweep(tmp_path / "a"), write_sweep(tmp_path / "b", skill=0.8)
    compare(GlueTableOptions((str(first), str(other / "glue.json")), str(tmp_path / "table.md")))
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text() == table(first, other)
    with pytest.raises(UserError, match="at least two"):
        compare(GlueTableOptions((str(first),)))
    with pytest.raises(UserError, match="does not exist"):
        compare(GlueTableOptions((str(first), str(tmp_path / "none"))))


def test_differences_have_a_sign_and_no_negative_zero():
    assert str(Difference(-0.0001, -0.02, 0.03, True)) == "+0.0 [-2.0, +3.0] ≈"
    assert str(Difference(0.05, 0.01, 0.09, True)) == "+5.0 [+1.0, +9.0]"


def test_the_verb_is_there(command, tmp_path):
    found = command("glue-table", str(write_sweep(tmp_path / "a")), str(tmp_path / "none"))
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert len(found.stderr.splitlines()) == 1

"""The numbers of a sweep against closed forms, and its files line by line."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from ufbert.errors import UserError
from ufbert.glue.metrics import accuracy, score
from ufbert.glue.predictions import read_predictions, write_predictions, write_submission
from ufbert.glue.results import DevResult, TaskResult
from ufbert.glue.scores import DEV_ROWS, averages, confusion, decide, dev_result, majority
from ufbert.glue.tasks import TASKS, Examples, cut_of


def rows(labels, pairs=True):
    return Examples(
        [f"text {i}" for i in range(len(labels))], [f"pair {i}" for i in range(len(labels))] if pairs else None, labels
    )


def result(task, split, train, dev, scores):
    metrics = {seed: score(task.metrics, decide(task, found), np.asarray(dev.labels)) for seed, found in scores.items()}
    return dev_result(task, split, train, dev, metrics, scores)


def test_median_and_spread_are_over_seeds():
    def of(task, metrics):
        return dev_result(TASKS[task], "dev", rows([0.0, 1.0]), rows([0.0, 1.0]), metrics, {})

    found = of(
        "mrpc", {7: {"f1": 0.8, "accuracy": 0.7}, 1: {"f1": 0.6, "accuracy": 0.9}, 3: {"f1": 0.9, "accuracy": 0.5}}
    )
    assert found.median == {"f1": 0.8, "accuracy": 0.7}
    assert found.spread == {"f1": (0.6, 0.9), "accuracy": (0.5, 0.9)}
    assert found.seeds[3] == {"f1": 0.9, "accuracy": 0.5}
    assert of("rte", {0: {"accuracy": 0.5}, 1: {"accuracy": 0.6}}).median["accuracy"] == pytest.approx(0.55)


def test_the_majority_answers_the_class_most_frequent_in_training():
    mostly_one, official = rows([1.0, 1.0, 0.0]), rows([1.0] * 279 + [0.0] * 129)  # MRPC's dev set
    found = majority(TASKS["mrpc"], mostly_one, official)
    assert found["f1"] == pytest.approx(2 * 279 / (408 + 279)) == pytest.approx(0.812, abs=5e-4)
    assert found["accuracy"] == pytest.approx(279 / 408)
    assert majority(TASKS["cola"], mostly_one, official) == {"matthews": 0.0, "accuracy": pytest.approx(279 / 408)}
    assert majority(TASKS["rte"], rows([0.0, 0.0, 1.0]), official)["accuracy"] == pytest.approx(129 / 408)
    assert majority(TASKS["rte"], rows([0.0, 1.0]), official)["accuracy"] == pytest.approx(129 / 408)
    assert majority(TASKS["stsb"], rows([0.1, 4.0]), rows([0.1, 2.0, 4.3])) == {"pearson": 0.0, "spearman": 0.0}


def test_confusions_have_true_classes_down_and_given_ones_across():
    found = confusion(TASKS["mnli"], np.array([0, 1, 1, 2]), np.array([0.0, 1.0, 2.0, 2.0]))
    assert found == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_a_dev_split_is_official_only_whole_and_under_its_own_name():
    scores = {0: np.eye(2)[[0] * 277]}
    whole, part = rows([0.0] * 277), rows([0.0] * 276)
    found = result(TASKS["rte"], "dev", whole, whole, scores)
    assert found.rows == found.official_rows == 277
    found = result(TASKS["rte"], "dev", whole, part, {0: scores[0][:276]})
    assert found.rows == 276 < found.official_rows
    own = replace(TASKS["rte"], name="mine", folder="mine")
    for task in (cut_of("RTE-half"), own):
        assert result(task, "dev", whole, whole, scores).official_rows == 0
    values = result(TASKS["stsb"], "dev", whole, whole, {0: np.ones((277, 1))})
    assert values.confusion == {}
    assert values.median == {"pearson": 0.0, "spearman": 0.0}


def entry(name, value, cut="", split_rows=None):
    task = cut_of(name) or TASKS[name]
    scores = {metric: value + i / 100 for i, metric in enumerate(task.metrics)}
    dev = {
        split: DevResult(
            rows=split_rows or DEV_ROWS.get(name, {}).get(split, 99), official_rows=0, seeds={0: scores}, median=scores,
            spread=dict.fromkeys(scores, (0.0, 1.0)), majority=scores, confusion={},
        )
        for split in task.dev
    }  # fmt: skip
    return TaskResult(
        folder=task.folder, cut_of=cut, metrics=task.metrics, label_names=task.label_names, train_rows=0, skipped_rows=0,
        truncated_rows=0, lr=1e-3, saved_seed=0, dev=dev, curves={}, starts_from="model", seconds=1.0,
    )  # fmt: skip


def test_averages_are_those_of_the_papers():
    tasks = {name: entry(name, 0.1 * i) for i, name in enumerate(TASKS)}
    found = averages(tasks)
    cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte = (0.1 * i for i in range(8))
    rest = [sst2, mrpc, stsb, qqp, mnli, mnli, qnli, rte]
    assert found["nine"].value == pytest.approx(sum([cola, *rest]) / 9)
    assert found["nine_without_cola"].value == pytest.approx(sum(rest) / 8)
    ones = [sst2, mrpc + 0.005, stsb + 0.005, qqp + 0.005, mnli, qnli, rte]  # two metrics, the second 0.01 more
    assert found["eight"].value == pytest.approx(sum([cola, *ones]) / 8)
    assert found["eight_without_cola"].value == pytest.approx(sum(ones) / 7)
    assert "nine numbers" in found["nine"].sentence
    assert all(not average.missing for average in found.values())


def test_an_average_with_a_member_missing_names_it_instead_of_a_number():
    tasks = {name: entry(name, 0.5) for name in TASKS if name not in ("cola", "mnli", "qqp")}
    tasks["mnli-devsplit"] = entry("MNLI-devsplit", 0.5, cut="mnli")
    tasks["rte"] = entry("rte", 0.5, split_rows=100)
    found = averages(tasks)
    assert found["nine"].value is None
    part = "(only a part of it: MNLI-devsplit)"
    assert found["eight"].missing == [
        "CoLA", "QQP", f"MNLI matched {part}", f"MNLI mismatched {part}", "RTE (100 of 277 dev rows)",
    ]  # fmt: skip
    assert "CoLA" not in found["nine_without_cola"].missing
    assert averages({})["nine"].value is None


def test_every_official_dev_split_has_its_row_count():
    assert {name: tuple(counts) for name, counts in DEV_ROWS.items()} == {n: t.dev for n, t in TASKS.items()}


def test_predictions_come_back_and_their_scores_with_them(tmp_path):
    labels = [0.0, 1.0, 1.0]
    texts = Examples(['say "no', "tab\there", "line\nend"], ["a", "b\r", ""], labels)
    scores = {0: np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), 5: np.array([[0.0, 1.0]] * 3)}
    path = write_predictions(tmp_path, TASKS["rte"], "dev", texts, scores)
    assert path == tmp_path / "predictions" / "rte.dev.tsv"
    assert path.read_text().split("\n") == [
        "index\ttext\tpair\tlabel\tprediction_0\tprobability_0\tprediction_5\tprobability_5",
        '0\tsay "no\ta\tentailment\tentailment\t0.8808\tnot entailment\t0.7311',
        "1\ttab here\tb \tnot entailment\tentailment\t0.5000\tnot entailment\t0.7311",
        "2\tline end\t\tnot entailment\tnot entailment\t0.8808\tnot entailment\t0.7311",
        "",
    ]
    found = read_predictions(path, TASKS["rte"].label_names)
    assert found.labels.tolist() == labels
    assert accuracy(found.predicted[0], found.labels) == pytest.approx(2 / 3)
    assert found.rows[0] == ("0", 'say "no', "a", "entailment")
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))) == 3


def test_pandas_reads_predictions_with_quoting_off(tmp_path):
    pandas = pytest.importorskip("pandas")
    texts = Examples(['"open', "b"], None, [2.5, 4.0])
    path = write_predictions(tmp_path, TASKS["stsb"], "dev", texts, {3: np.array([[2.25], [5.5]])})
    found = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    assert found.to_dict("list") == {
        "index": [0, 1],
        "text": ['"open', "b"],
        "label": [2.5, 4.0],
        "prediction_3": [2.25, 5.5],
    }
    back = read_predictions(path, ())
    assert score(("pearson",), back.predicted[3], back.labels) == {"pearson": 1.0}


def test_rows_without_labels_have_no_label_column(tmp_path):
    path = write_predictions(tmp_path, TASKS["sst2"], "test", Examples(["a"], None, None), {0: np.array([[0.0, 9.0]])})
    assert path.read_text() == "index\ttext\tprediction_0\tprobability_0\n0\ta\tpositive\t0.9999\n"


@pytest.mark.parametrize(
    ("name", "split", "file", "answers"),
    [
        ("rte", "test", "RTE", ["entailment", "not_entailment", "entailment"]),
        ("qnli", "test", "QNLI", ["entailment", "not_entailment", "entailment"]),
        ("mnli", "test_matched", "MNLI-m", ["entailment", "neutral", "contradiction"]),
        ("mnli", "test_mismatched", "MNLI-mm", ["entailment", "neutral", "contradiction"]),
        ("mnli", "ax", "AX", ["entailment", "neutral", "contradiction"]),
        ("cola", "test", "CoLA", ["0", "1", "0"]),
        ("sst2", "test", "SST-2", ["0", "1", "0"]),
        ("mrpc", "test", "MRPC", ["0", "1", "0"]),
        ("qqp", "test", "QQP", ["0", "1", "0"]),
        ("wnli", "test", "WNLI", ["0", "1", "0"]),
        ("stsb", "test", "STS-B", ["0.000", "2.346", "5.000"]),
    ],
)
def test_submissions_are_what_the_server_takes(tmp_path, name, split, file, answers):
    task = TASKS[name]
    values = np.array([[-0.3], [2.3456], [7.0]])
    scores = values if task.is_regression else np.eye(task.n_outputs)[[i % task.n_outputs for i in range(3)]]
    path = write_submission(tmp_path, task, split, scores)
    assert path == tmp_path / "submission" / f"{file}.tsv"
    assert path.read_text() == "index\tprediction\n" + "".join(f"{i}\t{answer}\n" for i, answer in enumerate(answers))
    assert [p.name for p in path.parent.iterdir()] == [f"{file}.tsv"]


def test_a_refusing_disk_is_a_sentence(tmp_path):
    (tmp_path / "submission").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write .*RTE\.tsv"):
        write_submission(tmp_path, TASKS["rte"], "test", np.eye(2))


@pytest.mark.parametrize(
    "text",
    ["", "index\ttext\n0\ta\n", "index\ttext\tlabel\tprediction_0\n0\ta\tmaybe\tentailment\n",
     "index\ttext\tlabel\tprediction_0\n0\ta\tentailment\n", "index\ttext\tlabel\tprediction_x\n"],
)  # fmt: skip
def test_broken_prediction_files_are_named(tmp_path, text):
    path = tmp_path / "rte.dev.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rte\.dev\.tsv is not a whole prediction file"):
        read_predictions(path, TASKS["rte"].label_names)
    assert read_predictions(tmp_path / "none.tsv", ()) is None

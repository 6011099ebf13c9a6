"""The report: the verdict follows from the numbers, whichever way they fall, and says what is missing."""

from dataclasses import replace

import pytest
from made import ASKED, SESSION, finish, make, times_of, write_study_of, write_times

from ufbert import cli
from ufbert.compare.claims import claim_rows
from ufbert.compare.collect import comparison_results
from ufbert.compare.jobs import JobFile, write_job
from ufbert.compare.page import draw_comparison, page_of
from ufbert.compare.protocol import write_comparison
from ufbert.compare.results import Spread, read_results
from ufbert.compare.verdict import chance_beyond, how_sure, is_settled, mean_scores
from ufbert.errors import UserError
from ufbert.report.charts import Scatter


def sentence(results, beginning: str) -> str:
    (found,) = [text for text in results.verdict if text.startswith(beginning)]
    return found


def test_a_whole_comparison_is_drawn_and_its_file_read_back(tmp_path):
    make(tmp_path)
    results = draw_comparison(tmp_path, ASKED)
    assert read_results(tmp_path) == results
    tree, control, dense = results.models
    assert (tree.control, control.control, dense.control) == ("path_dense_1x11", "", "")
    assert (tree.neurons_used, tree.neurons, control.neurons) == (9, 511, 9)
    assert tree.by_tokens is not None
    assert tree.by_tokens.to_control is not None
    assert tree.by_tokens.to_control.mean == pytest.approx(0.0975)
    assert tree.by_tokens.difference is not None
    assert tree.by_tokens.difference.mean == pytest.approx(0.285)
    assert tree.by_tokens.curve[-1].flops == 5e13
    assert tree.usage == {"leaves_in_use": pytest.approx(0.6), "dead_subtrees": 7.0}
    assert tree.hours == pytest.approx(5 * 0.1)  # four runs and a sweep
    (score,) = dense.glue
    assert score.difference is None
    assert tree.glue[0].low is not None
    assert tree.glue[0].low < tree.glue[0].difference < tree.glue[0].high < 0
    assert not results.failed
    assert not results.waiting
    page = (tmp_path / "report.html").read_text()
    text = (tmp_path / "results.md").read_text()
    for shown in ("ultrafastbert_1x11", "dead subtrees", "1.50 (1.40 to 1.60)", "c0ffee", "2 layers x 128, tree 1x8"):
        assert shown in page, shown
        assert shown in text, shown
    assert "a &lt;CPU&gt;" in page
    assert text.split("\n\n")[1] == " ".join(results.verdict)
    (chart,) = [part for section in page_of(results).sections for part in section.parts if isinstance(part, Scatter)]
    assert [(dot.name, dot.x, round(dot.y, 3)) for dot in chart.dots] == [
        ("ultrafastbert_1x11", 1.0, 3.21), ("path_dense_1x11", 2.0, 3.112), ("crammed_bert", 3.0, 2.925),
    ]  # fmt: skip


def test_results_without_their_cells_can_be_drawn(tmp_path, capsys):
    make(tmp_path)
    draw_comparison(tmp_path, ASKED)
    alone = tmp_path / "elsewhere" / "published.json"
    alone.parent.mkdir()
    (tmp_path / "results.json").rename(alone)
    cli.call("report", [str(alone)])
    assert str(alone.with_suffix(".html")) in capsys.readouterr().out
    assert alone.with_suffix(".html").read_text() == (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=r"is no comparison, and only comparisons are joined with one"):
        cli.call("report", [str(alone), str(tmp_path), "--out=x.html"])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other.json is not the results.json of a comparison"):
        cli.call("report", [str(tmp_path / "other.json")])


def test_claims_of_papers_stand_beside_what_was_measured(tmp_path):
    make(tmp_path)
    results = comparison_results(tmp_path, ASKED)
    (row,) = claim_rows(results)  # nothing here stands for the BERT of the other papers
    assert row[:2] == ["ultrafastbert_1x11", "Belcak & Wattenhofer 2023, arXiv 2311.10770"]
    scores = mean_scores(results)
    share = 100 * scores["ultrafastbert_1x11"] / scores["crammed_bert"]
    assert row[3] == (
        f"0.285 nats above crammed_bert after 10 M tokens (2 seeds); {share:.1f} % of crammed_bert's mean on 1 GLUE task(s); "
        "3.00 times as fast as crammed_bert in calls of 1 x 128 tokens, int8"
    )
    draw_comparison(tmp_path, ASKED)
    assert f"{share:.1f} % of crammed_bert" in (tmp_path / "results.md").read_text()


def test_a_model_of_another_name_is_known_by_its_preset(tmp_path):
    make(tmp_path)
    results = comparison_results(tmp_path, ASKED)
    tree, control, dense = results.models
    renamed = replace(
        results, models=[replace(tree, name="mine", options=["--config", "original_fff"]), control, dense], speed=None
    )
    assert [row[0] for row in claim_rows(renamed)] == ["mine"]
    assert claim_rows(replace(results, models=[tree, control])) == []


def test_the_verdict_says_how_the_tree_stands_to_its_control(tmp_path):
    make(tmp_path)
    results = comparison_results(tmp_path, ASKED)
    assert sentence(results, "After 10 M tokens").startswith(
        "After 10 M tokens, crammed_bert has the lowest held-out loss, 2.925 nats; path_dense_1x11 comes next, 0.188 higher "
        "(beyond twice the standard error over 2 seeds)."
    )
    assert sentence(results, "ultrafastbert_1x11 uses") == (
        "ultrafastbert_1x11 uses 9 of its 511 neurons a token; against path_dense_1x11, which has those 9 and no others, it is "
        "0.098 nats worse after 10 M tokens (beyond twice the standard error over 2 seeds) and 0.045 nats worse after 20m "
        "(within twice the standard error over 2 seeds): the neurons that it skips are worth nothing."
    )
    assert sentence(results, "On GLUE").startswith(
        "On GLUE (1 task(s), mean of medians) crammed_bert comes first with 82.7"
    )
    assert "2 have an interval that leaves out 0" in sentence(results, "On GLUE")
    assert sentence(results, "This CPU").endswith(
        "ultrafastbert_1x11 in int8, 1 ms, 1.50 times as fast as crammed_bert."
    )
    assert sentence(results, "No other") == (
        "No other model is both faster and better than ultrafastbert_1x11, path_dense_1x11, crammed_bert."
    )


def test_a_better_tree_and_a_faster_dense_layer_turn_the_verdict(tmp_path):
    asked = replace(ASKED, budget="", tasks=[])
    losses = {"ultrafastbert_1x11": [2.80, 2.81], "path_dense_1x11": [3.10, 3.11], "crammed_bert": [2.9, 2.95]}
    write_study_of(tmp_path, asked, "tokens", losses)
    write_times(tmp_path, times_of(["crammed_bert", "path_dense_1x11", "ultrafastbert_1x11"], "crammed_bert"))
    results = comparison_results(tmp_path, asked)
    assert "0.300 nats better" in sentence(results, "ultrafastbert_1x11 uses")
    assert "the neurons that it skips are worth something." in sentence(results, "ultrafastbert_1x11 uses")
    assert sentence(results, "No other") == (
        "No other model is both faster and better than crammed_bert, ultrafastbert_1x11; path_dense_1x11 is beaten in both."
    )
    assert "fastest by crammed_bert in int8, 1 ms." in sentence(results, "This CPU")


def test_one_seed_settles_nothing(tmp_path):
    asked = replace(ASKED, budget="", tasks=[], speed=False, seeds=[0])
    write_study_of(tmp_path, asked, "tokens", {"ultrafastbert_1x11": [2.80], "path_dense_1x11": [3.10]})
    results = comparison_results(tmp_path, asked)
    assert "one seed, whose spread is not known" in sentence(results, "After 10 M tokens")
    assert sentence(results, "ultrafastbert_1x11 uses").endswith("worth anything is not settled.")
    assert results.waiting == ["tokens: crammed_bert-seed0"]
    assert "1 cell(s) are not measured yet" in results.verdict[-1]
    assert not any(text.startswith("No model knows") for text in results.verdict)
    known = comparison_results(tmp_path, replace(asked, models=["ultrafastbert_1x11"], baseline="ultrafastbert_1x11"))
    assert known.unigram_loss == 9.0
    write_study_of(tmp_path, asked, "tokens", {"ultrafastbert_1x11": [8.60]})
    little = comparison_results(tmp_path, replace(asked, models=["ultrafastbert_1x11"], baseline="ultrafastbert_1x11"))
    assert "word" in sentence(
        little, "No model knows much more than the frequency of words, which alone gives 9.000 nats"
    )
    assert (is_settled(Spread(1.0, None, 1)), is_settled(Spread(0.1, 0.07, 2)), is_settled(Spread(0.1, 0.08, 2))) == (
        False, True, False,
    )  # fmt: skip
    assert [round(chance_beyond(n), 4) for n in (2, 3, 5, 100)] == [0.2952, 0.1835, 0.1161, 0.0482]
    assert how_sure(Spread(0.1, 0.08, 2)) == "within twice the standard error over 2 seeds"


def test_failures_other_work_and_other_commits_are_named(tmp_path):
    make(tmp_path)
    busy = replace(SESSION, other_work=0.9, commit="decade", cpu="another")
    finish(tmp_path / "tokens", "crammed_bert", 0, 2.9, busy)
    sweep = tmp_path / "glue" / "path_dense_1x11" / "rte"
    (sweep / "sweep" / "glue.json").unlink()
    write_job(sweep, JobFile(["finetune"], [SESSION, SESSION], failed="no luck."))
    write_times(tmp_path, times_of(ASKED.models, "crammed_bert", **{"fnet-int8": "it is off"}))
    results = draw_comparison(tmp_path, ASKED)
    assert results.failed == {"glue: path_dense_1x11 on rte": "no luck.", "speed: fnet-int8": "it is off"}
    assert "2 cell(s) failed: glue: path_dense_1x11 on rte, speed: fnet-int8." in results.verdict
    text = (tmp_path / "results.md").read_text()
    for shown in (
        "Of differences that mean nothing, 30% lie beyond", "NOT ONE COMMIT: c0ffee, decade.", "NOT ONE PROCESSOR",
        "say little: tokens: crammed_bert-seed0", "BESIDE OTHER WORK", "FAILED glue: path_dense_1x11 on rte: no luck.",
        "fnet-int8: NOT TIMED: it is off",
    ):  # fmt: skip
        assert shown in text, shown
    (record,) = [cell for cell in results.cells if cell.name == "glue: path_dense_1x11 on rte"]
    assert (record.restarts, record.seeds) == (1, [0, 1, 2])


def test_a_report_is_drawn_of_what_is_there(tmp_path, capsys):
    with pytest.raises(UserError, match="There is no comparison in"):
        cli.call("compare", ["--report", f"--out={tmp_path}"])
    write_comparison(tmp_path, ASKED)
    cli.call("compare", ["--report", f"--out={tmp_path}"])
    assert "No model is trained yet." in capsys.readouterr().out
    make(tmp_path)
    cli.call("compare", ["--report", f"--out={tmp_path}", "--baseline=path_dense_1x11"])
    assert "crammed_bert has the lowest held-out loss" in capsys.readouterr().out
    results = read_results(tmp_path)
    trained = results.model("crammed_bert").by_tokens
    assert trained is not None
    assert trained.difference is not None
    assert trained.difference.mean == pytest.approx(-0.1875)
    cli.call("compare", ["--report", f"--out={tmp_path}"])
    drawn = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    cli.call("report", [str(tmp_path)])
    assert (tmp_path / "report.html").read_bytes() == drawn
    with pytest.raises(UserError, match="--baseline 'x' is none of the models"):
        cli.call("compare", ["--report", f"--out={tmp_path}", "--baseline=x"])
    (tmp_path / "results.json").write_text('{"format": "ufbert-glue", "format_version": 1}')
    with pytest.raises(UserError, match=r"is not the results.json of a comparison"):
        read_results(tmp_path)

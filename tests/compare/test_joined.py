"""Comparisons of several machines or days become one, and those of different protocols do not."""

from dataclasses import replace

import pytest
from made import ASKED, finish, make, write_study_of

from ufbert import cli
from ufbert.compare.collect import comparison_results
from ufbert.compare.joined import joined
from ufbert.compare.page import draw_comparison
from ufbert.compare.protocol import write_comparison
from ufbert.compare.results import Comparison, read_results
from ufbert.errors import UserError

BARE = replace(ASKED, tasks=[], speed=False, budget="", seeds=[0, 1])
LOSSES = {"ultrafastbert_1x11": [3.20, 3.22], "path_dense_1x11": [3.10, 3.125], "crammed_bert": [2.9, 2.95]}


def part(folder, models, seeds=(0, 1)) -> Comparison:
    """Measure some of the models, with some of the seeds."""
    asked = replace(BARE, models=list(models), baseline=list(models)[-1], seeds=list(seeds))
    write_study_of(folder, asked, "tokens", {})
    for name in models:
        for seed in seeds:
            finish(folder / "tokens", name, seed, LOSSES[name][seed])
    write_comparison(folder, asked)
    return comparison_results(folder, asked)


@pytest.fixture
def whole(tmp_path):
    return part(tmp_path / "whole", LOSSES)


def same(results: Comparison, whole: Comparison) -> bool:
    """Tell whether all that was measured is the same, in whatever order."""
    ours, theirs = ({model.name: model for model in r.models} for r in (results, whole))
    return ours == theirs and results.notes == whole.notes


def test_models_of_two_machines_become_one_comparison(tmp_path, whole):
    a = part(tmp_path / "a", ["ultrafastbert_1x11", "crammed_bert"])
    b = part(tmp_path / "b", ["path_dense_1x11", "crammed_bert"])
    assert a.model("ultrafastbert_1x11").control == ""
    results = joined({"a": a, "b": b})
    assert same(results, whole)
    assert results.model("ultrafastbert_1x11").control == "path_dense_1x11"
    assert "worth nothing" in " ".join(results.verdict)
    assert len(results.cells) == 6


def test_seeds_of_two_machines_become_one_comparison(tmp_path, whole):
    parts = {str(seed): part(tmp_path / str(seed), LOSSES, [seed]) for seed in (0, 1)}
    results = joined(parts)
    assert list(results.model("crammed_bert").by_tokens.losses.items()) == [(0, 2.9), (1, 2.95)]
    for ours, theirs in zip(results.models, whole.models, strict=True):
        a, b = ours.by_tokens, theirs.by_tokens
        assert (a.losses, a.loss, a.difference, a.to_control) == (b.losses, b.loss, b.difference, b.to_control)
        assert [vars(p) for p in a.curve] == [pytest.approx(vars(p)) for p in b.curve]
        assert ours.hours == pytest.approx(theirs.hours)
    assert results.verdict == whole.verdict


def test_a_cell_waits_only_if_nobody_has_measured_it(tmp_path):
    a, b = part(tmp_path / "a", ["crammed_bert"], [0]), part(tmp_path / "b", ["crammed_bert"], [1])
    a = replace(
        a, waiting=["tokens: crammed_bert-seed1", "tokens: fnet-seed0"], failed={"tokens: switch_8e-seed0": "no"}
    )
    begun = replace(b.cells[0], seconds=1.0)  # of a run that was stopped
    a = replace(a, cells=[*a.cells, begun])
    results = joined({"a": a, "b": b})
    assert {cell.name: cell.seconds for cell in results.cells}[begun.name] == b.cells[0].seconds > 1.0
    assert results.waiting == ["tokens: fnet-seed0"]
    assert results.failed == {"tokens: switch_8e-seed0": "no"}
    assert joined({"b": b, "a": a}).waiting == ["tokens: fnet-seed0"]


def test_what_was_not_measured_alike_is_not_joined(tmp_path):
    a = part(tmp_path / "a", ["crammed_bert"], [0])

    def refused(other: Comparison, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            joined({"a.json": a, "b.json": other})

    asked = a.asked
    refused(
        replace(a, asked=replace(asked, tokens=2e7)),
        r"a.json and b.json cannot be joined: tokens is 1.*2.* in the other",
    )
    refused(replace(a, asked=replace(asked, scale="mini")), "scale is tiny in one and mini in the other")
    refused(replace(a, unigram_loss=7.0), r"word frequency alone gives 9.0 and 7.0 nats, so their texts or tokenizers")
    (model,) = a.models
    refused(replace(a, models=[replace(model, options=["--config=fnet"])]), "options of crammed_bert are")
    other = replace(model.by_tokens, losses={0: 2.8})
    refused(
        replace(a, models=[replace(model, by_tokens=other)]),
        "crammed_bert ends at 2.9 nats with seed 0 in one and at 2.8",
    )
    mixed = replace(model.by_tokens, losses={0: 2.9, 1: 2.8})
    third = replace(a, models=[replace(model, by_tokens=replace(model.by_tokens, losses={0: 2.9, 2: 3.0}))])
    with pytest.raises(UserError, match="seeds of its own in both"):
        joined({"a": replace(a, models=[replace(model, by_tokens=mixed)]), "b": third})


def test_a_command_joins_files_and_folders(tmp_path, capsys):
    make(tmp_path / "all")
    write_comparison(tmp_path / "all", ASKED)
    whole = draw_comparison(tmp_path / "all", ASKED)
    a, b, out = tmp_path / "a.json", tmp_path / "all", tmp_path / "both.html"
    (tmp_path / "all" / "results.json").rename(a)
    cli.call("report", [str(a), str(b), f"--out={out}"])
    said = capsys.readouterr().out
    assert f"results {out.with_suffix('.json')}" in said
    assert same(read_results(out.with_suffix(".json")), whole)
    assert "ultrafastbert_1x11" in out.read_text()
    before = out.with_suffix(".json").read_bytes()
    with pytest.raises(UserError, match=r"both.json exists, and would hold the joined results; take another --out"):
        cli.call("report", [str(a), str(b), f"--out={out}"])
    assert out.with_suffix(".json").read_bytes() == before
    run = tmp_path / "all" / "tokens" / "cells" / "crammed_bert-seed0" / "run"
    with pytest.raises(UserError, match=r"run is no comparison, and only comparisons are joined with one"):
        cli.call("report", [str(a), str(run), f"--out={tmp_path / 'c.html'}"])
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        cli.call("report", [str(a), str(tmp_path / "nowhere"), f"--out={tmp_path / 'c.html'}"])
    with pytest.raises(UserError, match="A page of several needs --out FILE"):
        cli.call("report", [str(a), str(b)])

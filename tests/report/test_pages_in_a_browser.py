"""Every page in a real browser: on a phone and a wide screen, in both preferences, and on paper."""

from pathlib import Path

import pytest
from browser import Browser, browser_program
from conftest import write_sweep
from pages import write_run

from ufbert.glue.report import glue_page
from ufbert.glue.results import read_results
from ufbert.report.overlay import overlay_page
from ufbert.report.page import html
from ufbert.report.run_records import read_records_of
from ufbert.report.run_report import run_page
from ufbert.study.cells import StudyFile, VariantFile
from ufbert.study.report import study_page
from ufbert.study.results import Point, Results, Row, Spread

pytestmark = pytest.mark.skipif(
    browser_program() is None, reason="no chromium and no Chrome in PATH; test_page.py checks the HTML without one"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = browser_program()
    assert program is not None
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def study_results() -> Results:
    names = ["ultrafastbert_1x11", "crammed_bert", "dense_of_12_neurons", "no_feedforward"]
    study = StudyFile(
        corpus="demo", budget="", tokens=1e7, max_tokens=10**9, seeds=[0, 1], rates=[], baseline=names[0],
        variants={name: VariantFile([f"--config={name}"], 8) for name in names},
    )  # fmt: skip
    rows = [
        Row(
            name, [f"--config={name}", "--model.feedforward=dense"], None, {0: 3.0 + i, 1: 3.2 + i}, Spread(3.1 + i, 0.14, 2),
            Spread(0.1 * i, 0.02, 2) if i else None, Spread(0.5, 0.1, 2), 1e7, 600.0, 12_345_678, 1.2e8, 12 * (i + 1), 4095, {},
            {"2.5e+06": 4.0 + i, "5e+06": 3.5 + i, "1e+07": 3.1 + i},
            [Point(t * 1e6, 60.0 * t, 6.0 / t + i, 0.1 * t) for t in (1.0, 2.5, 5.0, 10.0)], ["abc"], ["one"], [], [0.5],
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    return Results(study, rows, ["fnet"], {"fnet-seed0": "no luck"}, ["± is the standard deviation over seeds (n - 1)"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Each kind of page, as full as it gets."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        read_records_of(write_run(folder / f"a_rather_long_name_of_a_run_{i}", spent_seconds=60.0 * i))
        for i in (1, 2, 3)
    ]
    sweep = write_sweep(folder / "sweep", tasks=("rte", "stsb", "MNLI-devsplit", "mnli"), seeds=(0, 1, 2, 3, 4))
    pages = {
        "run": run_page(runs[0]), "runs": overlay_page(runs), "sweep": glue_page(read_results(sweep), sweep),
        "study": study_page(study_results()),
    }  # fmt: skip
    return {name: html(page) for name, page in pages.items()}


LOOK = (Path(__file__).parent / "look.js").read_text()
KINDS = ("run", "runs", "sweep", "study")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_can_be_read_without_scrolling_sideways(browser, pages, kind, width, dark):
    browser.show(pages[kind], width, dark)
    seen = browser.ask(LOOK)
    assert seen["wide"] <= width
    assert seen["texts"] > 10
    assert seen["smallest"] >= 11
    assert seen["pale"] == []  # texts of less contrast than 4.5, and lines of less than 3
    assert seen["dark"] == dark


@pytest.mark.parametrize("kind", KINDS)
def test_a_printed_page_has_every_column_and_what_was_folded(browser, pages, kind):
    browser.show(pages[kind], 688, media="print", dark=True)  # A4 less its margins
    seen = browser.ask(LOOK)
    assert seen["wide"] <= 688
    assert seen["cut"] == []
    assert seen["pale"] == []
    assert not seen["dark"]
    assert seen["folded"] == 0
    assert not seen["configuration"]
    assert browser.pdf().startswith(b"%PDF")

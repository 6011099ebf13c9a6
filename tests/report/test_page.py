"""One template draws every page: what is on it, where the parts of charts stand, and that texts stay texts."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import check_page, facts_of

from ufbert.report.charts import Point, drawing_of, frontier, place_labels
from ufbert.report.page import (
    Bullets,
    Dot,
    Intervals,
    Line,
    LineChart,
    Page,
    Scatter,
    Section,
    Table,
    Track,
    html,
    markdown,
)
from ufbert.report.scale import linear_scale, log_scale, short

HOSTILE = "</title><script>alert('1')</script> \" & {{ 7 * 7 }} <!-- |"
LINES = LineChart(
    f"Loss {HOSTILE}", f"M tokens {HOSTILE}", f"nats {HOSTILE}",
    [Line(f"trees {HOSTILE}", [(1, 5.0), (2, math.nan), (3, 4.0)], dots=True), Line("dense", [(1, 6.0), (3, 3.5)], faint=True)],
    levels={f"frequency {HOSTILE}": 6.5},
)  # fmt: skip
SCATTER = Scatter(
    "Quality", "ms", "nats", [Dot(f"a {HOSTILE}", 1, 3, y_interval=(2.9, 3.2)), Dot("b", 2, 2), Dot("c", 3, 4, strong=True)],
    frontier="lower",
)  # fmt: skip
TRACKS = Intervals(
    "Scores", "score", [Track(f"RTE {HOSTILE}", 60.0, 55.0, 65.0, [55, 60, 65], 50.0)], baseline="majority"
)
PAGE = Page(
    f"A page {HOSTILE}",
    f"It is so {HOSTILE}.",
    [
        Section(
            f"Part {HOSTILE}",
            [
                f"Words {HOSTILE}",
                Bullets([f"one {HOSTILE}"]),
                Table(["a", HOSTILE], [[HOSTILE, "2"], ["3", "4"]], numbers=[1], caption=HOSTILE, shades={(0, 1): 0.4}),
                LINES,
                SCATTER,
                TRACKS,
            ],
        ),
        Section("Folded", [Table(["a"], [["b"]], strong_rows=[0])], folded=True),
    ],
    samples=[Table(["text", "answer"], [["Paris", "city"]])],
    facts={
        "command": f"ufbert train {HOSTILE}",
        "commit": "abc",
        "processor": "one",
        "load before": 0.25,
        "tokens": 12345,
    },
    configuration=f'{{"a": "{HOSTILE}"}}',
)


def test_a_page_reads_from_verdict_to_configuration_and_texts_stay_texts():
    text = html(PAGE)
    root = check_page(text)
    assert "<script" not in text
    assert "alert(" in text
    assert "{{ 7 * 7 }}" in root.all("h1")[0].text  # a text is no template
    assert [h.text for h in root.all("h2")] == [
        f"Part {HOSTILE}", "Folded", "Sample answers", "How it came about", "Configuration"
    ]  # fmt: skip
    assert facts_of(root) == {
        "command": f"ufbert train {HOSTILE}", "commit": "abc", "processor": "one", "load before": "0.25", "tokens": "12,345",
    }  # fmt: skip
    (configuration,) = [e for e in root.all("details") if e.attributes["class"] == "configuration"]
    assert "open" not in configuration.attributes
    assert configuration.all("pre")[0].text == PAGE.configuration
    assert len([svg for svg in root.all("svg") if svg.attributes.get("role") == "img"]) == 3


def test_a_page_of_nothing_but_a_verdict_is_a_page():
    assert check_page(html(Page("Empty", "Nothing is there yet."))).all("h2") == []


def test_the_same_page_is_written_in_markdown_with_the_texts_of_its_charts():
    text = markdown(PAGE)
    assert "| 3 | 4 |" in text
    assert "| **b** |" in text
    assert "- load before: 0.25\n" in text
    for chart in (LINES, SCATTER, TRACKS):
        assert drawing_of(chart).text in text


def test_a_chart_says_in_words_what_it_shows():
    assert "goes from 5 at 1 to 4 at 3" in drawing_of(LINES).text
    assert "is 6.5" in drawing_of(LINES).text
    assert "b: 2 and 2, on the frontier" in drawing_of(SCATTER).text
    assert "c: 3 and 4." in drawing_of(SCATTER).text
    assert "60 (55 to 65), majority 50" in drawing_of(TRACKS).text
    assert drawing_of(LineChart("t", "x", "y", [Line("a", [])], text="own words")).text == "own words"


@pytest.mark.parametrize("log", [False, True])
@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9)), max_size=5))
def test_every_point_of_every_chart_stands_on_the_plot(log: bool, points: list[Point]):
    drawings = [
        drawing_of(LineChart("t", "x", "y", [Line("a", points, dots=True)], log_y=log)),
        drawing_of(Scatter("t", "x", "y", [Dot("a", x, y) for x, y in points], "lower", log_y=log)),
        drawing_of(Intervals("t", "x", [Track("a", x, x - y, x + y) for x, y in points])),
    ]
    for drawing in drawings:
        places = [
            v for stroke in drawing.strokes for pair in stroke.points.split() for v in map(float, pair.split(","))
        ]
        assert all(-0.1 <= v <= 1000.1 for v in places)
        assert all(-0.01 <= v <= 100.01 for spot in drawing.spots for v in (spot.x, spot.y))
        assert all(-0.11 <= at <= 100.11 for at, _ in (*drawing.x_ticks, *drawing.y_ticks))


def test_what_lies_above_the_top_is_cut_off():
    drawing = drawing_of(LineChart("t", "x", "y", [Line("a", [(0, 50.0), (1, 3.0), (2, 1.0)], dots=True)], top=4.0))
    assert drawing.cut
    assert [spot.y for spot in drawing.spots] == [0.0, 100.0]
    assert not drawing_of(LineChart("t", "x", "y", [Line("a", [(0, 3.0), (1, 1.0)])], top=4.0)).cut


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (0, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (2.9, 6.7, ["3", "4", "5", "6"]),
        (0, 240_000, ["0", "50,000", "100,000", "150,000", "200,000"]),
        (3.0, 3.0, ["2.9", "3", "3.1"]),
    ],
)
def test_axes_have_few_round_numbers(low, high, words):
    assert [tick.words for tick in linear_scale([low, high]).ticks] == words


def test_logarithmic_axes_have_round_numbers_too():
    assert [t.words for t in log_scale([1, 1000]).ticks] == ["1", "10", "100", "1,000"]
    assert [t.words for t in log_scale([1.5, 25]).ticks] == ["2", "5", "10", "20"]
    assert len(log_scale([1e-9, 1e9]).ticks) <= 7
    assert len(log_scale([3.0, 3.1]).ticks) >= 2


def test_numbers_are_written_short():
    assert [short(v) for v in (0, 3.14159, 0.00025, 12345.6, 2e-7, 4e9, -0.5)] == [
        "0", "3.142", "0.00025", "12,346", "2e-07", "4e+09", "-0.5",
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_frontier_is_what_no_other_point_beats(points: list[tuple[int, int]]):
    kept = [points[i] for i in frontier([(float(x), float(y)) for x, y in points], "lower")]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert set(kept) == set(points) - beaten
    assert len(kept) == len(set(kept))


def test_names_of_points_do_not_cover_each_other_on_a_phone():
    texts = place_labels([(40.0, 50.0 + i, f"model {i}") for i in range(8)], 320)
    places = sorted((t.anchor, 3.2 * t.y + t.dy) for t in texts)
    gaps = [b[1] - a[1] for a, b in pairwise(places) if a[0] == b[0]]
    assert min(gaps) >= 11

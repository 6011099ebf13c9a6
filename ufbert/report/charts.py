"""Charts as values, and where their parts stand.

A chart has a fixed height and is as wide as the page. Places across are shares of its width, in percent, and texts have a fixed
size: so a chart can be read on a phone, on a wide screen and on paper. The template draws what `drawing_of` returns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ufbert.report.scale import Real, Scale, linear_scale, log_scale, short

Point = tuple[Real, Real]
COLOURS = 8
"""Of lines and dots; the next ones have the same colours and are dashed."""
MOST_POINTS = 600
"""Points of a line that are drawn: no screen shows more of them apart."""


@dataclass(frozen=True)
class Line:
    """A line through points (x, y). Points that are not finite are left out."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    """Each point is marked, and named where a pointer rests on it."""
    faint: bool = False
    """Drawn thin and pale, as measurements under their mean."""
    colour: int | None = None
    """Number of its colour; None for the next."""


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis."""

    title: str
    x: str
    """Name of the axis across, with its unit, and of the axis up."""
    y: str
    lines: Sequence[Line]
    levels: Mapping[str, Real] = field(default_factory=dict)
    """Levels of y to compare with, dashed, by name."""
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    """The axis up begins at 0."""
    top: Real | None = None
    """The axis up ends there at the latest, and what lies above it is cut off."""
    text: str = ""
    """The text alternative; "" has one written from the values."""


@dataclass(frozen=True)
class Dot:
    """A point with a name, and the intervals that it is known to."""

    name: str
    x: Real
    y: Real
    x_interval: Point | None = None
    y_interval: Point | None = None
    strong: bool = False
    """It is what the reader looks for, and is drawn larger."""


@dataclass(frozen=True)
class Scatter:
    """Named points, such as quality against latency."""

    title: str
    x: str
    y: str
    dots: Sequence[Dot]
    frontier: Literal["", "lower", "higher"] = ""
    """Draw the line through the points that no other beats, where less x is better and "lower" or "higher" y is."""
    log_x: bool = False
    log_y: bool = False
    text: str = ""


@dataclass(frozen=True)
class Track:
    """A value on a track of its own, with an interval, single measurements and a value to compare with."""

    name: str
    value: Real
    low: Real | None = None
    high: Real | None = None
    singles: Sequence[Real] = ()
    baseline: Real | None = None


@dataclass(frozen=True)
class Intervals:
    """Values with their intervals, one below the other."""

    title: str
    x: str
    tracks: Sequence[Track]
    baseline: str = ""
    """Name of the values to compare with."""
    from_zero: bool = True
    text: str = ""


class Text(NamedTuple):
    """A text at (x, y) percent, moved by (dx, dy) pixels."""

    x: Real
    y: Real
    words: str
    dx: Real = 0.0
    dy: Real = 0.0
    anchor: Literal["start", "middle", "end"] = "start"
    leader: bool = False
    """A thin line joins it to its point."""


class Stroke(NamedTuple):
    """A line through "x,y x,y ..." in thousandths of the plot."""

    points: str
    colour: int
    kind: str
    """Classes of the stylesheet."""


class Spot(NamedTuple):
    """A dot at (x, y) percent, and what is said of it."""

    x: Real
    y: Real
    colour: int
    kind: str
    words: str
    radius: int = 3


class Drawing(NamedTuple):
    """Where the parts of a chart stand."""

    text: str
    height: int
    """Of the plot in pixels."""
    left: int
    """Pixels that the numbers of the axis up need."""
    x_ticks: list[tuple[Real, str]]
    """Percent and number."""
    y_ticks: list[tuple[Real, str]]
    strokes: list[Stroke]
    spots: list[Spot]
    texts: list[Text]
    legend: list[tuple[str, int, str]]
    """Name, colour and classes."""
    cut: bool = False
    """Strokes end at the edges of the plot."""


def drawing_of(chart: LineChart | Scatter | Intervals) -> Drawing:
    """Return where the parts of a chart stand."""
    if isinstance(chart, LineChart):
        return _lines(chart)
    return _scatter(chart) if isinstance(chart, Scatter) else _intervals(chart)


def _finite(points: Sequence[Point], log_x: bool = False, log_y: bool = False) -> list[Point]:
    """Return the points that can be drawn."""
    return [
        (x, y)
        for x, y in points
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]


def _scale(values: Sequence[Real], log: bool, from_zero: bool = False) -> Scale:
    return log_scale(values) if log else linear_scale([*values, 0.0] if from_zero else values)


def _path(points: Sequence[Point], across: Scale, up: Scale) -> str:
    return " ".join(f"{10 * across.at(x):.1f},{1000 - 10 * up.at(y):.1f}" for x, y in points)


def _left(up: Scale) -> int:
    return 10 + 7 * max((len(words) for _, words in up.ticks), default=1)


def _kind(colour: int, *classes: str) -> str:
    return " ".join(filter(None, (*classes, "dashed" if colour >= COLOURS else "")))


def _lines(chart: LineChart) -> Drawing:
    drawn = [(line, _finite(line.points, chart.log_x, chart.log_y)) for line in chart.lines]
    xs = [x for _, points in drawn for x, _ in points]
    levels = {name: y for name, y in chart.levels.items() if math.isfinite(y) and (y > 0 or not chart.log_y)}
    ys = [y for _, points in drawn for _, y in points] + list(levels.values())
    below = [y for y in ys if chart.top is None or y <= chart.top]
    cut = 0 < len(below) < len(ys)
    across, up = _scale(xs, chart.log_x), _scale(below or ys, chart.log_y, chart.from_zero)
    strokes, spots, legend, said = [], [], [], []
    for i, (line, points) in enumerate(drawn):
        colour = i if line.colour is None else line.colour
        kind = _kind(colour, "faint" if line.faint else "")
        step = math.ceil(len(points) / MOST_POINTS) or 1
        thinned = points[::step] if step == 1 or (len(points) - 1) % step == 0 else [*points[::step], points[-1]]
        strokes.append(Stroke(_path(thinned, across, up), colour % COLOURS, kind))
        if line.dots:
            spots += [
                Spot(across.at(x), 100 - up.at(y), colour % COLOURS, kind, f"{line.name}: {short(y)} at {short(x)}")
                for x, y in thinned
                if y <= up.high
            ]
        legend.append((line.name, colour % COLOURS, kind))
        said.append(f"{line.name} {_course(points)}")
    for name, y in levels.items():
        strokes.append(Stroke(_path([(across.low, y), (across.high, y)], across, up), -1, "level"))
        legend.append((name, -1, "level"))
        said.append(f"{name} is {short(y)}")
    text = chart.text or f"{chart.y} against {chart.x}: {'; '.join(said)}."
    legend = legend if len(legend) > 1 else []
    return Drawing(text, 240, _left(up), across.percents, up.percents, strokes, spots, [], legend, cut)


def _course(points: Sequence[Point]) -> str:
    """Say how a line runs."""
    if not points:
        return "has no points yet"
    (x0, y0), (x1, y1) = points[0], points[-1]
    if len(points) == 1:
        return f"is {short(y0)} at {short(x0)}"
    low, high = min(y for _, y in points), max(y for _, y in points)
    return f"goes from {short(y0)} at {short(x0)} to {short(y1)} at {short(x1)}, lowest {short(low)}, highest {short(high)}"


def _scatter(chart: Scatter) -> Drawing:
    dots = [dot for dot in chart.dots if _finite([(dot.x, dot.y)], chart.log_x, chart.log_y)]
    xs = [x for dot in dots for x in (dot.x, *(dot.x_interval or ()))]
    ys = [y for dot in dots for y in (dot.y, *(dot.y_interval or ()))]
    xs, ys = ([v for v in xs if v > 0] if chart.log_x else xs), ([v for v in ys if v > 0] if chart.log_y else ys)
    across, up = _scale(xs, chart.log_x).wider(0.06), _scale(ys, chart.log_y).wider(0.06)
    best = frontier([(dot.x, dot.y) for dot in dots], chart.frontier) if chart.frontier else []
    strokes = [Stroke(_path([(dots[i].x, dots[i].y) for i in best], across, up), -1, "frontier")] if best else []
    spots, said = [], []
    for i, dot in enumerate(dots):
        for low, high, ends in (
            (*(dot.x_interval or (dot.x, dot.x)), lambda v, y=dot.y: (v, y)),
            (*(dot.y_interval or (dot.y, dot.y)), lambda v, x=dot.x: (x, v)),
        ):
            if high > low:
                strokes.append(Stroke(_path([ends(low), ends(high)], across, up), i % COLOURS, "interval"))
        words = f"{dot.name}: {short(dot.x)} and {short(dot.y)}{_known_to(dot)}"
        spots.append(Spot(across.at(dot.x), 100 - up.at(dot.y), i % COLOURS, "", words, 6 if dot.strong else 4))
        said.append(words + (", on the frontier" if i in best else ""))
    text = chart.text or f"{chart.x} and {chart.y} of {len(dots)} points. {'; '.join(said)}."
    legend = [("frontier: nothing else is better in both", -1, "frontier")] if best else []
    height = 320
    texts = place_labels([(spot.x, spot.y, dot.name) for spot, dot in zip(spots, dots, strict=True)], height)
    return Drawing(text, height, _left(up), across.percents, up.percents, strokes, spots, texts, legend)


def _known_to(dot: Dot) -> str:
    parts = [
        f"{name} {short(i[0])} to {short(i[1])}" for name, i in (("x", dot.x_interval), ("y", dot.y_interval)) if i
    ]
    return f" ({', '.join(parts)})" if parts else ""


def frontier(points: Sequence[Point], better: Literal["lower", "higher"]) -> list[int]:
    """Return the indices of the points that none beats in both coordinates, by ascending x. Less x is better."""
    sign = 1.0 if better == "lower" else -1.0
    best, order = [], sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    for i in order:
        if not best or sign * points[i][1] < sign * points[best[-1]][1]:
            best.append(i)
    return best


NARROW = 290.0
"""Pixels that a plot has at least: on a phone."""


def place_labels(points: Sequence[tuple[Real, Real, str]], height: Real) -> list[Text]:
    """Place names at points (x, y in percent), so that on a phone none covers another where that can be helped."""
    taken = [
        (NARROW * x / 100 - 5, height * y / 100 - 5, NARROW * x / 100 + 5, height * y / 100 + 5) for x, y, _ in points
    ]
    texts = []
    for x, y, words in points:
        wide, px, py = 6.7 * len(words), NARROW * x / 100, height * y / 100
        places: list[tuple[Real, Real, Literal["start", "middle", "end"]]] = [
            place for shift in (4.0, -10.0, 18.0, -24.0, 32.0, -38.0, 46.0, -52.0)
            for place in ((9.0, shift, "start"), (-9.0, shift, "end"))
        ]  # fmt: skip
        tries = []
        for dx, dy, anchor in places:
            left = px + dx - (wide if anchor == "end" else 0.0)
            box = (left, py + dy - 11, left + wide, py + dy + 3)
            outside = max(0.0, -2.0 - left) + max(0.0, left + wide - NARROW - 8) + max(0.0, 4 - box[1])
            covered = sum(_overlap(box, other) for other in taken)
            tries.append((outside * 20 + covered, len(tries), Text(x, y, words, dx, dy, anchor, abs(dy - 4) > 20), box))
        _, _, text, box = min(tries)
        taken.append(box)
        texts.append(text)
    return texts


def _overlap(a: tuple[Real, Real, Real, Real], b: tuple[Real, Real, Real, Real]) -> Real:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


ROW = 44
"""Pixels of a track: its name, and the track below it."""


def _intervals(chart: Intervals) -> Drawing:
    values = [
        v
        for track in chart.tracks
        for v in (track.value, track.low, track.high, track.baseline, *track.singles)
        if v is not None
    ]
    across = _scale(values, log=False, from_zero=chart.from_zero)
    height = ROW * max(1, len(chart.tracks))
    strokes, spots, texts, said = [], [], [], []
    for i, track in enumerate(chart.tracks):
        y = 100 * (ROW * i + 30) / height
        level = f"{10 * y:.1f}"
        strokes.append(Stroke(f"0,{level} 1000,{level}", -1, "track"))
        if track.baseline is not None:
            tick = 10 * across.at(track.baseline)
            strokes.append(
                Stroke(
                    f"{tick:.1f},{10 * y - 10000 / height:.1f} {tick:.1f},{10 * y + 10000 / height:.1f}", -1, "baseline"
                )
            )
        low, high = (track.value if end is None else end for end in (track.low, track.high))
        strokes.append(Stroke(f"{10 * across.at(low):.1f},{level} {10 * across.at(high):.1f},{level}", 0, "interval"))
        spots += [Spot(across.at(v), y, 0, "faint", short(v)) for v in track.singles]
        spots.append(Spot(across.at(track.value), y, 0, "", f"{track.name}: {short(track.value)}", 5))
        known = f" ({short(low)} to {short(high)})" if high > low else ""
        base = "" if track.baseline is None else f", {chart.baseline or 'baseline'} {short(track.baseline)}"
        said.append(f"{track.name}: {short(track.value)}{known}{base}")
        texts.append(Text(0, y, track.name, dy=-14))
        texts.append(Text(100, y, f"{short(track.value)}{known}", dy=-14, anchor="end"))
    text = chart.text or f"{chart.x}. {'; '.join(said)}."
    legend = [(chart.baseline, -1, "baseline")] if any(t.baseline is not None for t in chart.tracks) else []
    return Drawing(text, height, 4, across.percents, [], strokes, spots, texts, legend)

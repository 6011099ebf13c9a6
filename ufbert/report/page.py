"""The pages of ufbert: plain values say what is on a page, and one template and one stylesheet draw it.

    page = Page(
        title="Three models of 10 M tokens",
        verdict="Trees of 9 neurons are 2.1 times as fast as the dense layer and lose 0.14 nats.",
        sections=[
            Section("Loss", [
                "Means over two seeds.",
                Table(["model", "loss, nats"], [["trees", "3.21"], ["dense", "3.07"]], numbers=[1], strong_rows=[1]),
                LineChart("Held-out loss", "M tokens", "nats", [Line("trees", [(1, 5.1), (10, 3.2)])]),
                Scatter("Quality against latency", "ms", "nats", [Dot("trees", 2.0, 3.21)], frontier="lower"),
            ]),
            Section("Every evaluation", [Table(...)], folded=True),
        ],
        facts={"command": "ufbert compare ...", "commit": "abc", "processor": "...", "load": "0.1"},
        configuration=json_text,
    )
    write_text(folder / "report.html", html(page))
    write_text(folder / "report.md", markdown(page))

A page reads from top to bottom: title, verdict, sections, sample answers, facts, configuration. All texts are text: the
template escapes them. Charts are values of `charts.py`, and carry a text alternative. `markdown` writes the same page, with
these texts in place of the pictures.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ufbert.report.charts import Dot, Intervals, Line, LineChart, Scatter, Track, drawing_of

__all__ = ["Bullets", "Dot", "Intervals", "Line", "LineChart", "Page", "Scatter", "Section", "Table", "Track"]


@dataclass(frozen=True)
class Table:
    """A table of texts. On a phone it scrolls inside a box of its own, and its first column stays."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] = ()
    """Columns that are set flush right."""
    caption: str = ""
    strong_rows: Collection[int] = ()
    """Rows to emphasise, counted from 0."""
    strong_columns: Collection[int] = ()
    shades: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """Share, from 0 to 1, by which a cell (row, column) is coloured."""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    texts: Sequence[str]


Chart = LineChart | Scatter | Intervals
Part = str | Bullets | Table | Chart
"""A paragraph, a list, a table or a picture."""


@dataclass(frozen=True)
class Section:
    """A heading and the parts below it."""

    heading: str
    parts: Sequence[Part]
    folded: bool = False
    """Only the heading is shown until a reader opens it; print shows all of it."""


@dataclass(frozen=True)
class Page:
    """A page. Parts that are empty are left out."""

    title: str
    verdict: str
    """The first paragraph: in plain words, how it ended."""
    sections: Sequence[Section] = ()
    samples: Sequence[Part] = ()
    """Sample answers: a table of texts and what the model makes of them, say."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it came about, by name: at least command, commit, processor and load."""
    configuration: str = ""
    """Text, such as JSON, that is shown folded and not printed."""

    @property
    def all_sections(self) -> list[Section]:
        """The sections, sample answers among them."""
        return [*self.sections, *([Section("Sample answers", self.samples)] if self.samples else [])]


def html(page: Page) -> str:
    """Write a page as self-contained HTML, for phones and wide screens, light and dark preference, and print."""
    return _template().render(page=page)


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "template"), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, auto_reload=False,
    )  # fmt: skip
    environment.filters |= {"drawing": drawing_of, "shown": number, "kind": lambda part: type(part).__name__}
    return environment.get_template("page.html.jinja")


def markdown(page: Page) -> str:
    """Write a page as Markdown, with the text alternatives of its charts."""
    blocks = [f"# {page.title}", page.verdict]
    for section in page.all_sections:
        blocks += [f"## {section.heading}", *map(_markdown_part, section.parts)]
    if page.facts:
        facts = [f"- {name}: {number(value)}" for name, value in page.facts.items()]
        blocks += ["## How it came about", "\n".join(facts)]
    if page.configuration:
        blocks += ["## Configuration", f"```\n{page.configuration.replace('```', "'''")}\n```"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_part(part: Part) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Bullets):
        return "\n".join(f"- {text}" for text in part.texts)
    if isinstance(part, Table):
        strong = [
            [f"**{x}**" if x and (i in part.strong_rows or j in part.strong_columns) else x for j, x in enumerate(row)]
            for i, row in enumerate(part.rows)
        ]
        return "\n\n".join(filter(None, (part.caption, markdown_grid(part.head, strong, part.numbers))))
    return f"*{part.title}.* {drawing_of(part).text}"


def number(value: Any) -> str:
    """Write a value for people: commas between thousands, up to four decimals of a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value:,}"


def markdown_grid(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Write a table in Markdown, without a final newline. The columns `numbers` are set flush right."""
    rule = ["--:" if i in numbers else "---" for i in range(len(head))]
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))

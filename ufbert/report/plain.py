"""The frame, tables and pictures of all report pages."""

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem } figure { margin: 1rem 0 } .note { color: #555 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
th { text-align: left; font-weight: 600 } td { font-variant-numeric: tabular-nums }
td.number, th.number { text-align: right } td.number { white-space: nowrap }
svg { width: 100%; height: auto } pre { overflow-x: auto }
.wide { overflow-x: auto } .row { display: flex; flex-wrap: wrap; gap: 0 2.5rem }
"""


def page(title: str, body: str) -> str:
    """Write a self-contained HTML page. `body` is HTML, `title` is text."""
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def facts(values: dict[str, Any]) -> str:
    """Write an HTML table of names and values."""
    return grid([], ([name.replace("_", " "), number(value)] for name, value in values.items()))


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Write an HTML table of texts. The columns `numbers` are set flush right; an empty `head` is left out."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (f'{tag} class="number"' if i in numbers else tag for i in range(len(cells)))
        return f"<tr>{''.join(f'<{kind}>{html.escape(x)}</{tag}>' for kind, x in zip(kinds, cells, strict=True))}</tr>"

    top = line(head, "th") if head else ""
    return f'<div class="wide"><table>{top}{"".join(line(row, "td") for row in rows)}</table></div>'


def number(value: Any) -> str:
    """Write a value for people: commas between thousands, four decimals of a float."""
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def svg(figure: Any) -> str:
    """Write a matplotlib figure as an inline picture, with a light grid and open axes."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return "<figure>" + buffer.getvalue()[buffer.getvalue().index("<svg") :] + "</figure>"


def markdown_grid(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Write the table of `grid` in Markdown, without a final newline."""
    rule = ["--:" if i in numbers else "---" for i in range(len(head))]
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))

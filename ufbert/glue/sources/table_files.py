"""Tables in text files, plain or gzipped: TSV without quoting, CSV with quotes, JSON lines."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ufbert.data.text_files import first_line_fault
from ufbert.errors import UserError
from ufbert.glue.sources.records import Record, is_unicode

SUFFIXES = (".tsv", ".csv", ".jsonl")
"""Each may be followed by `.gz`."""


class Table(NamedTuple):
    """A file that is read while its records are iterated."""

    columns: tuple[str, ...] | None
    """None for JSON lines, each of which has its own."""
    records: Iterator[Record]
    """In the file's order, without blank lines. Iterating raises UserError if the file cannot be read on."""


def read_table(path: Path) -> Table:
    """Open the table in a file of one of SUFFIXES; TSV and CSV begin with a header.

    Raises UserError for another suffix, or a file that is missing, empty or damaged.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".tsv":
        return read_tsv(path)
    if suffix == ".jsonl":
        return Table(None, _json_records(path))
    if suffix != ".csv":
        raise UserError(f"{path} is no table that can be read; its name must end in {', '.join(SUFFIXES)} or with .gz.")
    rows = _csv_rows(path)
    columns = _header(path, next(rows, None))
    return Table(columns, _records(rows, columns))


def read_tsv(path: Path, columns: tuple[str, ...] = ()) -> Table:
    """Open a tab separated file, in which a quote is a plain character. `columns` names those of a file without a header.

    Raises UserError for a file that is missing, empty or damaged.
    """
    rows = _tsv_rows(path)
    columns = columns or _header(path, next(rows, None))
    return Table(columns, _records(rows, columns))


class _Row(NamedTuple):
    line: int
    fields: list[str]
    fault: str


def _header(path: Path, row: _Row | None) -> tuple[str, ...]:
    if row is None:
        raise UserError(f"{path} is empty.")
    if row.fault:
        raise UserError(f"{path}, line {row.line}: {row.fault}.")
    return tuple(field.strip() for field in row.fields)


def _records(rows: Iterable[_Row], columns: tuple[str, ...]) -> Iterator[Record]:
    for line, fields, fault in rows:
        if not fault and len(fields) != len(columns):
            fault = f"unequal columns, {len(fields)} instead of {len(columns)}"
        yield Record(line, {} if fault else dict(zip(columns, fields, strict=True)), fault)


def _tsv_rows(path: Path) -> Iterator[_Row]:
    for line, text in enumerate(_lines(path), 1):
        text = text.rstrip("\r\n")
        if text:
            yield _Row(line, text.split("\t"), _encoding_fault(text))


def _csv_rows(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # the library's own bound is 131,072 characters, and a text may be longer
    reader = csv.reader(_lines(path), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Row(line, [], f"broken CSV ({error})")
            continue
        if fields:
            yield _Row(line, fields, _encoding_fault("".join(fields)))


def _json_records(path: Path) -> Iterator[Record]:
    for line, text in enumerate(_lines(path), 1):
        if not text.strip():
            continue
        values, fault = {}, _encoding_fault(text)
        try:
            values = {} if fault else json.loads(text.strip(), object_pairs_hook=object_of_pairs)
        except json.JSONDecodeError as error:
            fault = f"broken JSON ({error.msg} at column {error.colno}), where each line must hold one whole object"
        except (ValueError, RecursionError) as error:  # a key twice, a number of 5,000 digits, 1,000 brackets
            fault = f"broken JSON ({error})"
        if not isinstance(values, dict):
            values, fault = {}, "not a JSON object, of which each line must hold one"
        yield Record(line, values, fault)


def object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError for a key that occurs twice, of which Python would keep the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return values


def _encoding_fault(text: str) -> str:
    return "" if is_unicode(text) else "not UTF-8"


def _lines(path: Path) -> Iterator[str]:
    """Read the lines of a file with their ends, cut at newlines only, without a byte order mark.

    A byte that is not UTF-8 becomes a lone surrogate, so that its row can be named. Raises UserError.
    """
    number = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8", "surrogateescape")
                if number == 1:
                    if fault := first_line_fault(line):
                        raise UserError(f"{path} {fault}.")
                    text = text.removeprefix("\ufeff")
                yield text
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short after line {number}: {error}.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL in the path
        raise UserError(f"Cannot read {str(path)!r}: {error}.") from error

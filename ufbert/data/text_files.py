"""Read plain and gzipped text files as documents, in bounded memory whatever the length of a line or a document."""

import codecs
import gzip
import io
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from ufbert.errors import UserError
from ufbert.runtime.console import clock

MAX_CHARS = 1_000_000
"""Longest document, in characters. A longer one becomes several, cut at a line end or a blank."""


class Meter:
    """Counts the bytes read in a pass over files."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        """Bytes of all files on disk (compressed, if they are); 0 if that is not known."""
        self._before, self._file = 0, None

    def restart(self, total: int | None = None) -> None:
        """Begin a new pass, over `total` bytes if that has just become known."""
        self.total = self.total if total is None else total
        self._before, self._file = 0, None

    def enter(self, file: io.FileIO) -> None:
        """Count what is read of `file` from now on."""
        self._file = file

    def leave(self, size: int) -> None:
        """Count the file, of `size` bytes, as read."""
        self._before, self._file = self._before + size, None

    @property
    def read(self) -> int:
        """Bytes read in this pass."""
        return self._before + (self._file.tell() if self._file is not None and not self._file.closed else 0)


def text_documents(paths: Iterable[Path], meter: Meter) -> Iterator[str]:
    """Read documents from text files: one paragraph a line, a blank line between documents. Newlines join the paragraphs.

    Raises UserError for a file that is missing, damaged, not UTF-8, or changes while it is read.
    """
    meter.restart()
    for path in paths:
        paragraphs: list[str] = []
        size = 0
        for line in _lines(path, meter):
            paragraph = line.strip()
            if paragraphs and (not paragraph or size + len(paragraph) > MAX_CHARS):
                yield "\n".join(paragraphs)
                paragraphs, size = [], 0
            if paragraph:
                paragraphs.append(paragraph)
                size += len(paragraph) + 1
        if paragraphs:
            yield "\n".join(paragraphs)


def read_lines(path: Path, *, keep_bad: bool = False) -> list[str]:
    """Read the lines of a UTF-8 file, cut at newlines only, without line ends and byte order mark.

    With `keep_bad`, a byte that is not UTF-8 becomes a lone surrogate. Raises UserError if the file cannot be read or does not
    look like lines, and without `keep_bad` if it is not UTF-8.
    """
    try:
        data = path.read_bytes()
        if fault := first_line_fault(data[: data.find(b"\n") + 1] or data):
            raise UserError(f"{path} {fault}.")
        lines = data.decode("utf-8-sig", "surrogateescape" if keep_bad else "strict").split("\n")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {data.count(b'\n', 0, error.start) + 1}: not UTF-8; convert the file to UTF-8."
        ) from error
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def split_long(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most MAX_CHARS characters, at blanks if there are any."""
    while len(text) > MAX_CHARS:
        piece, rest = _cut(text[:MAX_CHARS])
        text = rest + text[MAX_CHARS:]
        yield piece.strip()
    if text.strip():
        yield text.strip()


_PACKED = {
    b"\x1f\x8b": "gzip; its name must end in .gz",
    b"PK\x03\x04": "a zip archive or a workbook; unpack it, or save its table as text",
    b"BZh": "bzip2; unpack it, or compress it with gzip",
    b"\xfd7zXZ\0": "xz; unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "zstandard; unpack it, or compress it with gzip",
    b"PAR1": "parquet; name its folder as hf:FOLDER",
}
"""Formats by the first bytes of a file, and what to do about them."""


def first_line_fault(line: bytes) -> str:
    """Return why a file with this first line is not UTF-8 with lines that end in newlines, or an empty string."""
    for start, kind in _PACKED.items():
        if line.startswith(start):
            return f"is not text but {kind}"
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        return "is not UTF-8: it begins as UTF-16 does, or holds zero bytes; save it as UTF-8"
    if not line.endswith(b"\n") and b"\r" in line.rstrip():
        return "ends its lines with carriage returns alone, as old Macs did; save it with newlines"
    return ""


def _json_fault(line: bytes) -> str:
    """Return what is wrong with a text whose first line is this, if it is a JSON object, or an empty string."""
    try:  # a model trained on JSON lines would learn their braces, keys and escapes
        value = json.loads(line) if line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") else None
    except (ValueError, RecursionError):
        return ""
    if not isinstance(value, dict):
        return ""
    return "is JSON lines, not plain text; put it into a folder and name that and the field of the text as hf:FOLDER::FIELD"


def _cut(text: str) -> tuple[str, str]:
    """Cut a text after its last blank, or at its end if its second half has none."""
    at = max(text.rfind(blank) for blank in "\n \t") + 1
    return (text[:at], text[at:]) if at > len(text) // 2 else (text, "")


def _lines(path: Path, meter: Meter) -> Iterator[str]:
    """Read the lines of a file. A line of more than MAX_CHARS bytes comes in pieces."""
    number = 1
    try:
        with path.open("rb", buffering=0) as raw:
            meter.enter(raw)
            before = os.fstat(raw.fileno())
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, 1 << 18)
            rest, decoder = "", None
            while piece := file.readline(MAX_CHARS):
                if number == 1 and decoder is None and (fault := first_line_fault(piece) or _json_fault(piece)):
                    raise UserError(f"{path} {fault}.")
                ends = len(piece) < MAX_CHARS or piece.endswith(b"\n")
                if decoder is None and ends:  # a whole line, as nearly all are
                    text = piece.decode("utf-8")
                else:  # a piece may end within a character, and a word may go on in the next piece
                    decoder = decoder or codecs.getincrementaldecoder("utf-8")()
                    text = rest + decoder.decode(piece, final=ends)
                if number == 1:
                    text = text.removeprefix("\ufeff")
                if ends:
                    rest, decoder, number = "", None, number + 1
                else:
                    text, rest = _cut(text)
                yield text
            if decoder is not None:
                yield rest + decoder.decode(b"", final=True)
            after = os.fstat(raw.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise UserError(f"{path} changed while it was being read; start again when it is complete.")
            meter.leave(after.st_size)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short after line {number - 1}: {error}.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error


class Progress:
    """The progress of a pass over a corpus, by bytes read, or by tokens if only `max_tokens` is known."""

    def __init__(self, meter: Meter | None, max_tokens: int) -> None:
        self._meter, self._max_tokens, self._began = meter, max_tokens, time.monotonic()

    def share(self, tokens: int) -> float | None:
        """Return the share of the pass that is done, or None if it cannot be known."""
        shares = []
        if self._meter is not None and self._meter.total:
            shares.append(self._meter.read / self._meter.total)
        if self._max_tokens:
            shares.append(tokens / self._max_tokens)
        return min(1.0, max(shares)) if shares else None

    def line(self, documents: int, tokens: int) -> str:
        """Write the progress line after `documents` documents and `tokens` tokens."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        done = f"{tokens / 1e6:,.1f} M tokens  {tokens / seconds / 1e3:,.0f} k tokens/s  {documents:,} documents"
        share = self.share(tokens)
        if share is None:
            return f"tokenising  {done}"
        left = f"{clock(seconds * (1 - share) / share)} left  " if share > 0 else ""
        of = f" of {self._meter.total / 1e6:,.1f} MB" if self._meter is not None and self._meter.total else ""
        return f"{left}tokenising {share:.0%}{of}  {done}"

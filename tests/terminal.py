"""A pseudo-terminal of 80 columns as standard output and error, and what its screen shows in the end."""

import contextlib
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Callable, Generator
from unittest import mock

from ufbert.runtime import console

WIDTH = 80


class Screen:
    """What a terminal shows of what was written to it; it knows only the codes that a line needs."""

    def __init__(self, written: str) -> None:
        self.lines, row, column = [""], 0, 0
        self.too_long: dict[int, str] = {}
        """Lines that a terminal cuts where its width ends, by row."""
        for code in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|.", written, re.DOTALL):
            if code == "\n":
                row += 1
                self.lines += [""] * (row + 1 - len(self.lines))
            elif code == "\r":
                column = 0
            elif code == "\x1b[2K":
                self.lines[row] = ""
            elif code == "\x1b[1A":
                row -= 1
            elif code not in ("\x1b[?25l", "\x1b[?25h") and not re.fullmatch(
                r"\x1b.*m", code
            ):  # the cursor, bold letters
                assert code.isprintable(), repr(code)
                line = self.lines[row].ljust(column)
                self.lines[row], column = line[:column] + code + line[column + 1 :], column + 1
                if column > WIDTH:
                    self.too_long[row] = self.lines[row]
        self.row, self.column = row, column


@contextlib.contextmanager
def terminal() -> Generator[Callable[[], str]]:
    """Make standard output and error a terminal, and every phase a slow one. The function gives what was written so far."""
    master, slave = pty.openpty()
    written, marks = b"", 0

    def read() -> None:
        nonlocal written
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(master, 65536):
                written += data

    def text() -> str:
        nonlocal marks
        marks += 1
        mark = f"\x1b[{marks}z".encode()  # a code that no terminal has
        os.write(slave, mark)
        while mark not in written:
            time.sleep(0.01)
        return re.sub(r"\x1b\[\d+z", "", written.decode())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    environment = {"COLUMNS": str(WIDTH), "TERM": "xterm"}
    with (
        open(slave, "w", encoding="utf-8", closefd=False, buffering=1) as stream,
        mock.patch.multiple(sys, stdout=stream, stderr=stream),
        mock.patch.object(console, "SLOW", 0.0),
        mock.patch.dict(os.environ, environment),
    ):
        yield text
    os.close(slave)
    reader.join()
    os.close(master)


def told(screen: Screen) -> set[str]:
    """The phases that have left a line with their time."""
    return {match[1] for line in screen.lines if (match := re.fullmatch(r"(.*): (\d+\.\d s|\d+:\d\d)", line))}


def wait_for(shown: str, written: Callable[[], str]) -> None:
    """Wait until the terminal has shown these words, apart from codes and blanks, at some time."""
    deadline = time.monotonic() + 600
    while shown not in re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\s+", " ", written()):
        assert time.monotonic() < deadline, written()
        time.sleep(0.05)

"""Processes of `ufbert` that a study or a comparison runs, so many at once: what each was given, and how it was measured.

A process is asked to save and stop by a signal. If the one that started it is killed, it finds that its reader is gone, saves
and stops, too. So the same command goes on after any end.
"""

import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ufbert.errors import Interrupted, UserError
from ufbert.runtime.claim import claimed
from ufbert.runtime.console import phase, show
from ufbert.runtime.machine import commit, machine_facts
from ufbert.runtime.run_folder import Number
from ufbert.runtime.signals import StopSignals
from ufbert.runtime.typed import Count

PROGRAM = (sys.executable, "-m", "ufbert")
POLL = 1.0
"""Seconds between two looks at the processes."""
PATIENCE = 60.0
"""Seconds to wait for a process of an earlier session, cut off from the one that started it, that still saves."""
THREADS = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
IDLE = 0.25
"""Cores of other work, on average, from which on a process counts as measured beside it."""


@dataclass(frozen=True)
class Session:
    """A process that worked on a cell. What has a default is known when it has ended."""

    command: str
    commit: str
    """Commit of the code, with -dirty for changes, or the version of the installed package."""
    cpu: str
    cores: Count
    at_once: Count
    """Cells that ran side by side, at most."""
    began: Number
    """Seconds since 1970."""
    load_before: Number
    """Load average of the last minute."""
    load_after: Number | None = None
    seconds: Number | None = None
    other_work: Number | None = None
    """Cores that other processes kept busy meanwhile, on average; None where the system does not say."""
    exit_code: int | None = None

    @property
    def beside_other_work(self) -> bool:
        """True if other cells, or other processes, kept cores busy meanwhile."""
        return self.at_once > 1 or (self.other_work or 0.0) > IDLE


def new_session(arguments: Sequence[str], at_once: int) -> Session:
    """Return the session of a process that is about to start with these arguments."""
    facts = machine_facts()
    return Session(
        command=shlex.join(["ufbert", *arguments]), commit=commit(), cpu=facts["cpu"], cores=facts["cores"],
        at_once=at_once, began=time.time(), load_before=facts["load"],
    )  # fmt: skip


def started_otherwise(place: Path, stored: Sequence[str], words: Sequence[str]) -> UserError:
    """Return the error of a cell in `place` that was started with other words than those that it should go on with."""
    return UserError(
        f"{place} was started with {shlex.join(stored)}; it cannot go on with {shlex.join(words)}. "
        "Delete it to run the cell anew."
    )


class Process:
    """A process at work. What it prints goes into a log."""

    def __init__(self, arguments: Sequence[str], log: Path, session: Session) -> None:
        """Start `ufbert ARGUMENTS`, with its share of the cores if others run at once."""
        self.line, self._log, self.session = "", log, session
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, session.cores // session.at_once))
        shared = dict.fromkeys(THREADS, threads) if session.at_once > 1 else {}
        self._began, self._busy = time.monotonic(), _busy_seconds()
        self._own = _children_seconds()
        # A session of its own: Ctrl-C in a terminal reaches only the one that started it, which then asks once. And a pipe,
        # whose reader ends with the one that started it.
        self._process = subprocess.Popen(
            [*PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
            env={**os.environ, **shared},
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, name=log.parent.name, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, self._log.open("a", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                log.flush()
                self.line = line.strip() or self.line

    @property
    def has_ended(self) -> bool:
        """True once it has ended."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ask it to save and stop."""
        self._process.send_signal(signal.SIGTERM)

    def finish(self) -> tuple[Session, str]:
        """Wait until it has ended. Returns how it was measured, and why it failed, or "" if it did well or was stopped."""
        code = self._process.wait()
        self._thread.join()
        seconds, busy = time.monotonic() - self._began, _busy_seconds()
        others = None
        if busy is not None and self._busy is not None:
            others = round(max(0.0, busy - self._busy - _children_seconds() + self._own) / max(seconds, 1e-9), 2)
        session = replace(
            self.session, seconds=round(seconds, 2), load_after=os.getloadavg()[0], other_work=others, exit_code=code
        )
        if code in (0, 128 + signal.SIGTERM):
            return session, ""
        failed = self.line.removeprefix("error: ")[:300] if code > 0 else f"ended by {signal.Signals(-code).name}"
        return session, failed or f"exit status {code}"


class Work(NamedTuple):
    """A process to run."""

    name: str
    place: Path
    """Folder of its `cell.json` and `log.txt`."""
    claims: Path
    """Folder that it claims while it works."""
    arguments: list[str]


class Crew(ABC):
    """Runs processes, each as soon as there is room for it."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.running: dict[str, tuple[Work, Process]] = {}

    @abstractmethod
    def waiting(self) -> Sequence[Work]:
        """Return the work that can be done now, in order. It may hold what is at work already."""

    @abstractmethod
    def starts(self, work: Work, session: Session) -> None:
        """Note that work is about to start. Raises UserError if it must not."""

    @abstractmethod
    def ended(self, work: Work, session: Session, failed: str) -> None:
        """Write down how work has ended, `failed` being the reason if it has failed."""

    @abstractmethod
    def settled(self, work: Work, session: Session, failed: str) -> None:
        """Go on after work that has ended by itself."""

    @abstractmethod
    def refused(self, work: Work, reason: str) -> None:
        """Go on after work that could not start."""

    def run(self, label: str, progress: Callable[[], str], on_stop: Callable[[], str]) -> None:
        """Run all. After a signal, what is at work is asked to save, and Interrupted is raised with what `on_stop` says."""
        with StopSignals() as signals, phase(label, stays=False):
            signals.save_first()
            try:
                while signals.asked is None and (self._start_waiting() or self.running):
                    for name in [name for name, (_, process) in self.running.items() if process.has_ended]:
                        self._settle(name)
                    show(progress())
                    time.sleep(POLL)
            finally:
                for _, process in self.running.values():
                    process.stop()
                for work, process in self.running.values():
                    self.ended(work, *process.finish())
            if signals.asked is not None:
                raise Interrupted(f"{signals.asked.name}: {on_stop()}", 128 + signals.asked)

    def _start_waiting(self) -> bool:
        """Start as much of the waiting work as there is room for. Returns false if none waits."""
        waiting = [work for work in self.waiting() if work.name not in self.running]
        for work in waiting[: self.at_once - len(self.running)]:
            try:
                _wait_until_free(work.claims)
                session = new_session(work.arguments, self.at_once)
                self.starts(work, session)
                self.running[work.name] = work, Process(work.arguments, work.place / "log.txt", session)
            except UserError as error:
                self.refused(work, str(error))
        return bool(waiting)

    def _settle(self, name: str) -> None:
        work, process = self.running.pop(name)
        session, failed = process.finish()
        self.ended(work, session, failed)
        self.settled(work, session, failed)


def _wait_until_free(run: Path) -> None:
    """Wait while another process has claimed a run folder. Raises UserError if it still has after `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with claimed(run):
                return
        except UserError:
            if time.monotonic() > until:
                raise
            show(f"waiting for an earlier process to save {run}")


def _busy_seconds() -> float | None:
    """Return the seconds that all processors of the machine have worked since its start; None if the system does not say."""
    try:
        numbers = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks
    except (OSError, ValueError, IndexError):
        return None


def _children_seconds() -> float:
    """Return the processor seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

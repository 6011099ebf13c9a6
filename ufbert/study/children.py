"""The cells at work: child processes of `ufbert train`, so many at once, which a signal stops and the same command resumes."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ufbert.bench.harness import commit, machine_facts
from ufbert.errors import Interrupted, UserError
from ufbert.options.study import StudyOptions
from ufbert.pretrain.budget import parse_budget
from ufbert.runtime.claim import claimed
from ufbert.runtime.console import clock, phase, say, show
from ufbert.runtime.signals import StopSignals
from ufbert.study.cells import (
    LOG_FILE,
    Cell,
    CellFile,
    Session,
    StudyFile,
    finished_cells,
    n_cells,
    open_cells,
    read_cell,
    summary_of,
    write_cell,
)  # fmt: skip
from ufbert.study.report import write_results
from ufbert.study.variants import Variant, cell_words

PROGRAM = (sys.executable, "-m", "ufbert")
POLL = 1.0
"""Seconds between two looks at the children."""
PATIENCE = 60.0
"""Seconds to wait for a cell that a process of an earlier session, cut off from its study, still saves."""
THREADS = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Child:
    """A process that trains a cell. What it prints goes into the cell's log."""

    def __init__(self, cell: Cell, words: list[str], options: StudyOptions) -> None:
        """Start it. Raises UserError if the cell was started with other options."""
        self.cell, self.place, self.line = cell, cell.folder(Path(options.out)), ""
        run = self.place / "run"
        place = [
            f"--out={run}",
            f"--device={options.device}",
            *([f"--prepared={options.prepared}"] if options.prepared else []),
        ]
        stored = read_cell(self.place) or CellFile(cell.variant, cell.rate, cell.seed, words)
        if stored.words != words:
            raise UserError(
                f"{self.place} was started with {shlex.join(stored.words)}; it cannot go on with {shlex.join(words)}. "
                "Delete it to run the cell anew."
            )
        arguments = ["train", *(["--resume"] if (run / "config.json").exists() else words), *place]
        facts = machine_facts()
        session = Session(
            command=shlex.join(["ufbert", *arguments]), commit=commit(), cpu=facts["cpu"], cores=facts["cores"],
            at_once=options.at_once, began=time.time(), load_before=facts["load"],
        )  # fmt: skip
        self.record = replace(stored, sessions=[*stored.sessions, session], failed="")
        write_cell(self.place, self.record)
        threads = str(max(1, facts["cores"] // options.at_once))
        shared = dict.fromkeys(THREADS, threads) if options.at_once > 1 else {}
        self._began, self._busy = time.monotonic(), _busy_seconds()
        self._own = _children_seconds()
        # A session of its own: Ctrl-C in a terminal reaches the study alone, which then asks its children once. And a pipe:
        # if the study is killed, `train` finds that its reader is gone, saves and stops.
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
            env={**os.environ, **shared},
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, name=cell.name, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines, (self.place / LOG_FILE).open("a", encoding="utf-8") as log:
            for line in lines:
                log.write(line)
                log.flush()
                self.line = line.strip() or self.line

    def stop(self) -> None:
        """Ask it to save and stop."""
        self.process.send_signal(signal.SIGTERM)

    def finish(self) -> str:
        """Write down how the process has ended; return why the cell failed, or ""."""
        code = self.process.wait()
        self._thread.join()
        seconds, busy = time.monotonic() - self._began, _busy_seconds()
        others = None
        if busy is not None and self._busy is not None:
            others = round(max(0.0, busy - self._busy - _children_seconds() + self._own) / max(seconds, 1e-9), 2)
        session = replace(
            self.record.sessions[-1], seconds=round(seconds, 2), load_after=os.getloadavg()[0], other_work=others,
            exit_code=code,
        )  # fmt: skip
        failed = ""
        if summary_of(self.place) is None and code != 128 + signal.SIGTERM:
            failed = self.line.removeprefix("error: ")[:300] if code > 0 else f"ended by {signal.Signals(-code).name}"
            failed = failed or f"exit status {code}"
        self.record = replace(self.record, sessions=[*self.record.sessions[:-1], session], failed=failed)
        write_cell(self.place, self.record)
        return failed


class Runner:
    """Runs the open cells of a study, each as soon as there is room for it."""

    def __init__(self, options: StudyOptions, study: StudyFile, variants: Sequence[Variant]) -> None:
        self._options, self._study, self._folder = options, study, Path(options.out)
        self._variants = {variant.name: variant for variant in variants}
        self._running: list[Child] = []
        self._settled: set[Cell] = set()
        self._took: list[float] = []
        """Seconds of the cells that this session has finished."""
        self.failed: list[str] = []
        """Name and reason of each cell that failed."""

    def run(self) -> None:
        """Run all. After a signal the cells at work are saved, and Interrupted is raised."""
        with StopSignals() as signals, phase("running the cells", stays=False):
            signals.save_first()
            try:
                while signals.asked is None and (self._start_waiting() or self._running):
                    for child in [child for child in self._running if child.process.poll() is not None]:
                        self._settle(child)
                    show(self._progress())
                    time.sleep(POLL)
            finally:
                for child in self._running:
                    child.stop()
                for child in self._running:
                    child.finish()
            if signals.asked is not None:
                raise Interrupted(
                    f"{signals.asked.name}: {self._count()} cells are finished and those at work are saved; the same command "
                    "goes on.",
                    128 + signals.asked,
                )

    def _start_waiting(self) -> bool:
        """Start as many open cells as there is room for. Returns false if none is open."""
        at_work = {child.cell for child in self._running}
        waiting = [cell for cell in open_cells(self._study, self._folder, self._settled) if cell not in at_work]
        for cell in waiting[: self._options.at_once - len(self._running)]:
            variant = self._variants[cell.variant]
            words = cell_words(self._options, variant, self._study.max_tokens, cell.rate, cell.seed)
            try:
                _wait_until_free(cell.folder(self._folder) / "run")
                self._running.append(Child(cell, words, self._options))
                say(f"{self._count()} {cell.name}: started")
            except UserError as error:
                self._fail(cell, str(error))
        return bool(waiting)

    def _settle(self, child: Child) -> None:
        """Note how a child has ended."""
        self._running.remove(child)
        reason, summary = child.finish(), summary_of(child.place)
        if summary is None:
            self._fail(child.cell, reason or "stopped from outside")
            return
        self._settled.add(child.cell)
        seconds = child.record.sessions[-1].seconds or 0.0
        self._took.append(seconds)
        say(f"{self._count()} {child.cell.name}: {summary.heldout_loss:.4f} nats, {seconds:,.0f} s")
        write_results(self._folder, self._study)

    def _fail(self, cell: Cell, reason: str) -> None:
        self._settled.add(cell)
        self.failed.append(f"{cell.name} ({reason.rstrip('.')})")
        say(f"{self._count()} {cell.name}: failed: {reason}")

    def _count(self) -> str:
        """Return how many cells are finished, of how many: [3/8]."""
        return f"[{len(finished_cells(self._study, self._folder))}/{n_cells(self._study)}]"

    def _progress(self) -> str:
        """Return a line with the time left in all, and the last line of each child."""
        each = sum(self._took) / len(self._took) if self._took else None
        if each is None and self._options.budget:
            each = parse_budget(self._options.budget).seconds
        left = "time left unknown before the first cell is finished"
        if each is not None:
            spent = sum(min(each, time.time() - child.record.sessions[-1].began) for child in self._running)
            cells = n_cells(self._study) - len(finished_cells(self._study, self._folder))
            left = f"{clock(max(0.0, cells * each - spent) / self._options.at_once)} left in all"
        return f"{left}  {self._count()} " + "; ".join(f"{child.cell.name}: {child.line}" for child in self._running)


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

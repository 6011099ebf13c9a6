"""The cells of a study at work: processes of `ufbert train`, which the same command resumes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ufbert.options.study import StudyOptions
from ufbert.pretrain.budget import parse_budget
from ufbert.runtime.console import clock, say
from ufbert.study.cells import (
    Cell,
    CellFile,
    StudyFile,
    finished_cells,
    n_cells,
    open_cells,
    read_cell,
    summary_of,
    write_cell,
)  # fmt: skip
from ufbert.study.processes import Crew, Session, Work, started_otherwise
from ufbert.study.report import write_results
from ufbert.study.variants import Variant, cell_words


class Runner(Crew):
    """Runs the open cells of a study, each as soon as there is room for it."""

    def __init__(self, options: StudyOptions, study: StudyFile, variants: Sequence[Variant]) -> None:
        super().__init__(options.at_once)
        self._options, self._study, self._folder = options, study, Path(options.out)
        self._variants = {variant.name: variant for variant in variants}
        self._cells: dict[str, Cell] = {}
        """By name, those that were waiting."""
        self._settled: set[Cell] = set()
        self._took: list[float] = []
        """Seconds of the cells that this session has finished."""
        self.failed: list[str] = []
        """Name and reason of each cell that failed."""

    def run_all(self) -> None:
        """Run all. After a signal the cells at work are saved, and Interrupted is raised."""
        stopped = "cells are finished and those at work are saved; the same command goes on."
        self.run("running the cells", self._progress, lambda: f"{self._count()} {stopped}")

    def waiting(self) -> list[Work]:
        """Return the open cells."""
        cells = open_cells(self._study, self._folder, self._settled)
        self._cells |= {cell.name: cell for cell in cells}
        return [self._work(cell) for cell in cells]

    def _work(self, cell: Cell) -> Work:
        place, options = cell.folder(self._folder), self._options
        run = place / "run"
        where = [
            f"--out={run}",
            f"--device={options.device}",
            *([f"--prepared={options.prepared}"] if options.prepared else []),
        ]
        begun = ["--resume"] if (run / "config.json").exists() else self._words(cell)
        return Work(cell.name, place, run, ["train", *begun, *where])

    def _words(self, cell: Cell) -> list[str]:
        variant = self._variants[cell.variant]
        return cell_words(self._options, variant, self._study.max_tokens, cell.rate, cell.seed)

    def starts(self, work: Work, session: Session) -> None:
        """Note the session in cell.json. Raises UserError if the cell was started with other options."""
        cell = self._cells[work.name]
        words = self._words(cell)
        stored = read_cell(work.place) or CellFile(cell.variant, cell.rate, cell.seed, words)
        if stored.words != words:
            raise started_otherwise(work.place, stored.words, words)
        write_cell(work.place, replace(stored, sessions=[*stored.sessions, session], failed=""))
        say(f"{self._count()} {cell.name}: started")

    def ended(self, work: Work, session: Session, failed: str) -> None:
        """Write down how the session has ended."""
        stored = read_cell(work.place)
        assert stored is not None
        failed = "" if summary_of(work.place) else failed
        write_cell(work.place, replace(stored, sessions=[*stored.sessions[:-1], session], failed=failed))

    def settled(self, work: Work, session: Session, failed: str) -> None:
        """Note a cell that is finished, or has failed."""
        summary = summary_of(work.place)
        if summary is None:
            return self.refused(work, failed or "stopped from outside")
        self._settled.add(self._cells[work.name])
        seconds = session.seconds or 0.0
        self._took.append(seconds)
        say(f"{self._count()} {work.name}: {summary.heldout_loss:.4f} nats, {seconds:,.0f} s")
        write_results(self._folder, self._study)

    def refused(self, work: Work, reason: str) -> None:
        """Note a cell that has failed."""
        self._settled.add(self._cells[work.name])
        self.failed.append(f"{work.name} ({reason.rstrip('.')})")
        say(f"{self._count()} {work.name}: failed: {reason}")

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
            spent = sum(min(each, time.time() - process.session.began) for _, process in self.running.values())
            cells = n_cells(self._study) - len(finished_cells(self._study, self._folder))
            left = f"{clock(max(0.0, cells * each - spent) / self._options.at_once)} left in all"
        return f"{left}  {self._count()} " + "; ".join(
            f"{name}: {process.line}" for name, (_, process) in self.running.items()
        )

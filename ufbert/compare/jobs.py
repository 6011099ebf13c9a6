"""The cells of a comparison besides pretraining: a sweep of fine-tuning for each model and task, and the timing of all models.

Each has a folder with `cell.json` (how it was run), `log.txt` (what it printed) and its product: `sweep/`, or `speed.json`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ufbert.bench.encoder_models import ModelTimes, read_model_times
from ufbert.compare.protocol import ComparisonFile
from ufbert.errors import UserError
from ufbert.glue.results import GlueResults, read_results
from ufbert.runtime.console import clock, say
from ufbert.runtime.files import write_json
from ufbert.runtime.typed import read_typed
from ufbert.study.cells import CELL_FILE, Cell, StudyFile, best_rate
from ufbert.study.processes import Crew, Session, Work, started_otherwise

TOKENS, TIME, GLUE, SPEED = "tokens", "time", "glue", "speed"
"""Folders in that of the comparison."""
SPEED_FILE = "speed.json"


@dataclass(frozen=True)
class JobFile:
    """cell.json of such a cell."""

    words: list[str]
    """The command and those of its options that decide the numbers."""
    sessions: list[Session] = field(default_factory=list)
    failed: str = ""
    """Why its last session failed."""


def read_job(place: Path) -> JobFile | None:
    """Read cell.json; None if there is none. Raises UserError if it is damaged."""
    return read_typed(place / CELL_FILE, JobFile, exact=True) if (place / CELL_FILE).exists() else None


def write_job(place: Path, job: JobFile) -> None:
    """Write cell.json, whole or not at all. Raises UserError if the disk refuses."""
    write_json(place / CELL_FILE, asdict(job))


class Job(NamedTuple):
    """A cell to run."""

    name: str
    place: Path
    words: list[str]
    """As in JobFile."""

    @property
    def is_speed(self) -> bool:
        """True for the timing of all models."""
        return self.name == SPEED

    @property
    def is_done(self) -> bool:
        """True if its product is there: of the timing, that of the same models and shapes with none refused."""
        if self.is_speed:
            job, times = read_job(self.place), speed_of(self.place)
            return bool(times and not times.refused and job and job.words == self.words)
        return glue_of(self.place) is not None

    @property
    def work(self) -> Work:
        """The process that goes on with it."""
        if self.is_speed:
            return Work(self.name, self.place, self.place, [*self.words, f"--json={self.place / SPEED_FILE}"])
        sweep = self.place / "sweep"
        begun = ["--resume"] if (sweep / "glue.json").exists() else []
        return Work(self.name, self.place, sweep, [*self.words, *begun, f"--out={sweep}"])


def glue_of(place: Path) -> GlueResults | None:
    """Read a finished sweep of one task; None if it is not finished, or if it is damaged: `finetune --resume` says so."""
    try:
        results = read_results(place / "sweep")
    except UserError:
        return None
    return results if results.tasks else None


def speed_of(place: Path) -> ModelTimes | None:
    """Read the timing; None if there is none, or if it is damaged: it is measured again then."""
    try:
        return read_model_times(place / SPEED_FILE)
    except UserError:
        return None


def first_model(study: StudyFile, folder: Path, name: str) -> Path | None:
    """Return the model folder of the first seed at its best rate, in a study's folder; None if it is not finished."""
    best = best_rate(study, folder, name)
    return None if best is None else best.folder(folder) / "run" / "model"


def glue_jobs(folder: Path, comparison: ComparisonFile, models: Mapping[str, Path], device: str) -> list[Job]:
    """Return the cells of fine-tuning, a task of all models after the other. `models` are folders by name."""
    jobs = []
    for task in comparison.tasks:
        for name, model in models.items():
            seeds = ",".join(map(str, comparison.seeds_of_task(task)))
            words = ["finetune", f"--model={model}", f"--tasks={task}", f"--seeds={seeds}"]
            words += [f"--protocol={comparison.protocol}", f"--glue-source={comparison.source}", f"--device={device}"]
            jobs.append(Job(f"{name} on {task}", folder / GLUE / name / task, words))
    return jobs


def speed_job(folder: Path, comparison: ComparisonFile, models: Mapping[str, Path]) -> Job:
    """Return the timing of all models, whose folders `models` has by name."""
    words = ["bench", "encoder", "--shapes", *comparison.shapes, f"--blocks={comparison.blocks}"]
    words += [f"--seconds-a-block={comparison.seconds_a_block}"]
    if comparison.baseline in models:
        words += [f"--baseline={comparison.baseline}"]
    return Job(SPEED, folder / SPEED, [*words, "--model", *(f"{name}={model}" for name, model in models.items())])


class JobRunner(Crew):
    """Runs the cells that are not done, each as soon as there is room for it."""

    def __init__(self, jobs: Sequence[Job], at_once: int) -> None:
        super().__init__(at_once)
        self._jobs = {job.name: job for job in jobs}
        self._open = {name for name, job in self._jobs.items() if not job.is_done}
        self._took: list[float] = []
        self.failed: list[str] = []
        """Name and reason of each cell that failed."""

    def run_all(self, label: str) -> None:
        """Run all. After a signal the cells at work are saved, and Interrupted is raised."""
        stopped = "cells are finished and those at work are saved; the same command goes on."
        self.run(label, self._progress, lambda: f"{self._count()} {stopped}")

    def waiting(self) -> list[Work]:
        """Return the cells that are open."""
        return [job.work for name, job in self._jobs.items() if name in self._open]

    def starts(self, work: Work, session: Session) -> None:
        """Note the session. Raises UserError if a sweep was started with other options."""
        job = self._jobs[work.name]
        stored = read_job(work.place) or JobFile(job.words)
        if job.is_speed:  # other models are measured anew, all in turns
            stored = replace(stored, words=job.words)
            (work.place / SPEED_FILE).unlink(missing_ok=True)
        if stored.words != job.words:
            raise started_otherwise(work.place, stored.words, job.words)
        write_job(work.place, replace(stored, sessions=[*stored.sessions, session], failed=""))
        say(f"{self._count()} {work.name}: started")

    def ended(self, work: Work, session: Session, failed: str) -> None:
        """Write down how the session has ended."""
        stored = read_job(work.place)
        assert stored is not None
        write_job(work.place, replace(stored, sessions=[*stored.sessions[:-1], session], failed=failed))

    def settled(self, work: Work, session: Session, failed: str) -> None:
        """Note a cell that is done, or has failed."""
        if failed or not self._jobs[work.name].is_done:
            return self.refused(work, failed or "stopped from outside")
        self._open.discard(work.name)
        self._took.append(session.seconds or 0.0)
        say(f"{self._count()} {work.name}: done, {session.seconds or 0.0:,.0f} s")

    def refused(self, work: Work, reason: str) -> None:
        """Note a cell that has failed."""
        self._open.discard(work.name)
        self.failed.append(f"{work.name} ({reason.rstrip('.')})")
        say(f"{self._count()} {work.name}: failed: {reason}")

    def _count(self) -> str:
        done = sum(job.is_done for job in self._jobs.values())
        return f"[{done}/{len(self._jobs)}]"

    def _progress(self) -> str:
        lines = "; ".join(f"{name}: {process.line}" for name, (_, process) in self.running.items())
        if not self._took:
            return f"time left unknown before the first of these cells is done  {self._count()} {lines}"
        each = sum(self._took) / len(self._took)
        return f"about {clock(len(self._open) * each / self.at_once)} left of these  {self._count()} {lines}"


def study_cells(study: StudyFile) -> list[Cell]:
    """Return every cell of a study without rates of its own."""
    return [
        Cell(name, None, seed)
        for number, seed in enumerate(study.seeds)
        for name in study.variants
        if number == 0 or name not in study.first_only
    ]

"""Processes that take turns: how every benchmark asks "how many times as fast are we, doing the same work?".

Each side works in a process of its own (`worker.py` has the protocol), so that neither library's threads or memory
disturb the other's. Blocks of equal work alternate between them; who begins a round changes from round to round. A
ratio is taken of two neighbouring blocks, which see the same machine. Read its median first, then its quartiles.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ufbert.errors import UserError
from ufbert.runtime.console import phase

PAUSE = 0.03
"""Seconds between blocks, in which the threads of the last block stop waiting actively for more work."""

Times = dict[str, dict[str, list[float]]]
"""Seconds of a call, by entry and work, one number a block."""


class Missing(UserError):
    """A process cannot be timed here, because its interpreter or a library is not installed."""


class WorkerProcess:
    """A process that answers the protocol of `ufbert.bench.worker`. As a context manager it ends the process."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start `command`, with more `environment` and stderr in a file in `folder`. Raises Missing if it cannot."""
        self.name, self.log, self.facts, self.late = name, folder / f"{name}.txt", "", ""
        try:
            with self.log.open("w", encoding="utf-8") as errors:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
                    env={**os.environ, **(environment or {})},
                )  # fmt: skip
        except OSError as error:
            raise Missing(f"Cannot start {name} with {command[0]}: {error.strerror}.") from error

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_ready(self) -> None:
        """Wait until the job is read, and keep the `facts`. Raises Missing without a library, UserError if it fails."""
        self.facts = str(self._answer("ready")["ready"])

    def log_lines(self) -> list[str]:
        """Return what the process has written to stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()

    def ask(self, do: str, wanted: str, **arguments: Any) -> dict[str, Any]:
        """Return the process's answer to a message. Raises UserError if it fails or its answer lacks `wanted`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # It has ended; reading its answer says why.
        return self._answer(wanted)

    @contextmanager
    def within(self, seconds: float | None) -> Generator[None]:
        """End the process, so that what it is asked fails, if the block takes longer than this; None sets no limit."""
        if seconds is None:
            yield
            return
        timer = threading.Timer(max(0.0, seconds), self._give_up, [seconds])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, seconds: float) -> None:
        self.late = f"it took longer than {max(0.0, seconds):.0f} s"
        self.process.kill()

    def _answer(self, wanted: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        try:
            answer = json.loads(line) if line else {}
        except json.JSONDecodeError:
            raise UserError(f"{self.name} answered {line.strip()[:80]!r}, which is not JSON.") from None
        if wanted in answer:
            return answer
        if "missing" in answer:
            raise Missing(f"{self.name} is not there: {str(answer['missing']).rstrip('.')}.")
        lines = self.log_lines()
        reason = self.late or answer.get("error") or (lines[-1] if lines else "it ended without a word")
        raise UserError(f"{self.name} failed: {reason.rstrip('.')}.")


class Entry(NamedTuple):
    """Something that is timed: a process and a name that it knows."""

    process: WorkerProcess
    name: str


def our_program(module: str) -> tuple[str, ...]:
    """Return the command of a process of ours, a module of this package."""
    return sys.executable, "-m", f"ufbert.bench.{module}"


def thread_variables(threads: int) -> dict[str, str]:
    """Return the variables of the environment that limit a process's threads."""
    variables = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return dict.fromkeys(variables, str(threads))


def start_processes(
    programs: Mapping[str, Sequence[str]], folder: Path, threads: int, running: ExitStack, entries: Sequence[str] = ()
) -> tuple[dict[str, WorkerProcess], dict[str, str]]:
    """Start a process for each name and wait until it is ready, one after the other, since each needs all cores for that.

    Returns the processes, which end with `running`, and the reasons of those that are missing. `entries` are what `ufbert`
    computes. A folder called like a process in `folder` is its own job. Raises UserError if a process fails.
    """
    environment = thread_variables(threads)
    processes: dict[str, WorkerProcess] = {}
    missing: dict[str, str] = {}
    for name, program in programs.items():
        job = folder / name if (folder / name).is_dir() else folder
        command = [*program, str(job), name, str(threads), *(entries if name == "ufbert" else ())]
        try:
            process = running.enter_context(WorkerProcess(name, command, folder, environment))
            with phase(f"starting {name}"):
                process.wait_ready()
            processes[name] = process
        except Missing as error:
            missing[name] = str(error).rstrip(".")
    return processes, missing


def load(entries: Sequence[Entry], file: str, rows: int) -> None:
    """Let every process get ready for batches of so many rows of a file."""
    for process in {id(entry.process): entry.process for entry in entries}.values():
        process.ask("load", "batches", file=file, rows=rows)


def time_block(entry: Entry, work: str, first: int, calls: int) -> float:
    """Return the seconds of some calls, by the clock of the process: the pipe to it is not timed."""
    answer = entry.process.ask("time", "seconds", name=entry.name, work=work, first=first, calls=calls)
    return float(answer["seconds"])


def alternate(
    entries: Sequence[Entry],
    calls: Mapping[str, Mapping[str, int]],
    blocks: int,
    start: int = 0,
    go_on: Callable[[Times], bool] = lambda times: True,
    failed: dict[str, str] | None = None,
) -> Times:
    """Time blocks of `calls[name][work]` calls in turns from batch `start` on, each on other batches than the last.

    After every round `go_on` is told all times, and ends the contest if it returns False. With `failed`, an entry that
    fails is named there, with its reason, and no longer timed; else UserError is raised.
    """
    times: Times = {name: {work: [] for work in calls[name]} for _, name in entries}
    for block in range(blocks):
        turn = block % len(entries)
        for entry in (*entries[turn:], *entries[:turn]):
            if failed and entry.name in failed:
                continue
            try:
                for work, n in calls[entry.name].items():
                    time.sleep(PAUSE)
                    times[entry.name][work].append(time_block(entry, work, start + block * n, n) / n)
            except UserError as error:
                if failed is None:
                    raise
                failed[entry.name] = str(error)
        if not go_on(times):
            break
    return times


def time_rounds(
    entries: Sequence[Entry], seconds: Mapping[str, float], blocks: int, label: str
) -> tuple[Times, dict[str, dict[str, int]]]:
    """Time rounds of blocks that take about `seconds[work]` each; return the times and the calls of a block.

    Shows `label` and how long it will take.
    """
    with phase(f"trying {label}"):
        trials = {e.name: {work: calls_for(e, work, wanted) for work, wanted in seconds.items()} for e in entries}
    whole = blocks * sum(took + PAUSE for works in trials.values() for _, took in works.values())
    calls = {name: {work: n for work, (n, _) in works.items()} for name, works in trials.items()}
    with phase(f"timing {label}, about {whole:.0f} s"):
        return alternate(entries, calls, blocks), calls


def calls_for(entry: Entry, work: str, seconds: float) -> tuple[int, float]:
    """Return how many calls take about `seconds`, at least 1, and how long they will take. The first call compiles."""
    time_block(entry, work, 0, 1)
    calls = 1
    while True:
        took = time_block(entry, work, 0, calls)
        if took >= seconds / 4 or calls > 1 << 20:
            count = max(1, round(calls * seconds / max(took, 1e-9)))
            return count, count * took / calls
        calls *= 4


class Ratio(NamedTuple):
    """Our speed over a peer's, from pairs of neighbouring blocks."""

    median: float
    low: float
    high: float
    """The quartiles."""
    fastest: float
    """The ratio of each side's fastest block: nearest to an idle machine, if other work slows the sides unequally."""
    pairs: int


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Return the ratios of theirs[i] to ours[i], seconds of equal work in neighbouring blocks."""
    ratios = [their_seconds / our_seconds for our_seconds, their_seconds in zip(ours, theirs, strict=True)]
    low, median, high = quartiles(ratios)
    return Ratio(median, low, high, min(theirs) / min(ours), len(ratios))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return low, median, high


def machine_facts() -> dict[str, Any]:
    """Return the processor's name, the cores that this process may use, and the load of the last minute."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else platform.machine(), "cores": cores, "load": os.getloadavg()[0]}


def commit() -> str:
    """Return the commit that the package's code lies in, with -dirty if it was changed, or the package's version."""
    package = Path(__file__).parent.parent
    git = ["git", "-C", str(package)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "cli.py"], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("ufbert")

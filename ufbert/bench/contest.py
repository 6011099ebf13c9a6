"""Contestants in processes of their own, and blocks of work that alternate between them."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ufbert.errors import UserError

TOLERANCE = 1e-4
"""Largest relative difference of a peer's losses from ours with which it is timed."""


class Race(NamedTuple):
    """How much is checked and timed."""

    rows: int
    """Rows of an update."""
    checked: int
    """Updates whose losses must agree before anything is timed."""
    updates: int
    """Updates in a block."""
    blocks: int
    """Rounds of blocks."""
    seed: int
    """Of everything random."""


class Missing(UserError):
    """A contestant that this machine has not got, as its interpreter or a library is not there; the sentence says what."""


class Contestant:
    """A process that works on request (protocols: `ufbert.bench.worker`, `ufbert.bench.layer_worker`). Use it as a context
    manager, which ends it."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start `command`, with `environment` on top of this process's; what it says on stderr goes to a file in `folder`.

        Raises Missing if it cannot start.
        """
        self.name, self.notes, self.facts = name, folder / f"{name}.txt", ""
        try:
            with self.notes.open("w", encoding="utf-8") as errors:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
                    env={**os.environ, **(environment or {})},
                )  # fmt: skip
        except OSError as error:
            raise Missing(f"Cannot start {name} with {command[0]}: {error.strerror}.") from error

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_ready(self) -> None:
        """Return when the process has loaded its job; `facts` then says what it is. Raises UserError if it fails, and Missing
        if it says that it lacks what it needs."""
        self.facts = str(self._answer("ready")["ready"])

    def ask(self, message: Mapping[str, Any], wanted: str) -> dict[str, Any]:
        """Its answer to a message, in which there is `wanted`. Raises UserError if it fails or answers something else."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # It is gone; reading its answer says why.
        return self._answer(wanted)

    def train(self, first: int, updates: int) -> tuple[list[float], float]:
        """The losses of `updates` updates from batch `first` on, and the seconds that they took by this process's clock.

        Raises UserError if the contestant fails, or answers another number of losses.
        """
        start = time.perf_counter()
        losses = self.ask({"first": first, "updates": updates}, "losses")["losses"]
        seconds = time.perf_counter() - start
        if len(losses) != updates:
            raise UserError(f"{self.name} answered {len(losses)} losses for {updates} updates.")
        return losses, seconds

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
        said = answer.get("error") or self._last_note() or "it ended without a word"
        raise UserError(f"{self.name} failed: {said.rstrip('.')}.")

    def _last_note(self) -> str:
        lines = self.notes.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


class Ratio(NamedTuple):
    """How much faster ours is than a peer, from pairs of neighbouring blocks."""

    median: float
    low: float
    """The lower quartile of the paired ratios."""
    high: float
    """The upper quartile."""
    fastest: float
    """The ratio of each side's fastest block: nearest to an idle machine, where other work slows the sides unequally."""
    pairs: int


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """From theirs[i] and ours[i], seconds of equal work in neighbouring blocks."""
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median, low, high, min(theirs) / min(ours), len(ratios))


def alternate(contestants: Sequence[Contestant], first: int, updates: int, blocks: int) -> dict[str, list[float]]:
    """Seconds of each contestant's blocks. All train on batches of the same numbers in the same round, new ones in every
    round, and who begins a round changes from round to round."""
    seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
    for block in range(blocks):
        turn = block % len(contestants)
        for one in (*contestants[turn:], *contestants[:turn]):
            seconds[one.name].append(one.train(first + block * updates, updates)[1])
    return seconds


def compete(
    folder: Path,
    worker: Sequence[str],
    peers: Mapping[str, Sequence[str]],
    size: Race,
    warm: int = 0,
    unchecked: Collection[str] = (),
) -> dict[str, Any]:
    """Train in `worker`, our side, and in each peer, in turns: the report of it, in which callers name speeds.

    Commands are lists in which `{folder}` stands for the job folder, whose first `size.checked` batches are the same for
    all, followed by `warm` batches that are trained on before the first block. Peers named in `unchecked` train another model,
    on which the report says nothing but their speed. Raises UserError if a contestant fails, or
    if a peer's losses say that it does not train the same model; then nothing has been timed.
    """
    machine = machine_facts()
    with ExitStack() as running:
        contestants = [
            running.enter_context(Contestant(name, [part.format(folder=folder) for part in command], folder))
            for name, command in {"ufbert": worker, **peers}.items()
        ]
        for one in contestants:
            one.wait_ready()
        losses = {one.name: one.train(0, size.checked)[0] for one in contestants}
        differences = {
            name: None if name in unchecked else check_losses(name, losses[name], losses["ufbert"]) for name in peers
        }
        if warm:
            for one in contestants:
                one.train(size.checked, warm)
        seconds = alternate(contestants, size.checked + warm, size.updates, size.blocks)
    return {
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "job": size._asdict(),
        "contestants": [
            {
                "name": one.name,
                "facts": one.facts,
                "block_seconds": seconds[one.name],
                "first_losses": losses[one.name],
            }
            for one in contestants
        ],
        "ratios": {
            name: paired_ratio(seconds["ufbert"], seconds[name])._asdict() | {"loss_difference": differences[name]}
            for name in peers
        },
    }


def check_losses(name: str, theirs: Sequence[float], ours: Sequence[float]) -> float:
    """The largest relative difference. Raises UserError if one is above TOLERANCE or not a number."""
    differences = [abs(their - our) / abs(our) for their, our in zip(theirs, ours, strict=True)]
    for i, difference in enumerate(differences):
        if not difference <= TOLERANCE:
            raise UserError(
                f"{name} does not train the same model: its loss after {i} updates is {theirs[i]:.6f}, ours {ours[i]:.6f}. "
                "Nothing was timed."
            )
    return max(differences)


def machine_facts() -> dict[str, Any]:
    """The processor's name, the cores that this process may use, and the load of the last minute."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else platform.machine(), "cores": cores, "load": os.getloadavg()[0]}

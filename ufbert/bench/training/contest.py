"""A contest of training: who takes part, all that was measured so far, and the report of it."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ufbert.bench.harness import Times, WorkerProcess, paired_ratio
from ufbert.bench.report import machine_lines
from ufbert.bench.training.kernels import KINDS
from ufbert.config import RunConfig
from ufbert.cost.devices import device_of_kind
from ufbert.cost.flops import train_flops_per_token
from ufbert.options.bench import BenchTrainOptions
from ufbert.runtime.console import say
from ufbert.runtime.files import write_json
from ufbert.runtime.machine import machine_facts


class Contestant(NamedTuple):
    """A process of the contest."""

    name: str
    """Its first word says what computes: `ufbert`, `our` variant, a peer, or `float32` for a reference."""
    preset: str
    """The preset of the contest that it belongs to."""
    model: str
    """The model whose losses it must have: the preset, or its own name."""
    job: str
    """Name of the folder that it starts from."""
    run: RunConfig
    program: Sequence[str]

    @property
    def is_reference(self) -> bool:
        """Tell if it is not timed, and only says what losses should be."""
        return self.name.startswith("float32")


class Contest:
    """A contest under way: who takes part, and all that was measured so far."""

    def __init__(self, options: BenchTrainOptions, contestants: Sequence[Contestant]) -> None:
        self.options, self.contestants = options, contestants
        self.began = time.monotonic()
        self.machine = machine_facts() | {"card": card_facts() if options.device == "gpu" else None}
        self.processes: dict[str, WorkerProcess] = {}
        self.left_out: dict[str, str] = {}
        """Why a process was not timed to the end, by its name."""
        self.logs: dict[str, list[str]] = {}
        """The end of the log of every process that failed at something."""
        self.losses: dict[str, list[float]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.differences: dict[str, float | None] = {}
        """How far the first losses are from those that they are compared with; None where there is nothing to compare."""
        self.times: Times = {}
        self.profiles: dict[str, dict[str, Any]] = {}

    def left(self, share: float = 1.0) -> float | None:
        """Return the seconds until a share of the contest's longest time is over; None if that is not limited."""
        longest = self.options.seconds
        return self.began + share * longest - time.monotonic() if longest else None

    def still_in(self, references: bool = False) -> list[Contestant]:
        """Return those that run and were not left out."""
        running = [c for c in self.contestants if c.name in self.processes and c.name not in self.left_out]
        return [c for c in running if c.is_reference == references]

    def leave_out(self, contestant: Contestant, why: Exception | str) -> None:
        """End a process and keep the reason."""
        self.left_out[contestant.name] = str(why).rstrip(".")
        say(f"{contestant.name} is left out: {self.left_out[contestant.name]}.")
        if contestant.name in self.processes:
            self.processes[contestant.name].process.kill()
            self.keep_log(contestant.name)

    def keep_log(self, name: str) -> None:
        """Keep the end of a process's log."""
        self.logs[name] = self.processes[name].log_lines()[-40:]

    def keep(self) -> dict[str, Any]:
        """Return the report of what was measured so far, and write it if a file is named."""
        report = report_of(self)
        if self.options.json:
            write_json(Path(self.options.json), report)
        return report


def report_of(contest: Contest) -> dict[str, Any]:
    """Return everything measured so far as JSON values: seconds, bytes, tokens."""
    options = contest.options
    timed = [c for c in contest.contestants if contest.times.get(c.name, {}).get("step")]
    job = {name: getattr(options, name) for name in ("device", "rows", "checked", "updates", "blocks", "seed")}
    runs = {c.job: asdict(c.run) for c in contest.contestants}
    return {
        "machine": {**contest.machine, "load_after": os.getloadavg()[0]},
        "job": job | {"runs": runs},
        "contestants": [contestant_report(contest, c) for c in timed],
        "ratios": {theirs.name: ratio_report(contest, ours, theirs) for ours, theirs in pairs(timed)},
        "losses": contest.losses,
        "left_out": contest.left_out,
        "logs": contest.logs,
        "profiles": contest.profiles,
        "seconds": time.monotonic() - contest.began,
    }


def contestant_report(contest: Contest, contestant: Contestant) -> dict[str, Any]:
    """Report one contestant. `share_of_peak` counts the arithmetic that its model needs, whoever computes more."""
    name, run, facts = contestant.name, contestant.run, contest.facts[contestant.name]
    block_tokens = contest.options.updates * contest.options.rows * run.data.seq_len
    seconds = block_seconds(contest, name)
    speed = block_tokens / statistics.median(seconds)
    peaks = device_of_kind(facts["card"]) if facts["card"] else None
    flops = train_flops_per_token(run, masked_trees=False)
    return {
        "name": name,
        "facts": contest.processes[name].facts,
        "block_seconds": seconds,
        "first_losses": contest.losses[name],
        "loss_difference": contest.differences.get(name),
        "tokens_per_second": speed,
        "flops_per_token": flops,
        "share_of_peak": speed * flops / peaks.products(run.model.dtype) if peaks else None,
        **facts,
    }


def block_seconds(contest: Contest, name: str) -> list[float]:
    """Return the seconds of a contestant's blocks."""
    return [contest.options.updates * call for call in contest.times[name]["step"]]


def pairs(timed: Sequence[Contestant]) -> Iterator[tuple[Contestant, Contestant]]:
    """Pair ours of each model with its peers and variants, and ours of a second model with ours of the first."""
    ours = [c for c in timed if c.name.startswith("ufbert")]
    for mine in ours:
        yield from ((mine, c) for c in timed if c.preset == mine.preset and c is not mine)
    yield from ((other, ours[0]) for other in ours[1:])


def ratio_report(contest: Contest, ours: Contestant, theirs: Contestant) -> dict[str, Any]:
    """Report how many times as fast ours is, from the rounds that both were in.

    `loss_difference` is null if the losses were not compared, and `same_model` false if they cannot agree.
    """
    mine, other = block_seconds(contest, ours.name), block_seconds(contest, theirs.name)
    rounds = min(len(mine), len(other))
    return {
        **paired_ratio(mine[:rounds], other[:rounds])._asdict(),
        "ours": ours.name,
        "same_model": ours.model == theirs.model,
        "loss_difference": contest.differences.get(theirs.name),
    }


def text(report: Mapping[str, Any]) -> str:
    """Return speeds, ratios, those that were left out, and profiles."""
    lines, card = machine_lines(report["machine"]), report["machine"]["card"]
    if report["job"]["device"] == "gpu":  # what else the processors do costs a card little
        lines = [lines[0], *dict.fromkeys([card[0], card[-1]] if card else [])]
    width = max([14, *(len(process["name"]) for process in report["contestants"])])
    for process in report["contestants"]:
        lines.append(f"{process['name']:<{width}} {process['tokens_per_second']:>10,.0f} tokens/s  {_details(process)}")
    for name, ratio in report["ratios"].items():
        lines.append(
            f"{ratio['ours']} trains {ratio['median']:.2f} times as fast as {name}: median of {ratio['pairs']} pairs of "
            f"blocks, quartiles {ratio['low']:.2f} and {ratio['high']:.2f}, fastest blocks {ratio['fastest']:.2f}; "
            f"{_agreement(ratio)}"
        )
    lines += [f"{name} was left out: {why}" for name, why in report["left_out"].items()]
    updates = report["job"]["updates"]
    seconds = {c["name"]: statistics.median(c["block_seconds"]) / updates for c in report["contestants"]}
    for name, profile in report["profiles"].items():
        lines += ["", *profile_lines(name, profile, seconds.get(name, 0.0))]
    return "\n".join(lines)


def _details(process: Mapping[str, Any]) -> str:
    """Return the share of the card's peak, the memory, and the facts of a contestant."""
    share, memory = process["share_of_peak"], process["memory"]
    parts = [f"{share:.1%} of the peak"] if share else []
    parts += [f"{memory / 1e9:.1f} GB"] if memory else []
    return f"({', '.join([*parts, process['facts']])})"


def _agreement(ratio: Mapping[str, Any]) -> str:
    """Say how far the losses agreed."""
    if not ratio["same_model"]:
        return "another model"
    difference = ratio["loss_difference"]
    return "LOSSES NOT COMPARED" if difference is None else f"losses within {difference:.0e}"


def profile_lines(name: str, profile: Mapping[str, Any], seconds: float) -> list[str]:
    """Return a table of milliseconds an update by kind of kernel, and the operations that take most.

    `seconds` is what an update took when it was timed.
    """
    lines = [
        f"{name}: {1e3 * profile['seconds']:.2f} ms an update in kernels, of {1e3 * seconds:.2f} ms timed; by kind"
    ]
    for kind in KINDS:
        taken = profile["kinds"][kind]
        lines.append(f"  {kind:<19} {1e3 * taken:>8.2f} ms {taken / max(profile['seconds'], 1e-12):>6.1%}")
    lines.append("the largest, those of all layers together")
    for kernel in profile["largest"][:16]:
        lines.append(
            f"  {1e3 * kernel['seconds']:>8.2f} ms  {kernel['times']:>5.0f} times  {kernel['kind']:<18} {kernel['name'][:40]}"
            f"  {kernel['operation'][-80:]}"
        )
    return lines


def card_facts() -> list[str] | None:
    """Return nvidia-smi's line of the card: name, driver, clocks now and at most, power, heat, load. None without it."""
    fields = (
        "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,memory.used"
    )
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines()[:1]

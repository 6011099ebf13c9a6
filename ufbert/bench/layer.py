"""Tree layers against dense layers on this CPU: who takes part, the rounds of blocks, and the report."""

import os
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ufbert.bench.contest import Contestant, Missing, machine_facts
from ufbert.bench.layer_gates import Ask, check_everything
from ufbert.bench.layer_job import write_job
from ufbert.bench.layer_options import BenchLayerOptions
from ufbert.bench.layer_report import rows_report
from ufbert.errors import UserError
from ufbert.ops import native

PEER_SCRIPT = Path(__file__).parent / "torch_layer_peer.py"

PAUSE = 0.03
"""Seconds between blocks, in which the threads of the one before stop waiting actively for more work."""

SINGLE_SHARE = 0.25
"""Time for calls of a single layer over that for calls of the chain."""


PLACES = ("peer_python", "peer_script", "json", "plot")
"""Options that say where something lies, which a report need not tell."""


class Field(NamedTuple):
    """Who takes part."""

    ours: list[Ask]
    peers: list[Ask]
    missing: dict[str, str]
    """Names, and why they are not there."""


def race(folder: Path, options: BenchLayerOptions, zeros: bool) -> dict[str, Any]:
    """Check, then time every contestant, and report. With `zeros`, weights and rows are zeros, and nothing is checked.

    Raises UserError if a contestant fails or computes something else; then nothing has been timed.
    """
    machine = machine_facts()
    write_job(folder, options.shape, options.rows, options.seed, zeros)
    with ExitStack() as running:
        field = line_up(folder, options, running)
        everyone = [*field.ours, *field.peers]
        checked = {} if zeros else check_everything(folder, options.shape, options.rows, field.ours, field.peers)
        machine |= field.ours[0][0].ask({"do": "machine"}, "read")
        times = {rows: time_rows(everyone, rows, options) for rows in options.rows}
    job = {name: value for name, value in asdict(options).items() if name not in PLACES}
    our_names, peer_names = [name for _, name in field.ours], [name for _, name in field.peers]
    return {
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "job": job | {"used_threads": options.used_threads, "zeros": zeros},
        "facts": {one.name: one.facts for one, _ in everyone},
        "missing": field.missing,
        "checked": checked,
        "rows": [
            rows_report(rows, found, our_names, peer_names, options.shape, machine) for rows, found in times.items()
        ],
    }


def line_up(folder: Path, options: BenchLayerOptions, running: ExitStack) -> Field:
    """Start all processes; they end with `running`. Raises UserError if one fails, or if none of ours is there."""
    why = native.unavailable() if any(path != "gather" for path in options.our_paths) else ""
    missing = {path: f"no native kernels: {why}" for path in options.our_paths if why and path != "gather"}
    paths = [path for path in options.our_paths if path not in missing]
    if not paths:
        raise UserError(f"None of the paths can be used; there are {next(iter(missing.values()))}.")
    threads = str(options.used_threads)
    names = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    environment = dict.fromkeys(names, threads)
    here = (sys.executable, "-m", "ufbert.bench.layer_process", str(folder))
    torch = (options.peer_python, options.peer_script or str(PEER_SCRIPT), str(folder))
    commands = {"ufbert": (*here, "ufbert", threads, *paths)}
    for name in dict.fromkeys(options.peers):
        if name.startswith("torch") and not options.peer_python:
            missing[name] = "no interpreter that has torch was named (--peer-python)"
        else:
            commands[name] = (*(torch if name.startswith("torch") else here), name, threads)
    started, there = [], []
    for name, command in commands.items():
        with note_missing(name, missing):
            started.append(running.enter_context(Contestant(name, command, folder, environment)))
    for contestant in started:
        with note_missing(contestant.name, missing):
            contestant.wait_ready()
            there.append(contestant)
    return Field([(there[0], path) for path in paths], [(one, one.name) for one in there[1:]], missing)


@contextmanager
def note_missing(name: str, missing: dict[str, str]) -> Generator[None]:
    """Put down why a contestant is not there, if it is not."""
    try:
        yield
    except Missing as error:
        missing[name] = str(error).rstrip(".")


def time_rows(everyone: list[Ask], rows: int, options: BenchLayerOptions) -> dict[str, dict[str, Any]]:
    """By name: `chain`, seconds a layer within the chain, and `layer`, seconds of a call of one layer, one number a block.

    Every block begins with batches that the one before has not had, and who begins a round changes from round to round.
    """
    for contestant in {id(one): one for one, _ in everyone}.values():
        contestant.ask({"do": "load", "rows": rows}, "batches")
    seconds = {"chain": options.seconds_a_block, "layer": SINGLE_SHARE * options.seconds_a_block}
    trials = {(one[1], what): calls_for(one, what, wanted) for one in everyone for what, wanted in seconds.items()}
    calls = {key: count for key, (count, _) in trials.items()}
    whole = options.blocks * sum(took + PAUSE for _, took in trials.values())
    print(f"timing {rows} rows a call, about {whole:.0f} s", file=sys.stderr, flush=True)
    found: dict[str, dict[str, Any]] = {name: {"chain": [], "layer": []} for _, name in everyone}
    for block in range(options.blocks):
        turn = block % len(everyone)
        for contestant, name in (*everyone[turn:], *everyone[:turn]):
            for what, per_call in (("chain", options.layers), ("layer", 1)):
                time.sleep(PAUSE)
                n = calls[name, what]
                took = run_block((contestant, name), what, block * n, n)
                found[name][what].append(took / n / per_call)
    for name, one in found.items():
        one["calls"] = {what: calls[name, what] for what in seconds}
    return found


def run_block(one: Ask, what: str, first: int, calls: int) -> float:
    """Seconds of calls, by the clock of the process itself: the pipe to it is not timed."""
    contestant, name = one
    asked = {"do": "time", "name": name, "what": what, "first": first, "calls": calls}
    return float(contestant.ask(asked, "seconds")["seconds"])


def calls_for(one: Ask, what: str, seconds: float) -> tuple[int, float]:
    """How many calls take about that long, after a call that compiles, and how long they will take: one may be longer."""
    run_block(one, what, 0, 1)
    calls = 1
    while True:
        took = run_block(one, what, 0, calls)
        if took >= seconds / 4 or calls > 1 << 20:
            count = max(1, round(calls * seconds / max(took, 1e-9)))
            return count, count * took / calls
        calls *= 4

"""Whole encoders on this CPU against the dense BERT of others: who takes part, the gates, and the rounds of blocks."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.bench.contest import Contestant, machine_facts
from ufbert.bench.encoder_job import BATCHES, configs, parse_shape, write_job
from ufbert.bench.encoder_options import BenchEncoderOptions
from ufbert.bench.encoder_report import shape_report
from ufbert.bench.layer import PAUSE, calls_for, note_missing, run_block
from ufbert.bench.layer_gates import LEAVES, Ask, type_of
from ufbert.errors import UserError
from ufbert.ops import native

PEER_SCRIPT = Path(__file__).parent / "encoder_peer.py"
TOLERANCE = 1e-4
"""Largest absolute difference of our float32 answers from the training graph's, for tokens whose turns are clear."""
UNCLEAR = 0.01
"""Largest share of other tokens."""
NARROW = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.4}
"""Largest relative error of narrow weights, a median over tokens, and of peers. Twelve layers of random weights add up
rounding more than trained ones do; it is printed."""


def race(folder: Path, options: BenchEncoderOptions) -> dict[str, Any]:
    """Check, then time every contestant, and report.

    Raises UserError if a contestant fails or computes something else; then nothing has been timed.
    """
    machine, shapes = machine_facts(), [parse_shape(one) for one in dict.fromkeys(options.shapes)]
    longest = max(options.fourier_len, *(shape.tokens for shape in shapes))
    models = configs(
        options.layers, options.d_model, options.vocab_size, options.tree_depth, longest, options.fourier_len
    )
    write_job(folder, models, tuple({*shapes, parse_shape(f"1x{options.fourier_len}")}), options.seed)
    if why := native.unavailable():
        raise UserError(f"The engine needs the native kernels, and there are none: {why}.")
    with ExitStack() as running:
        names = list(dict.fromkeys(options.ours))
        ours, peers, missing = line_up(folder, options, [*dict.fromkeys([*names, "dense-float32"])], running)
        checked = check_everything(folder, ours, names, peers, f"1x{options.fourier_len}")
        machine |= ours.ask({"do": "machine"}, "read")
        found, parts = {}, {}
        for shape in shapes:
            timed = [name for name in names if not name.startswith("fourier") or shape.tokens == options.fourier_len]
            found[str(shape)] = time_shape([*((ours, name) for name in timed), *peers], str(shape), options)
            parts[str(shape)] = {
                name: ours.ask({"do": "parts", "name": name, "shape": str(shape)}, "parts")["parts"] for name in timed
            }
        starts = {name: ours.ask({"do": "load time", "name": name}, "seconds") for name in names}
    return {
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "job": {k: v for k, v in asdict(options).items() if k not in ("peer_python", "peer_script", "json", "plot")}
        | {"used_threads": options.used_threads},
        "facts": {one.name: one.facts for one in [ours, *(peer for peer, _ in peers)]},
        "missing": missing,
        "checked": checked,
        "starts": starts,
        "shapes": [
            shape_report(shape, found[str(shape)], parts[str(shape)], models, names, machine) for shape in shapes
        ],
    }


def line_up(
    folder: Path, options: BenchEncoderOptions, names: list[str], running: ExitStack
) -> tuple[Contestant, list[Ask], dict[str, str]]:
    """Our process and the peers', which end with `running`; and why some are missing. Raises UserError if one fails."""
    threads, missing = str(options.used_threads), {}
    variables = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = dict.fromkeys(variables, threads)
    script = options.peer_script or str(PEER_SCRIPT)
    commands = {"ufbert": [sys.executable, "-m", "ufbert.bench.encoder_ours", str(folder), threads, *names]}
    for peer in dict.fromkeys(options.peers):
        commands[peer] = [options.peer_python or sys.executable, script, str(folder), peer, threads]
    there = []
    for name, command in commands.items():  # one after the other: each needs both cores to get ready
        with note_missing(name, missing):
            one = running.enter_context(Contestant(name, command, folder, environment))
            one.wait_ready()
            there.append(one)
    return there[0], [(one, one.name) for one in there[1:]], missing


def check_everything(
    folder: Path, ours: Contestant, names: Sequence[str], peers: list[Ask], shape: str
) -> dict[str, dict[str, float]]:
    """What the gates found, by name. Raises UserError if a contestant is wrong, or if tokens take few routes."""
    checked: dict[str, dict[str, float]] = {}
    for name in names:
        found = ours.ask({"do": "gate", "name": name, "shape": shape}, "error")
        if type_of(name) == "float32" and not found["error"] <= TOLERANCE:
            raise UserError(f"{name} is off by {found['error']:.1e} from the training graph. Nothing was timed.")
        if not found["relative"] <= NARROW[type_of(name)]:
            raise UserError(f"{name} is off by {found['relative']:.1%} from the training graph. Nothing was timed.")
        if found["unclear"] > UNCLEAR:
            raise UserError(f"{found['unclear']:.1%} of {name}'s tokens turn by a hair's breadth. Nothing was timed.")
        if found["leaves"] < LEAVES:
            raise UserError(
                f"{name}'s tokens end in {found['leaves']:.0%} of the leaves that even turns would use; that would time a "
                "cache. Nothing was timed."
            )
        checked[name] = found
    wanted = np.load(folder / ours.ask({"do": "check", "name": "dense-float32", "shape": shape}, "file")["file"])
    for peer, name in peers:
        y = np.load(folder / peer.ask({"do": "check", "name": name, "shape": shape}, "file")["file"])
        if y.shape != wanted.shape:
            raise UserError(f"{name} answers {y.shape}, not {wanted.shape}. Nothing was timed.")
        relative = float(np.median(np.linalg.norm(y - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)))
        if not relative <= NARROW[type_of(name)]:
            raise UserError(f"{name} computes another model: it is off by {relative:.1%}. Nothing was timed.")
        checked[name] = {"relative": relative}
    return checked


def time_shape(everyone: list[Ask], shape: str, options: BenchEncoderOptions) -> dict[str, list[float]]:
    """Seconds of a call by name, one number a block. Who begins a round changes from round to round."""
    for contestant in {id(one): one for one, _ in everyone}.values():
        contestant.ask({"do": "load", "shape": shape}, "batches")
    trials = {one[1]: calls_for(one, "call", options.seconds_a_block) for one in everyone}
    whole = options.blocks * sum(took + PAUSE for _, took in trials.values())
    print(f"timing {shape}, about {whole:.0f} s", file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {name: [] for _, name in everyone}
    for block in range(options.blocks):
        turn = block % len(everyone)
        for contestant, name in (*everyone[turn:], *everyone[:turn]):
            time.sleep(PAUSE)
            calls = trials[name][0]
            found[name].append(run_block((contestant, name), "call", block * calls % BATCHES, calls) / calls)
    return found

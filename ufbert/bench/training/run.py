"""How many times as fast do we pretrain as PyTorch trains the same model, on this CPU or on this graphics card?

Every process starts from the same parameters and gets the same masked rows. Before anything is timed, they must have
equally many parameters and the losses of the first steps must agree: equal losses after several steps mean equal gradients
and an equal optimizer. In float32 they agree with ours to 1e-4. In bfloat16 all must agree with a reference that computes
in float32, as far as the type allows. Then blocks of steps alternate.

How to read the answer: "ufbert trains 1.69 times as fast as torch" is the median of the ratios of neighbouring blocks.
`--beside` adds variants of ours, whose ratio says what a way to compute trees is worth, and `--also` a second model with
peers of its own. "another model" marks a ratio of models whose losses cannot agree.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ufbert.bench.harness import Entry, Missing, Times, WorkerProcess, alternate, our_program, thread_variables
from ufbert.bench.report import check_folders
from ufbert.bench.training.contest import Contest, Contestant, card_facts, text
from ufbert.bench.training.job import write_job
from ufbert.config import RunConfig
from ufbert.errors import UserError
from ufbert.options.bench import BenchTrainOptions, Variant
from ufbert.options.given import Given
from ufbert.options.train import with_run
from ufbert.pretrain.budget import Budget
from ufbert.pretrain.resolve import local_platform, resolve
from ufbert.runtime.console import phase, say
from ufbert.runtime.device import usable_threads, use_device, visible_accelerator

PEER_SCRIPT = Path(__file__).parent / "torch_peer.py"
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-3}
"""Largest relative difference of the first losses with which a process is timed, by the type that it computes in."""
ON_A_CARD: dict[str, Any] = {
    "also": "ultrafastbert_1x11", "scale": "base", "peer": "torch-compile", "rows": 128, "checked": 3, "updates": 12,
    "blocks": 6, "seconds": 240.0,
}  # fmt: skip
"""What options are on a graphics card, if they are not given."""
READY_BY, ROUNDS_UNTIL = 0.7, 0.9
"""Shares of the contest's longest time by which processes must be ready, and after which no round begins."""
PEER_MODEL: dict[str, Any] = {
    "mixer": ("attention",), "feedforward": ("glu",), "activation": "gelu", "norm": "pre", "first_norm": True,
    "norm_bias": True, "positions": "scaled_sinusoid", "qk_norm": False, "n_token_types": 0, "ngram_rows": 0, "use_bias": False,
    "embedding_norm": True, "embedding_projection": False, "final_norm": True, "head_transform": False, "head_bias": False,
    "tie_head": True, "unet_skips": False, "value_embeddings": 0,
}  # fmt: skip
"""The model that the PyTorch peer knows besides its feedforwards `dense` and `tree`; sizes are free."""


def run_train(options: BenchTrainOptions, given: Given) -> None:
    """Print speeds and ratios, and write them as JSON if asked. Raises UserError if nothing is left to compare."""
    if options.device == "gpu":
        if visible_accelerator() != "cuda":
            raise UserError("This machine shows no NVIDIA graphics card; --device cpu holds the contest on its CPU.")
        options = on_a_card(options, given)
    platform = local_platform(use_device("cpu"))  # jobs are written on the CPU, so that nothing of them is on the card
    runs: dict[str, RunConfig] = {}
    for name in dict.fromkeys(filter(None, (options.config, options.also))):
        run = resolve(replace(options, config=name), given, Budget(steps=1), platform).run
        dtype = {"cpu": "float32", "gpu": "bfloat16"}[options.device] if run.model.dtype == "auto" else run.model.dtype
        runs[name] = replace(run, model=replace(run.model, dtype=dtype))
        check_options(with_run(replace(options, config=name), runs[name]))
    check_beside(options, list(runs.values()))
    check_folders(options.json)
    print(text(measure(options, runs)))


def on_a_card(options: BenchTrainOptions, given: Given) -> BenchTrainOptions:
    """Return the options of a contest on a graphics card: those given, and defaults for it. A preset given is the only one."""
    defaults = {name: value for name, value in ON_A_CARD.items() if name not in given}
    return replace(options, **defaults | ({"also": options.also} if "config" in given else {}))


def check_options(options: BenchTrainOptions) -> None:
    """Raise UserError if there is nothing to compare with, or if the peer cannot train the model."""
    if not (options.peer_python or options.beside or options.also):
        raise UserError(
            "Name an interpreter that has torch, with --peer-python PATH, or a way of ours, with --beside, or another model, "
            "with --also."
        )
    if options.peer_python:
        check_peer_is_equal(options)


def check_beside(options: BenchTrainOptions, runs: Sequence[RunConfig]) -> None:
    """Raise UserError if trees shall be computed otherwise and no model has any."""
    trees = sorted(set(options.beside) - {"dense"})
    if trees and not any("tree" in run.model.feedforward for run in runs):
        raise UserError(f"--beside {trees[0]} is another way to compute trees, and {options.config} has none.")


def check_peer_is_equal(options: BenchTrainOptions) -> None:
    """Raise UserError unless this is a crammed BERT or an UltraFastBERT with AdamW, which is all that the peer knows."""
    kind = options.model.feedforward[0]
    tree = {"tree_activation": "gelu", "tree_balance": 0.0}
    model = PEER_MODEL | ({"feedforward": (kind,), **tree} if kind in ("dense", "tree") else {})
    recipe = {
        "optimizer": "adamw",
        "average_width": 0.0,
        "cautious_decay": False,
        "mask_rate": options.train.mask_rate[:1],
    }
    parts: dict[str, dict[str, Any]] = {"model": model, "train": recipe}
    for part, wanted in parts.items():
        for name, value in wanted.items():
            actual = getattr(getattr(options, part), name)
            kinds = name in ("mixer", "feedforward")  # one entry a layer, in whatever order
            if (set(actual) != set(value)) if kinds else actual != value:
                raise UserError(
                    f"The peer is a crammed BERT or UltraFastBERT trained with AdamW: it has {part}.{name} {value!r}, not "
                    f"{actual!r}."
                )


def variant_of(run: RunConfig, variant: Variant) -> RunConfig:
    """Return `run` with its trees computed in that way, or with dense layers for its feedforward."""
    if variant == "dense":
        return replace(run, model=replace(run.model, feedforward=("dense",), d_hidden=4 * run.model.d_model))
    return replace(run, model=replace(run.model, tree_backend=variant))


def contestants_of(options: BenchTrainOptions, runs: dict[str, RunConfig]) -> list[Contestant]:
    """List all processes: of every model ours first, then its peers, its variants, and its reference if it needs one."""
    peers = ["torch", "torch-compile"] if options.peer == "both" else [options.peer]
    script = (options.peer_python, options.peer_script or str(PEER_SCRIPT))
    ours, listed = our_program("training.ours"), []
    for preset, run in runs.items():
        of = f" {preset}" if len(runs) > 1 else ""
        listed.append(Contestant(f"ufbert{of}", preset, preset, preset, run, ours))
        if options.peer_python:
            listed += [Contestant(f"{peer}{of}", preset, preset, preset, run, script) for peer in peers]
        for variant in options.beside:
            if variant == "dense" or "tree" in run.model.feedforward:
                name = f"our {variant}{of}"
                model = name if variant == "dense" else preset
                listed.append(Contestant(name, preset, model, name, variant_of(run, variant), ours))
        if run.model.dtype == "bfloat16":
            program = script if options.peer_python else ours
            listed.append(Contestant(f"float32{of}", preset, preset, preset, run, program))
    return listed


def measure(options: BenchTrainOptions, runs: dict[str, RunConfig]) -> dict[str, Any]:
    """Train in every process, in turns; return the report.

    A process that fails or trains another model is left out. Raises UserError, before any timing, if nothing is left to
    compare.
    """
    contest = Contest(options, contestants_of(options, runs))
    with tempfile.TemporaryDirectory(prefix="ufbert-bench-") as name, ExitStack() as running:
        start_all(contest, Path(name), running)
        check_all(contest)
        ours = [c for c in contest.still_in() if c.name.startswith("ufbert")]
        if not ours or (len(contest.still_in()) < 2 and options.device == "cpu"):
            raise UserError(
                "; ".join(f"{name}: {why}" for name, why in contest.left_out.items()) + ". Nothing was timed."
            )
        time_all(contest)
        if options.profile:
            profile_ours(contest, ours)
        return contest.keep()


def start_all(contest: Contest, folder: Path, running: ExitStack) -> None:
    """Start every process and wait until all are ready: on a CPU one after the other, since each needs all cores for that.

    On a graphics card they compile at the same time. The processes end with `running`.
    """
    threads, together = usable_threads(0), contest.options.device == "gpu"
    environment = thread_variables(threads)
    if together:
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the card is shared
    for c in contest.contestants:
        if not (folder / c.job).is_dir():
            with phase(f"drawing parameters and rows for {c.job}"):
                write_job(folder / c.job, c.run, contest.options)
        command = [*c.program, str(folder / c.job), c.name, str(threads)]
        try:
            process = WorkerProcess(c.name, command, folder, environment)
        except Missing as error:
            contest.leave_out(c, error)
            continue
        contest.processes[c.name] = running.enter_context(process)
        if not together:
            wait_ready(contest, c)
    if together:
        for c in contest.contestants:
            if c.name in contest.processes:
                wait_ready(contest, c)


def wait_ready(contest: Contest, contestant: Contestant) -> None:
    """Wait until a process is ready, and leave it out if it fails or is late."""
    process = contest.processes[contestant.name]
    try:
        with phase(f"starting {contestant.name}"), process.within(contest.left(READY_BY)):
            process.wait_ready()
    except UserError as error:
        contest.leave_out(contestant, error)


def check_all(contest: Contest) -> None:
    """Leave out every process that has other parameters than ours or other losses than it should; end the references."""
    for c in (*contest.still_in(references=True), *contest.still_in()):
        process = contest.processes[c.name]
        try:
            with phase(f"checking the first losses of {c.name}"), process.within(contest.left(ROUNDS_UNTIL)):
                first = process.ask("time", "losses", name=c.name, work="step", first=0, calls=contest.options.checked)
                contest.facts[c.name] = process.ask("describe", "parameters")
            contest.losses[c.name] = first["losses"]
            contest.differences[c.name] = check_one(contest, c)
        except UserError as error:
            contest.leave_out(c, error)
        if c.is_reference:
            process.process.kill()  # what it holds of a card is free for the others


def check_one(contest: Contest, contestant: Contestant) -> float | None:
    """Return the largest relative difference of its losses from those that they are compared with, None if it has none.

    Those are the reference's, or in float32 ours. Raises UserError if it trains another model.
    """
    dtype = contestant.run.model.dtype
    first = "float32" if dtype == "bfloat16" else "ufbert"
    same = [c for c in contest.contestants if c.model == contestant.model and c.name in contest.losses]
    for c in same:
        parameters = contest.facts[c.name]["parameters"]
        if parameters != contest.facts[contestant.name]["parameters"]:
            mine = contest.facts[contestant.name]["parameters"]
            raise UserError(f"{contestant.name} has {mine:,} parameters, {c.name} {parameters:,}. It is not timed.")
    wanted = [contest.losses[c.name] for c in same if c.name.split()[0] == first and c is not contestant]
    own = contest.losses[contestant.name]
    return check_losses(contestant.name, own, wanted[0] if wanted else own, TOLERANCES[dtype]) if wanted else None


def check_losses(name: str, theirs: Sequence[float], ours: Sequence[float], tolerance: float) -> float:
    """Return the largest relative difference. Raises UserError if one is above the tolerance or not a number."""
    if len(theirs) != len(ours):
        raise UserError(f"{name} answered {len(theirs)} losses for {len(ours)} steps. It is not timed.")
    differences = [abs(their - our) / abs(our) for their, our in zip(theirs, ours, strict=True)]
    for i, difference in enumerate(differences):
        if not difference <= tolerance:
            losses = f"its loss after {i} steps is {theirs[i]:.6f}, not {ours[i]:.6f}"
            raise UserError(f"{name} does not train the same model: {losses}. It is not timed.")
    return max(differences)


def time_all(contest: Contest) -> None:
    """Time blocks of updates in turns, and keep the report after every round."""
    options, entries = contest.options, [Entry(contest.processes[c.name], c.name) for c in contest.still_in()]

    def go_on(times: Times) -> bool:
        contest.times = times
        if options.device == "gpu":
            contest.machine["card"] = (contest.machine["card"] or []) + (card_facts() or [])
        contest.keep()
        left = contest.left(ROUNDS_UNTIL)
        return left is None or left > 0

    calls = {entry.name: {"step": options.updates} for entry in entries}
    with phase(f"timing {options.blocks} blocks of {options.updates} updates"):
        contest.times = alternate(entries, calls, options.blocks, options.checked, go_on, contest.left_out)
    for c in contest.still_in():
        try:
            contest.facts[c.name] = contest.processes[c.name].ask("describe", "parameters")  # with the most memory held
        except UserError as error:
            contest.leave_out(c, error)
    for name in set(contest.left_out) & set(contest.processes):
        contest.keep_log(name)
    contest.machine["load_after"] = os.getloadavg()[0]


def profile_ours(contest: Contest, ours: Sequence[Contestant]) -> None:
    """Ask ours where their time goes. One that fails at that is only said to."""
    options = contest.options
    first = options.checked + options.updates * options.blocks
    for c in ours:
        process = contest.processes[c.name]
        try:
            with phase(f"profiling {c.name}"), process.within(contest.left()):
                contest.profiles[c.name] = process.ask("profile", "kinds", first=first, calls=options.updates)
        except UserError as error:
            contest.keep_log(c.name)
            say(f"{c.name} has no profile: {error}")

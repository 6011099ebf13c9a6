"""A whole pretraining run: corpus, tokenizer and rows, then the clock, the loop and the report."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ufbert import nn
from ufbert.config.run import known_fields
from ufbert.cost.speeds import device_peak
from ufbert.data.cache import reopen
from ufbert.data.prepared import PreparedData
from ufbert.errors import UserError
from ufbert.options.given import Given, argument_words
from ufbert.options.train import TrainOptions
from ufbert.pretrain.budget import AgreedClock, Clock, Ledger, StepClock, WallClock, parse_budget
from ufbert.pretrain.corpus import fit_vocabulary, locate_rows, prepare_rows, with_text
from ufbert.pretrain.loop import RunContext, train
from ufbert.pretrain.reference import Reference, packaged_reference, reference_from_run
from ufbert.pretrain.resolve import decided, local_platform, resolve, resumed_options, stored_options
from ufbert.pretrain.samples import write_guesses
from ufbert.pretrain.start import start_params, start_sha256
from ufbert.report.run_report import write_report
from ufbert.report.running_page import RunningPage
from ufbert.runtime import STARTED, distributed
from ufbert.runtime.claim import claimed, claimed_new, discard, new_folder, refuse_links, refuse_taken
from ufbert.runtime.console import phase, say
from ufbert.runtime.device import use_device
from ufbert.runtime.last_command import last_commands
from ufbert.runtime.machine import environment
from ufbert.runtime.metrics import (
    JsonlWriter,
    Sink,
    Spent,
    TensorBoardWriter,
    TrackioWriter,
    Writer,
    check_trackers,
)
from ufbert.runtime.run_folder import (
    COMMANDS,
    CONFIG_FILE,
    SUMMARY_FILE,
    WHEN_DONE_FILE,
    PreparedText,
    RunFile,
    Summary,
    read_run,
    read_summary,
    write_run,
    write_when_done,
)
from ufbert.runtime.signals import WATCHER
from ufbert.runtime.typed import read_lines


def pretrain(options: TrainOptions, given: Given, started: float = STARTED) -> dict[str, Any]:
    """Pretrain within a budget, from raw text to a model folder, and return the summary.

    `given` are the options that were named. `started` is the start of the process, a time.monotonic() reading: a run that is
    resumed pays from there. Raises UserError for what cannot be trained, and Interrupted when a signal has stopped the run.
    """
    parse_budget(options.budget)
    check_trackers(options.trackers)
    if options.reference:
        reference_from_run(Path(options.reference))
    if options.resume and not options.out:
        raise UserError("--resume needs --out FOLDER, the run to go on with.")
    if options.distributed and not options.out:
        raise UserError("--distributed needs --out FOLDER, one and the same for all processes.")
    if options.resume:
        return resume_run(given, Path(options.out), started)
    return new_run(options, given, started)


def new_run(named: TrainOptions, given: Given, started: float) -> dict[str, Any]:
    """Claim a folder, prepare data, start the clock, train, and return the summary."""
    folder, platform = Path(named.out), ""
    if named.distributed:
        refuse_taken(folder)
        platform = use_device(named.device, named.distributed)
        if not distributed.is_main():
            return _follow(folder, started)
    with ExitStack() as held:
        if named.out:
            held.enter_context(claimed_new(folder))
        platform = platform or use_device(named.device)
        resolved = resolve(named, given, parse_budget(named.budget), local_platform(platform))
        options, tokens = decided(named, resolved)
        if not named.out:
            if not Path("runs").exists():
                held.callback(_remove_if_empty, Path("runs"))
            folder = new_folder(Path("runs"), _stem(options))
            held.enter_context(claimed_new(folder))
        say(_headline(options))
        if resolved.start:
            say(f"  {resolved.start}")
        say(f"  scale {options.scale}: {resolved.reason}")
        if resolved.caution:
            say(f"  {resolved.caution}")
        return _prepare_and_train(options, given, tokens, folder, started, held.close)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _prepare_and_train(
    options: TrainOptions,
    given: Given,
    tokens_planned: float,
    folder: Path,
    started: float,
    release: Callable[[], None],
) -> dict[str, Any]:
    """Prepare the text, start the clock and train, in a folder that this process has claimed until `release`."""
    started_at = time.time() - (time.monotonic() - started)
    options = replace(with_text(options, tokens_planned), out=str(folder))
    located = locate_rows(options)
    init_sha256 = start_sha256(options.init_from) if options.init_from else ""
    facts = _environment(given)
    write_run(folder, _run_file(options, facts, started_at, init_sha256))
    with _ending(options, release):
        try:
            data = prepare_rows(located, tokens_planned)
        except UserError:
            discard(folder)  # there is nothing in it to go on with
            raise
        options = fit_vocabulary(options, data)
        write_run(folder, _run_file(options, facts, started_at, init_sha256, data))
        ledger, peak = Ledger(folder / "ledger.jsonl"), device_peak()[0]
        distributed.together("prepared")
        clock = _clock(options, ledger, None, started_at)
        return _train(options, data, clock, ledger, peak)


def _follow(folder: Path, started: float) -> dict[str, Any]:
    """Take part in a run, new or resumed, as another process than the first, which prepares it.

    That may take hours, longer than jax lets processes wait for each other, so this one looks for the prepared text.
    """
    while (data := _prepared(folder)) is None:
        time.sleep(1.0)
    distributed.together("prepared")
    options, ledger = replace(stored_options(folder), out=str(folder)), Ledger(folder / "ledger.jsonl")
    clock = _clock(options, ledger, started if ledger.sessions else None, read_run(folder).started_at)
    return _train(options, data, clock, ledger, 0.0)


def _prepared(folder: Path) -> PreparedData | None:
    """Return the rows that the run in `folder` uses, or None if they are not prepared (yet)."""
    used = read_run(folder).prepared_data if (folder / CONFIG_FILE).is_file() else None
    return reopen(used.folder, used.fingerprint, print) if used else None


def resume_run(given: Given, folder: Path, started: float) -> dict[str, Any]:
    """Go on with a run and return its summary. The time since `started` is charged to its budget.

    A finished run only gets the report and the last command that a kill may have kept from it.
    """
    options = resumed_options(given, folder)
    check_trackers(options.trackers)
    if options.distributed:
        use_device(options.device, options.distributed)
        if not distributed.is_main():
            return _follow(folder, started)
    with ExitStack() as held:
        held.enter_context(claimed(folder))
        refuse_links(folder)
        _name_unused_commands(options, read_run(folder))
        if (summary := _summary(folder)) is not None:
            return _finish_late(options, summary, held.close)
        if not options.distributed:
            use_device(options.device)
        with _ending(options, held.close):
            return _go_on(options, given, folder, started)


def _summary(folder: Path) -> Summary | None:
    """Read the summary of a finished run; None if it is not finished, or if that is damaged."""
    if not (folder / SUMMARY_FILE).exists():
        return None
    try:
        return read_summary(folder)
    except UserError:
        print(f"{folder / SUMMARY_FILE} is damaged; it is written anew from the last checkpoint")
        return None


def _finish_late(options: TrainOptions, summary: Summary, release: Callable[[], None]) -> dict[str, Any]:
    """Write the report and run the last command of a finished run, if a kill has prevented them. Raises UserError if not."""
    folder = Path(options.out)
    write_report(folder)  # what a kill has left may be the page of a running run
    if options.last_commands(0) and not (folder / WHEN_DONE_FILE).is_file():
        with _ending(options, release):
            return summary.to_json()
    raise UserError(f"The run in {folder} is finished; its model is in {folder / 'model'}.")


def _go_on(options: TrainOptions, given: Given, folder: Path, started: float) -> dict[str, Any]:
    """Restore the text and the clock of a run and train on, in a folder that this process has claimed."""
    ledger, before = Ledger(folder / "ledger.jsonl"), read_run(folder)
    _make_good(ledger, folder)
    say(_headline(options))
    used, data = before.prepared_data, _prepared(folder)
    if data is None:
        data = prepare_rows(locate_rows(options, used.vocab_size if used else 0), 0.0)
        if used and data.manifest.fingerprint != used.fingerprint:
            raise UserError(
                f"The text prepared for {folder} is gone and {options.corpus} now gives other rows; start a new run."
            )
    options = fit_vocabulary(options, data)
    kept = replace(options, **{name: getattr(options, name) or getattr(before, name) for name in COMMANDS})
    facts = _environment(given) | {name: v for name, v in before.environment.items() if name == "command"}
    write_run(folder, _run_file(kept, facts, before.started_at, before.init_sha256, data))
    restarts = len(ledger.sessions)
    clock = _clock(options, ledger, started if restarts else None, before.started_at)
    print(f"resuming {folder}: {ledger.spent_before:.1f} s spent by {restarts} earlier session(s); {clock.left(0)}")
    peak = device_peak()[0]
    distributed.together("prepared")
    return _train(options, data, clock, ledger, peak)


def _train(options: TrainOptions, data: PreparedData, clock: Clock, ledger: Ledger, peak: float) -> dict[str, Any]:
    folder = Path(options.out)
    context = RunContext(
        run=options.run,
        data=data,
        clock=AgreedClock(clock),
        folder=folder,
        seed=options.seed,
        restarts=len(ledger.sessions),
        identity=_identity(options, data),
        peak_flops=peak,
        reference=_reference(options),
    )
    if options.init_from:
        sha256, started_from = read_run(folder).init_sha256, read_run(folder).started_from
        start = partial(start_params, options.init_from, sha256, options.model)
        identity = {**context.identity, "start": sha256}
        context = replace(context, started_from=started_from, start=start, identity=identity)
    if not distributed.is_main():
        return train(context).to_json()
    page = RunningPage(folder)
    context = replace(context, open_writer=lambda step: _open_writer(options, step), refresh_page=page.refresh)
    passes = f"{data.manifest.train_rows:,} rows, {data.manifest.train_rows * data.manifest.seq_len / 1e6:.2f} M tokens"
    say(f"the clock starts: {options.budget} for {passes}")
    ledger.start(clock)
    try:
        summary = train(context)
    except Exception as error:
        with WATCHER.waiting(), suppress(UserError):
            write_report(folder, str(error) or type(error).__name__)
        raise
    finally:
        ledger.close()
    with phase("drawing the report"):
        write_guesses(folder, options.run, data)
        report = write_report(folder)
    say(
        f"held-out loss {summary.heldout_loss:.3f} nats; word frequency alone gives {summary.unigram_loss:.3f}, "
        f"so the model gains {summary.gain_over_unigram:.3f}"
        f"{_over_start(summary)}\n"
        f"{summary.steps:,} updates, {summary.passes:.1f} passes, {summary.spent_seconds:.1f} s spent of {options.budget}"
    )
    print(  # unbroken, to be copied
        f"report {report}\nmodel  {folder / 'model'}\n"
        f'try    ufbert fill-mask --model {folder / "model"} "Paris is the [MASK] of France."'
    )
    return summary.to_json()


def _make_good(ledger: Ledger, folder: Path) -> None:
    """Charge what the metrics say was spent if the ledger is lost or damaged. They may be ahead of it by a moment."""
    spent = max((line.spent for line in read_lines(folder / "metrics.jsonl", Spent)), default=0.0)
    lost = spent - ledger.spent_before
    if lost > 5.0 or (lost > 0.0 and not ledger.sessions):
        print(f"{ledger.path} is damaged: {lost:.1f} s that metrics.jsonl knows of are not in it; they are charged")
        ledger.charge(lost)


def _name_unused_commands(options: TrainOptions, stored: RunFile) -> None:
    """Print the last commands that a run folder names. A folder may come from anywhere, so its commands are never run."""
    for name in COMMANDS:
        if getattr(stored, name) and not getattr(options, name):
            command = f"--{name.replace('_', '-')} {getattr(stored, name)!r}"
            print(f"not run at the end: the stored {command}; give the option again to have a command run")


def _ending(options: TrainOptions, release: Callable[[], None]) -> AbstractContextManager[None]:
    """Run the user's last commands when the block has ended; of a run that has ended well, only once."""
    folder = Path(options.out)
    return last_commands(
        options.last_commands, folder, release, lambda commands: write_when_done(folder, commands, time.time())
    )


def _clock(options: TrainOptions, ledger: Ledger, started: float | None, started_at: float) -> Clock:
    budget, spent_before = parse_budget(options.budget), ledger.spent_before
    deadline = None
    if options.max_hours_wall:
        deadline = time.monotonic() + started_at + 3600.0 * options.max_hours_wall - time.time()
        if deadline <= time.monotonic():
            raise UserError(f"The run in {options.out} is past its {options.max_hours_wall:g} hours on the wall.")
    if budget.steps is not None:
        return StepClock(budget.steps, spent_before, deadline)
    assert budget.seconds is not None
    if spent_before >= budget.seconds:
        print(f"the budget of {options.budget} is spent; what is left is the last evaluation and the save")
    return WallClock(budget.seconds, spent_before, started, deadline)


def _identity(options: TrainOptions, data: PreparedData) -> dict[str, str]:
    """Return the identity of this run, which its checkpoints carry."""
    facts = {"run": known_fields(options.run), "seed": options.seed, "budget": options.budget}
    return {
        "configuration": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        "tokenizer": data.manifest.tokenizer_sha256,
        "text": data.manifest.fingerprint,
    }


def _reference(options: TrainOptions) -> Reference | None:
    if options.reference:
        return reference_from_run(Path(options.reference))
    return None if options.init_from else packaged_reference(options.config, options.scale, options.recipe)


def _open_writer(options: TrainOptions, keep_through_step: int | None) -> Writer:
    folder = Path(options.out)
    sinks: list[Sink] = [JsonlWriter(folder / "metrics.jsonl", keep_through_step)]
    if "tensorboard" in options.trackers:
        sinks.append(TensorBoardWriter(folder / "tensorboard"))
    if "trackio" in options.trackers:
        started = datetime.fromtimestamp(read_run(folder).started_at, UTC)  # tells apart folders of one name
        sinks.append(TrackioWriter(f"{folder.name} {started:%Y-%m-%d %H:%M:%S}", keep_through_step is not None))
    return Writer(sinks)


def _stem(options: TrainOptions) -> str:
    if options.init_from:
        path = Path(options.init_from.replace(":", "-"))
        name = path.absolute().parent.name if path.name == "model" else path.name  # a run's model folder is RUN/model
        return f"{name}-on-{options.budget}"
    return f"{Path(options.config).stem}-{options.scale}-{options.budget}"


def _over_start(summary: Summary) -> str:
    """Continue the last line of a run that started from a model with that model's loss."""
    if summary.started_heldout_loss is None:
        return ""
    return f"; the model that it started from gives {summary.started_heldout_loss:.3f}"


def _headline(options: TrainOptions) -> str:
    model = options.model
    backend = nn.tree_backend(model, options.run.micro_tokens) if "tree" in model.feedforward else ""
    return f"{options.origin}: {model.architecture(backend)}, {nn.count_params(model):,} parameters"


def _environment(given: Given) -> dict[str, str]:
    return environment(["ufbert", "train", *argument_words(given)], ("jax", "flax", "optax", "orbax-checkpoint"))


def _run_file(
    options: TrainOptions, facts: dict[str, str], started_at: float, init_sha256: str, data: PreparedData | None = None
) -> RunFile:
    others = ("model", "train", "data", "resume", "distributed")
    values = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in others}
    used = None
    if data is not None:
        manifest = data.manifest
        used = PreparedText(str(data.folder.absolute()), manifest.fingerprint, manifest.recipe.vocab_size)
    return RunFile(
        **values,
        run=options.run,
        started_at=started_at,
        prepared_data=used,
        init_sha256=init_sha256,
        environment=facts,
    )

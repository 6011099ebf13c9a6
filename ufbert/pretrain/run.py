"""A whole pretraining run: corpus, tokenizer and rows, then the clock, the loop and the report."""

import hashlib
import importlib.metadata
import json
import os
import platform as host
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ufbert.config.stored import to_json
from ufbert.cost.speeds import device_peak
from ufbert.data.cache import Located, finish, locate, reopen
from ufbert.data.corpora import DEMO_TOKENS, HUB_CORPUS, demo_path
from ufbert.data.prepared import PreparedData
from ufbert.errors import Interrupted, UserError
from ufbert.pretrain.budget import AgreedClock, Clock, Ledger, StepClock, WallClock, parse_budget
from ufbert.pretrain.command import (
    Resolved,
    TrainOptions,
    parse,
    resolve,
    resumed_options,
    stored_options,
)
from ufbert.pretrain.reference import Reference, packaged_reference, reference_from_run
from ufbert.runtime import distributed
from ufbert.runtime.claim import claimed, claimed_new, discard, new_folder, refuse_links, refuse_taken
from ufbert.runtime.console import LiveLine
from ufbert.runtime.device import use_device
from ufbert.runtime.metrics import JsonlWriter, Sink, Spent, TensorBoardWriter, Writer
from ufbert.runtime.run_folder import (
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
from ufbert.runtime.typed import read_lines

MAX_DEMO_PASSES = 40
MIN_CORPUS_TOKENS, MAX_CORPUS_TOKENS = 20_000_000, 2_000_000_000
"""Unless `data.max_tokens` says otherwise, a corpus is read as far as the budget is planned to see, within these bounds. The
plan rests on a measured speed, so it is rounded up, to the first times a power of two, for the next run to ask for the same."""


def pretrain_command(args: list[str], started: float) -> dict[str, Any]:
    """`ufbert train ARGS`. `started` is the process's own start, a time.monotonic() reading: a resume pays from there."""
    options = parse(args, TrainOptions())
    parse_budget(options.budget)
    if options.reference:
        reference_from_run(Path(options.reference))
    if options.resume and not options.out:
        raise UserError("--resume needs --out FOLDER, the run to go on with.")
    if options.distributed and not options.out:
        raise UserError("--distributed needs --out FOLDER, one and the same for all processes.")
    return resume_run(args, Path(options.out), started) if options.resume else new_run(args, options, started)


def new_run(args: list[str], named: TrainOptions, started: float) -> dict[str, Any]:
    """Claim a folder, prepare data, start the clock and train. `named` is what `args` say. Returns the summary."""
    folder, platform = Path(named.out), ""
    if named.distributed:
        refuse_taken(folder)
        platform = use_device(named.device, named.distributed)
        if not distributed.is_main():
            return _follow(folder, started)
    with ExitStack() as held:
        if named.out:
            held.enter_context(claimed_new(folder))
        resolved = resolve(args, platform or use_device(named.device))
        if not named.out:
            if not Path("runs").exists():
                held.callback(_remove_if_empty, Path("runs"))
            folder = new_folder(Path("runs"), _stem(resolved.options))
            held.enter_context(claimed_new(folder))
        return _prepare_and_train(resolved, folder, started, held.close)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _prepare_and_train(resolved: Resolved, folder: Path, started: float, release: Callable[[], None]) -> dict[str, Any]:
    """Train in a folder that is this process's own until `release`."""
    options, started_at = resolved.options, time.time() - (time.monotonic() - started)
    bound = options.data.max_tokens or _corpus_bound(resolved.tokens_planned)
    corpus = _choose_corpus(options, resolved.tokens_planned)
    options = replace(options, corpus=corpus, out=str(folder), data=replace(options.data, max_tokens=bound))
    print(_headline(options))
    print(f"  scale {options.scale}: {resolved.reason}")
    located = _locate(options)
    write_run(folder, _run_file(options, started_at))
    try:
        data = _prepare(located, resolved.tokens_planned)
    except UserError:
        discard(folder)  # there is nothing in it to go on with
        raise
    options = _fit_vocabulary(options, data)
    write_run(folder, _run_file(options, started_at, data))
    ledger, peak = Ledger(folder / "ledger.jsonl"), device_peak()[0]
    distributed.together("prepared")
    clock = _clock(options, ledger, None, started_at)
    return _train(options, data, clock, ledger, peak, release)


def _follow(folder: Path, started: float) -> dict[str, Any]:
    """Take part in a run, new or resumed, once process 0 has prepared it. (That may take hours, longer than jax lets
    processes wait for each other.)"""
    while (data := _prepared(folder)) is None:
        time.sleep(1.0)
    distributed.together("prepared")
    options, ledger = replace(stored_options(folder), out=str(folder)), Ledger(folder / "ledger.jsonl")
    clock = _clock(options, ledger, started if ledger.sessions else None, read_run(folder).started_at)
    return _train(options, data, clock, ledger, 0.0, lambda: None)


def _prepared(folder: Path) -> PreparedData | None:
    """The rows that the run in `folder` uses, or None if they are not there (yet)."""
    used = read_run(folder).prepared_data if (folder / CONFIG_FILE).is_file() else None
    return reopen(used.folder, used.fingerprint, print) if used else None


def resume_run(args: list[str], folder: Path, started: float) -> dict[str, Any]:
    """Go on with a run; the time since `started` is charged to its budget. A finished run only gets the report and the last
    command that a kill may have kept from it."""
    options = resumed_options(args, folder)
    if options.distributed:
        use_device(options.device, options.distributed)
        if not distributed.is_main():
            return _follow(folder, started)
    with ExitStack() as held:
        held.enter_context(claimed(folder))
        refuse_links(folder)
        _name_unused_command(options, read_run(folder).when_done)
        if (summary := _summary(folder)) is not None:
            return _finish_late(options, summary, held.close)
        if not options.distributed:
            use_device(options.device)
        return _go_on(options, folder, started, held.close)


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
    """Do for a finished run what a kill may have kept from it."""
    from ufbert.report.run_report import write_report

    folder = Path(options.out)
    if not (folder / "report.html").is_file():
        write_report(folder)
    if options.when_done and not (folder / WHEN_DONE_FILE).is_file():
        with _last_command(options, release):
            return asdict(summary)
    raise UserError(f"The run in {folder} is finished; its model is in {folder / 'model'}.")


def _go_on(options: TrainOptions, folder: Path, started: float, release: Callable[[], None]) -> dict[str, Any]:
    """Train a run further in a folder that is this process's own until `release`."""
    ledger, before = Ledger(folder / "ledger.jsonl"), read_run(folder)
    _make_good(ledger, folder)
    print(_headline(options))
    used, data = before.prepared_data, _prepared(folder)
    if data is None:
        data = _prepare(_locate(options, used.vocab_size if used else 0), 0.0)
        if used and data.manifest.fingerprint != used.fingerprint:
            raise UserError(
                f"The text prepared for {folder} is gone and {options.corpus} now gives other rows; start a new run."
            )
    options = _fit_vocabulary(options, data)
    kept = replace(options, when_done=options.when_done or before.when_done)
    write_run(folder, _run_file(kept, before.started_at, data))
    restarts = len(ledger.sessions)
    clock = _clock(options, ledger, started if restarts else None, before.started_at)
    print(f"resuming {folder}: {ledger.spent_before:.1f} s spent by {restarts} earlier session(s); {clock.left(0)}")
    peak = device_peak()[0]
    distributed.together("prepared")
    return _train(options, data, clock, ledger, peak, release)


def _train(
    options: TrainOptions, data: PreparedData, clock: Clock, ledger: Ledger, peak: float, release: Callable[[], None]
) -> dict[str, Any]:
    from ufbert.pretrain.loop import Surroundings, train
    from ufbert.report.run_report import write_report

    folder = Path(options.out)
    around = Surroundings(
        folder=folder,
        seed=options.seed,
        restarts=len(ledger.sessions),
        identity=_identity(options, data),
        peak_flops=peak,
        reference=_reference(options),
        open_writer=(lambda step: _open_writer(options, step)) if distributed.is_main() else lambda _: Writer(()),
    )
    agreed = AgreedClock(clock)
    if not distributed.is_main():
        return train(options.run, data, agreed, around)
    passes = f"{data.manifest.train_rows:,} rows, {data.manifest.train_rows * data.manifest.seq_len / 1e6:.2f} M tokens"
    print(f"the clock starts: {options.budget} for {passes}", flush=True)
    with _last_command(options, release):
        ledger.start(clock)
        try:
            summary = train(options.run, data, agreed, around)
        finally:
            ledger.close()
        report = write_report(folder)
        print(
            f"held-out loss {summary['heldout_loss']:.3f} nats; word frequency alone gives {summary['unigram_loss']:.3f}, "
            f"so the model gains {summary['gain_over_unigram']:.3f}\n"
            f"{summary['steps']:,} updates, {summary['passes']:.1f} passes, {summary['spent_seconds']:.1f} s spent"
            f" of {options.budget}\nreport {report}\nmodel  {folder / 'model'}\n"
            f'try    ufbert fill-mask --model {folder / "model"} "Paris is the [MASK] of France."'
        )
        return summary


def _make_good(ledger: Ledger, folder: Path) -> None:
    """Where the ledger is gone or damaged, charge what the metrics say was spent. They may be ahead of it by a moment."""
    spent = max((line.spent for line in read_lines(folder / "metrics.jsonl", Spent)), default=0.0)
    lost = spent - ledger.spent_before
    if lost > 5.0 or (lost > 0.0 and not ledger.sessions):
        print(f"{ledger.path} is damaged: {lost:.1f} s that metrics.jsonl knows of are not in it; they are charged")
        ledger.charge(lost)


def _name_unused_command(options: TrainOptions, stored: str) -> None:
    """A folder may come from anywhere: what it says is never run."""
    if stored and not options.when_done:
        print(f"not run at the end: the stored --when-done {stored!r}; give the option again to have a command run")


@contextmanager
def _last_command(options: TrainOptions, release: Callable[[], None]) -> Generator[None]:
    """Runs the command that was to be run at the end, once, when what is inside has ended, well or not; not if it was
    interrupted. The run folder is released before. Raises UserError if the run ended well and the command did not."""
    folder = Path(options.out)
    try:
        yield
    except (Interrupted, KeyboardInterrupt, BrokenPipeError):
        raise
    except Exception as error:
        release()
        if options.when_done:
            print(f"the run failed: {error}", file=sys.stderr, flush=True)
            _run_command(options.when_done, 2 if isinstance(error, UserError | OSError) else 1)
        raise
    if not options.when_done:
        return
    write_when_done(folder, options.when_done, time.time())  # it may end this process
    release()
    code = _run_command(options.when_done, 0)
    if code:
        raise UserError(f"The run is saved in {folder}, but `{options.when_done}` ended with status {code}.")


def _run_command(command: str, exit_code: int) -> int:
    """Run a shell command that finds the status of the run in UFBERT_EXIT_CODE, and return its own."""
    print(f"when done: {command}", flush=True)
    return subprocess.run(command, shell=True, env={**os.environ, "UFBERT_EXIT_CODE": str(exit_code)}).returncode


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
    """What a checkpoint of this run belongs to."""
    facts = json.dumps({"run": to_json(options.run), "seed": options.seed, "budget": options.budget}, sort_keys=True)
    return {
        "configuration": hashlib.sha256(facts.encode()).hexdigest(),
        "tokenizer": data.manifest.tokenizer_sha256,
        "text": data.manifest.fingerprint,
    }


def _reference(options: TrainOptions) -> Reference | None:
    if options.reference:
        return reference_from_run(Path(options.reference))
    return packaged_reference(options.config, options.scale, options.recipe)


def _open_writer(options: TrainOptions, keep_through_step: int | None) -> Writer:
    folder = Path(options.out)
    sinks: list[Sink] = [JsonlWriter(folder / "metrics.jsonl", keep_through_step)]
    if options.tensorboard:
        sinks.append(TensorBoardWriter(folder / "tensorboard"))
    return Writer(sinks)


def _choose_corpus(options: TrainOptions, tokens_planned: float) -> str:
    if options.corpus != "auto":
        return options.corpus
    passes = tokens_planned / DEMO_TOKENS
    if demo_path() is not None and passes <= MAX_DEMO_PASSES:
        print(f"corpus demo: about {passes:.1f} passes planned over the packaged Wikipedia text")
        return "demo"
    why = (
        f"{passes:.0f} passes over the packaged text would be planned, more than {MAX_DEMO_PASSES}"
        if demo_path() is not None
        else "the packaged text is not installed"
    )
    print(f"corpus {HUB_CORPUS}: {why}")
    return HUB_CORPUS


def _corpus_bound(tokens_planned: float) -> int:
    """Tokens to read of a corpus."""
    bound = MIN_CORPUS_TOKENS
    while bound < tokens_planned:
        bound *= 2
    return min(bound, MAX_CORPUS_TOKENS)


def _locate(options: TrainOptions, vocab_size: int = 0) -> Located:
    """The prepared data, or the corpus to prepare. Raises UserError if there is neither.

    `vocab_size` is what the tokenizer was asked to have, where the options already hold what it has.
    """
    given = None
    if options.tokenizer:
        from ufbert.hub.vocabulary import read_for_training

        given = read_for_training(options.tokenizer)
    return locate(options.corpus, options.data, vocab_size or options.model.vocab_size, given, options.prepared, print)


def _prepare(located: Located, tokens_planned: float) -> PreparedData:
    began, live = time.monotonic(), LiveLine(every=5.0)
    data = finish(located, live.show, live.say)
    seconds = time.monotonic() - began
    facts = data.manifest
    live.say(
        f"corpus and tokenizer ready in {seconds:.1f} s (not charged): {facts.documents:,} documents, "
        f"{facts.train_rows:,} training and {facts.heldout_rows:,} held-out rows of {facts.seq_len} tokens, "
        f"{facts.vocab_size:,} word pieces; licence: {facts.licence}"
    )
    live.say(f"[UNK] stands for {facts.unknown_share:.2%} of the text's characters")
    if tokens_planned:
        live.say(f"planned passes over the text: {tokens_planned / (facts.train_rows * facts.seq_len):.1f}")
    return data


def _fit_vocabulary(options: TrainOptions, data: PreparedData) -> TrainOptions:
    """A small corpus may give fewer word pieces than asked for; a given tokenizer has its own number."""
    if data.manifest.vocab_size == options.model.vocab_size:
        return options
    return replace(options, model=replace(options.model, vocab_size=data.manifest.vocab_size))


def _stem(options: TrainOptions) -> str:
    return f"{Path(options.config).stem}-{options.scale}-{options.budget}"


def _headline(options: TrainOptions) -> str:
    from ufbert import nn

    model = options.model
    mixers, kinds = (list(dict.fromkeys(layer[part] for layer in model.layers)) for part in (0, 1))
    tree = (
        f" {model.n_trees}x{model.tree_depth} ({nn.tree_backend(model, options.run.micro_tokens)})"
        if "tree" in kinds
        else ""
    )
    mixing = "" if mixers == ["attention"] else f"{'+'.join(mixers)} mixing, "
    return (
        f"{options.config}: {model.n_layers} layers x {model.d_model}, {mixing}{'+'.join(kinds)}{tree} feedforward, "
        f"{nn.count_params(model):,} parameters"
    )


def _run_file(options: TrainOptions, started_at: float, data: PreparedData | None = None) -> RunFile:
    others = ("model", "train", "data", "resume", "distributed")
    values = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in others}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    used = None
    if data is not None:
        facts = data.manifest
        used = PreparedText(str(data.folder.absolute()), facts.fingerprint, facts.recipe.vocab_size)
    return RunFile(
        **values,
        run=options.run,
        started_at=started_at,
        prepared_data=used,
        environment={"python": host.python_version(), "machine": host.platform(), **versions},
    )

"""`ufbert compare`: the order of events, from the models to the verdict."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ufbert.compare.jobs import TIME, TOKENS, JobRunner, first_model, glue_jobs, speed_job
from ufbert.compare.memory import here, refuse_too_large
from ufbert.compare.page import draw_comparison
from ufbert.compare.plan import show_comparison_plan
from ufbert.compare.protocol import (
    COMPARISON_FILE,
    ComparisonFile,
    comparison_of,
    models_of,
    read_comparison,
    refuse_shapes,
    same_comparison,
    write_comparison,
)
from ufbert.compare.results import Comparison
from ufbert.errors import UserError
from ufbert.glue.sources.official import choose_tasks, open_source
from ufbert.ops import native
from ufbert.options.compare import CompareOptions
from ufbert.options.given import Given
from ufbert.options.study import StudyOptions
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.resolve import Platform, local_platform
from ufbert.runtime.claim import claimed
from ufbert.runtime.console import say
from ufbert.runtime.device import use_device
from ufbert.study.cells import n_cells
from ufbert.study.run import DecidedStudy, decide_study, run_study


class Decided(NamedTuple):
    """A comparison with everything decided, and nothing run yet."""

    asked: ComparisonFile
    studies: dict[str, DecidedStudy]
    """By folder: `tokens`, and `time` if there is a budget of time."""


def compare(options: CompareOptions, given: Given) -> Comparison | None:
    """Run the cells of a comparison that are not finished, write its tables and page, and return the results.

    With `plan` nothing is run, and None is returned. Raises UserError for what cannot be compared, before anything runs; and if
    a cell failed, after the others have run. Raises Interrupted when a signal has stopped it.
    """
    folder = Path(options.out)
    if options.report:
        asked = read_comparison(folder)
        results = draw_comparison(folder, replace(asked, baseline=_named_baseline(options, asked)))
        _show(folder, results)
        return results
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the cells need the accelerator's memory
    decided = decide_comparison(options, given)
    if options.plan:
        show_comparison_plan(options, decided.asked, decided.studies)
        return None
    with claimed(folder):
        write_comparison(folder, decided.asked)
        failed = _run(options, decided)
        results = draw_comparison(folder, decided.asked)
    _show(folder, results)
    if failed:
        raise UserError(f"{len(failed)} cells failed: {'; '.join(failed)}. The same command tries again.")
    return results


def _named_baseline(options: CompareOptions, asked: ComparisonFile) -> str:
    if options.baseline and options.baseline not in asked.models:
        raise UserError(f"--baseline {options.baseline!r} is none of the models: {', '.join(asked.models)}.")
    return options.baseline or asked.baseline


def decide_comparison(options: CompareOptions, given: Given) -> Decided:
    """Decide every cell. Raises UserError for models that cannot compare, and for tasks, shapes or sizes that cannot be."""
    folder = Path(options.out)
    before = read_comparison(folder) if (folder / COMPARISON_FILE).exists() else None
    named = models_of(options, given)
    if options.budget and parse_budget(options.budget).seconds is None:
        raise UserError(f"--budget {options.budget} counts steps; a comparison takes a time, and --tokens besides.")
    if options.speed and (reason := native.unavailable()):
        raise UserError(
            f"Models are timed by the native kernels, and there are none: {reason}. --no-speed leaves that out."
        )
    tasks, one_seed = _tasks(options)
    platform = local_platform(device := use_device(options.device))
    asked = comparison_of(
        options, given, list(named), tasks, one_seed, options.tokens or (before.tokens if before else 0.0)
    )
    if before:
        same_comparison(before, asked)
    studies = _decide_studies(options, asked, named, platform)
    asked = replace(asked, tokens=studies[TOKENS].options.tokens, corpus=studies[TOKENS].protocol.corpus)
    runs = {variant.name: variant.run for variant in studies[TOKENS].variants}
    if options.speed:
        refuse_shapes(runs, options.shapes)
    refuse_too_large(runs, here(device == "cpu"), options.at_once)
    return Decided(asked, studies)


def _tasks(options: CompareOptions) -> tuple[list[str], list[str]]:
    """Return the names of the tasks, and of those with one seed. Raises UserError for a task that the source lacks."""
    if not options.tasks:
        return [], []
    source = open_source(options.source)
    tasks = [task.name for task in choose_tasks(source, options.tasks)[0]]
    one_seed = [task.name for task in choose_tasks(source, options.one_seed_tasks)[0]] if options.one_seed_tasks else []
    if unknown := [name for name in one_seed if name not in tasks]:
        raise UserError(f"--one-seed-tasks names {unknown[0]}, which is none of --tasks.")
    return tasks, one_seed


def _decide_studies(
    options: CompareOptions, asked: ComparisonFile, named: Mapping[str, Given], platform: Platform
) -> dict[str, DecidedStudy]:
    """Decide both studies, on one text."""
    studies: dict[str, DecidedStudy] = {}
    if options.budget:
        studies[TIME] = _decide_study(options, asked, named, platform, TIME, budget=options.budget)
    tokens = asked.tokens or float(f"{studies[TIME].variants[0].tokens:.1e}")
    if not tokens:
        raise UserError("How many tokens are equal tokens is not known here; give --tokens.")
    studies = {TOKENS: _decide_study(options, asked, named, platform, TOKENS, tokens=tokens), **studies}
    # Both read one text, so that held-out rows and tokenizer are the same: as much of it as the larger one asks for.
    begun = [study.protocol for study in studies.values() if study.protocol.fingerprint]
    whole = begun[0] if begun else max((study.protocol for study in studies.values()), key=lambda p: p.max_tokens)
    for axis, study in studies.items():
        protocol = replace(study.protocol, max_tokens=whole.max_tokens, corpus=whole.corpus)
        studies[axis] = study._replace(protocol=protocol, options=replace(study.options, corpus=whole.corpus))
    return studies


def _decide_study(
    options: CompareOptions, asked: ComparisonFile, named: Mapping[str, Given], platform: Platform, axis: str,
    tokens: float = 0.0, budget: str = "",
) -> DecidedStudy:  # fmt: skip
    own = StudyOptions(
        out=str(Path(options.out) / axis), tokens=tokens, budget=budget, seeds=options.seeds, corpus=options.corpus,
        heldout=options.heldout, tokenizer=options.tokenizer, prepared=options.prepared, at_once=options.at_once,
        device=options.device, baseline=asked.baseline,
    )  # fmt: skip
    return decide_study(own, named, platform, asked.first_seed_only)


def _run(options: CompareOptions, decided: Decided) -> list[str]:
    """Run all that is open, in order; return name and reason of each cell that failed."""
    folder, (asked, studies), failed = Path(options.out), decided, []
    for axis, study in studies.items():
        say(f"pretraining for equal {axis}: {n_cells(study.protocol)} cells")
        reasons, _ = run_study(study)
        failed += [f"{axis}: {reason}" for reason in reasons]
        draw_comparison(folder, asked)
    protocol = studies[TOKENS].protocol
    models = {name: model for name in asked.models if (model := first_model(protocol, folder / TOKENS, name))}
    if asked.tasks:
        jobs = glue_jobs(folder, asked, models, options.device)
        say(f"fine-tuning: {len(jobs)} cells")
        runner = JobRunner(jobs, options.at_once)
        runner.run_all("fine-tuning")
        failed += runner.failed
        draw_comparison(folder, asked)
    if asked.speed and models:
        say("timing the models")
        runner = JobRunner([speed_job(folder, asked, models)], 1)
        runner.run_all("timing the models")
        failed += runner.failed
    return failed


def _show(folder: Path, results: Comparison) -> None:
    """Print the verdict, and where the rest is."""
    print("\n".join(results.verdict))
    print(f"\nresults {folder / 'report.html'}, {folder / 'results.md'}, {folder / 'results.json'}")

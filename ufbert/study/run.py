"""`ufbert study`: the order of events, from the variants to the tables."""

import os
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from ufbert.bench.harness import commit
from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.options.given import Given, argument_words
from ufbert.options.study import StudyOptions
from ufbert.options.train import TextOptions
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.corpus import choose_corpus, corpus_bound, locate_rows, prepare_rows
from ufbert.pretrain.resolve import Platform, local_platform
from ufbert.runtime.claim import claimed
from ufbert.runtime.console import phase, say
from ufbert.runtime.device import use_device
from ufbert.study.cells import (
    STUDY_FILE,
    StudyFile,
    VariantFile,
    finished_cells,
    n_cells,
    read_cell,
    read_study,
    same_study,
    summary_of,
    write_study,
)  # fmt: skip
from ufbert.study.children import Runner
from ufbert.study.report import show_results, write_results
from ufbert.study.variants import Variant, decide, expected_seconds, refuse_unequal, variants_of


def study(options: StudyOptions, given: Given) -> None:
    """Run the cells of a study that are not finished, and write its tables and page after each.

    Raises UserError for what cannot be compared, before anything runs; and if a cell failed, after the others have run.
    Raises Interrupted when a signal has stopped the study.
    """
    folder = Path(options.out)
    if options.report:
        stored = read_study(folder)
        asked = replace(stored, **_named_ends(options, stored))
        return show_results(write_results(folder, asked))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the cells need the accelerator's memory
    platform = local_platform(use_device(options.device))
    asked_options = variants_of(options, given)
    before = read_study(folder) if (folder / STUDY_FILE).exists() else None
    batches = {name: variant.batch_rows for name, variant in before.variants.items()} if before else {}
    variants = [decide(options, name, asked, platform, batches.get(name, 0)) for name, asked in asked_options.items()]
    refuse_unequal(variants)
    tokens = max(variant.tokens for variant in variants)
    options = replace(
        options, corpus=before.corpus if before and options.corpus == "auto" else choose_corpus(options, tokens)
    )
    bound = variants[0].run.data.max_tokens or corpus_bound(tokens)
    protocol = _protocol(options, variants, bound)
    if before:
        protocol = same_study(before, protocol)
    if options.plan:
        return _show_plan(options, protocol, variants, platform)
    with claimed(folder):
        protocol = replace(protocol, fingerprint=_prepare_text(options, protocol, variants[0]))
        write_study(folder, protocol)
        _name_other_commits(folder, protocol)
        runner = Runner(options, protocol, variants)
        runner.run()
        with phase("drawing the report"):
            results = write_results(folder, protocol)
        show_results(results)
    if failed := runner.failed:
        raise UserError(
            f"{len(failed)} of {n_cells(protocol)} cells failed: {'; '.join(failed)}. The same command tries again."
        )


def _named_ends(options: StudyOptions, stored: StudyFile) -> dict[str, str]:
    """Return the baseline and the ends of the gap that a report is to have. Raises UserError for one that is no variant."""
    named = {name: getattr(options, name) for name in ("baseline", "gap_from", "gap_to") if getattr(options, name)}
    for name, value in named.items():
        if value not in stored.variants:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {shown(value)} is no variant of the study; it has {', '.join(stored.variants)}.")
    return named


def _protocol(options: StudyOptions, variants: list[Variant], bound: int) -> StudyFile:
    files = {v.name: VariantFile(argument_words(v.asked), v.run.train.batch_rows) for v in variants}
    return StudyFile(
        corpus=options.corpus, heldout=options.heldout, tokenizer=options.tokenizer, budget=options.budget,
        tokens=options.tokens, max_tokens=bound, variants=files, seeds=list(options.seed_list), rates=list(options.rate_list),
        baseline=options.baseline or variants[0].name, gap_from=options.gap_from, gap_to=options.gap_to,
    )  # fmt: skip


def _prepare_text(options: StudyOptions, protocol: StudyFile, first: Variant) -> str:
    """Prepare the text that all cells read, and return its fingerprint. Raises UserError if it is not the study's any more."""
    data = replace(first.run.data, max_tokens=protocol.max_tokens)
    text = TextOptions(
        model=first.run.model, train=first.run.train, data=data, corpus=protocol.corpus, heldout=protocol.heldout,
        tokenizer=protocol.tokenizer, prepared=options.prepared, init_from=options.init_from,
    )  # fmt: skip
    fingerprint = prepare_rows(locate_rows(text), first.tokens).manifest.fingerprint
    if protocol.fingerprint not in ("", fingerprint):
        raise UserError(
            f"{protocol.corpus} now gives other rows than the study in {options.out} began with; take another --out."
        )
    return fingerprint


def _name_other_commits(folder: Path, protocol: StudyFile) -> None:
    """Say which finished cells another commit ran. They are kept."""
    now, others = commit(), dict[str, list[str]]()
    for cell in finished_cells(protocol, folder):
        stored = read_cell(cell.folder(folder))
        if stored and stored.sessions and stored.sessions[-1].commit != now:
            others.setdefault(stored.sessions[-1].commit, []).append(cell.name)
    for other, cells in others.items():
        say(f"note: {', '.join(cells)} ran at commit {other}, not {now}; delete a cell's folder to run it again")


def _show_plan(options: StudyOptions, protocol: StudyFile, variants: list[Variant], platform: Platform) -> None:
    """Print the cells, and the hours of those still open: as the budget says, as finished cells took, or else as expected."""
    folder, cells, hours = Path(options.out), n_cells(protocol) // len(variants), 0.0
    finished = finished_cells(protocol, folder)
    for variant in variants:
        summaries = [s for cell in finished if cell.variant == variant.name and (s := summary_of(cell.folder(folder)))]
        source, seconds = "as given", parse_budget(variant.budget).seconds
        if seconds is None and summaries:
            source, seconds = "as measured", fmean(summary.spent_seconds for summary in summaries)
        elif seconds is None:
            source, seconds = "expected", expected_seconds(variant, platform)
        hours += (cells - len(summaries)) * seconds / 3600
        say(
            f"{variant.name}: {cells} cell(s), {len(summaries)} finished; each {variant.budget}, {seconds / 60:,.1f} min "
            f"({source})" + (f", {variant.tokens / 1e6:,.2f} M tokens" if variant.tokens else "")
        )
    if parse_budget(variants[0].budget).seconds:
        hours /= options.at_once  # cells of a budget of tokens share the cores, so that they gain little
    say(f"{n_cells(protocol)} cells, {len(finished)} finished; {hours:,.2f} hours for the rest. Nothing was run.")

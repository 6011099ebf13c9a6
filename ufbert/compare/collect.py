"""From the folders of a comparison to its results: nothing is measured here."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ufbert.bench.report import BUSY
from ufbert.compare.jobs import (
    GLUE,
    SPEED,
    TIME,
    TOKENS,
    glue_of,
    read_job,
    speed_of,
    study_cells,
)
from ufbert.compare.protocol import ComparisonFile
from ufbert.compare.results import CellRecord, Comparison, CurvePoint, GlueScore, Model, Pretraining, Spread, spread_of
from ufbert.compare.verdict import chance_beyond, verdict_of
from ufbert.config import ModelConfig
from ufbert.cost.flops import forward_flops_per_token, neurons
from ufbert.glue.compare import Difference, Sweep, compared
from ufbert.runtime.metrics import EvaluationRecord
from ufbert.runtime.run_folder import read_run
from ufbert.runtime.typed import read_lines
from ufbert.study.cells import STUDY_FILE, StudyFile, counted_cells, read_cell, read_study, summary_of
from ufbert.study.processes import Session
from ufbert.study.results import Row, results_of

OF_FEEDFORWARDS = ("feedforward", "d_hidden", "hidden_from", "n_trees", "master_leaf", "n_experts", "capacity_factor")
"""Fields in which a model and its control may differ, and those that begin with tree_, leaf_ and router_."""


class Study(NamedTuple):
    """One of the two studies, as far as it has come."""

    folder: Path
    file: StudyFile
    rows: dict[str, Row]
    """By model, those that have a finished cell."""


def comparison_results(folder: Path, asked: ComparisonFile) -> Comparison:
    """Read all that is finished of a comparison. Raises UserError if a file of a finished cell is damaged."""
    studies = {axis: study for axis in (TOKENS, TIME) if (study := _study(folder / axis, asked)) is not None}
    configs = _configs(studies, asked)
    models = [_model(name, config, folder, asked, studies, configs) for name, config in configs.items()]
    times = speed_of(folder / SPEED) if asked.speed else None
    records, failed, waiting = _cells(folder, asked, studies)
    if times:
        failed |= {f"{SPEED}: {name}": reason for name, reason in times.refused.items()}
    results = Comparison(asked, models, times, records, failed, waiting, notes=[], unigram_loss=_unigram_loss(studies))
    notes = notes_of(results)
    if len({study.file.fingerprint for study in studies.values() if study.file.fingerprint}) > 1:
        notes.append("NOT ONE TEXT: equal tokens and equal time were trained on different prepared rows.")
    results = replace(results, notes=notes)
    return replace(results, verdict=verdict_of(results))


def _unigram_loss(studies: Mapping[str, Study]) -> float | None:
    """Return the held-out loss of guessing by word frequency, which is that of the text and so of all models."""
    for study in studies.values():
        for name in study.rows:
            summary = summary_of(counted_cells(study.file, study.folder, name)[0].folder(study.folder))
            if summary is not None:
                return summary.unigram_loss
    return None


def _study(folder: Path, asked: ComparisonFile) -> Study | None:
    if not (folder / STUDY_FILE).exists():
        return None
    file = read_study(folder)
    rows = {row.variant: row for row in results_of(folder, file).rows if row.variant in asked.models}
    return Study(folder, file, rows)


def _configs(studies: Mapping[str, Study], asked: ComparisonFile) -> dict[str, ModelConfig]:
    """Return the architecture of every model that has a finished cell."""
    configs = {}
    for name in asked.models:
        for study in studies.values():
            if name in study.rows and name not in configs:
                cell = counted_cells(study.file, study.folder, name)[0]
                configs[name] = read_run(cell.folder(study.folder) / "run").run.model
    return configs


def _model(
    name: str, config: ModelConfig, folder: Path, asked: ComparisonFile, studies: Mapping[str, Study],
    configs: Mapping[str, ModelConfig],
) -> Model:  # fmt: skip
    rows = {axis: study.rows[name] for axis, study in studies.items() if name in study.rows}
    any_row = next(iter(rows.values()))
    control = control_of(config, {other: c for other, c in configs.items() if other != name})
    trained = {axis: _pretraining(studies[axis], row, asked.baseline, control) for axis, row in rows.items()}
    used, all_neurons = neurons(config)
    main = studies[next(iter(rows))]
    place = counted_cells(main.file, main.folder, name)[0].folder(main.folder)
    summary = summary_of(place)
    assert summary is not None
    return Model(
        name=name, options=any_row.options, architecture=summary.architecture or config.architecture(),
        parameters=any_row.parameters, neurons_used=used, neurons=all_neurons, train_flops=any_row.flops_per_token,
        infer_flops=forward_flops_per_token(config, 128, masked_trees=False, training=False), control=control,
        random_twin=random_twin_of(config, configs), by_tokens=trained.get(TOKENS), by_time=trained.get(TIME),
        usage=_usage(place), memory=summary.memory_bytes or 0, glue=_glue(folder, asked, name),
        hours=sum(session.seconds or 0.0 for session in _sessions_of(folder, asked, studies, name)) / 3600, config=config,
    )  # fmt: skip


def control_of(config: ModelConfig, others: Mapping[str, ModelConfig]) -> str:
    """Return the model with as many plain neurons as a token uses of this one, and equal otherwise; "" if there is none."""
    used, all_neurons = neurons(config)
    if used == all_neurons:
        return ""
    for name, other in others.items():
        is_dense = all(kind == "dense" for _, kind in other.layers)
        if is_dense and other.d_hidden == used and equal_but_feedforward(config, other):
            return name
    return ""


def random_twin_of(config: ModelConfig, others: Mapping[str, ModelConfig]) -> str:
    """Return the model whose trees are those of this one with random decisions; "" if there is none."""
    twin = replace(config, feedforward=tuple("fixed_tree" if kind == "tree" else kind for kind in config.feedforward))
    return next((name for name, other in others.items() if other == twin != config), "")


def equal_but_feedforward(a: ModelConfig, b: ModelConfig) -> bool:
    """Tell whether two architectures differ in nothing but their feedforwards."""
    names = [field.name for field in fields(ModelConfig)]
    kept = [n for n in names if n not in OF_FEEDFORWARDS and not n.startswith(("tree_", "leaf_", "router_"))]
    return all(getattr(a, name) == getattr(b, name) for name in kept)


def _pretraining(study: Study, row: Row, baseline: str, control: str) -> Pretraining:
    curve = [CurvePoint(p.tokens, p.seconds, p.tokens * row.flops_per_token, p.loss, p.accuracy) for p in row.curve]
    return Pretraining(
        losses=row.losses,
        loss=spread_of(list(row.losses.values())),
        difference=None if row.variant == baseline else _paired(row, study.rows.get(baseline)),
        to_control=_paired(row, study.rows.get(control)),
        accuracy=curve[-1].accuracy if curve else 0.0,
        tokens=row.tokens,
        seconds=row.seconds,
        flops=row.tokens * row.flops_per_token,
        curve=curve,
    )


def _paired(row: Row, other: Row | None) -> Spread | None:
    differences = [] if other is None else [row.losses[s] - other.losses[s] for s in row.losses if s in other.losses]
    return spread_of(differences) if differences else None


def _usage(place: Path) -> dict[str, float]:
    """Return what was in use at the last evaluation of a cell: means over layers, and dead subtrees in all."""
    evaluations = list(read_lines(place / "run" / "metrics.jsonl", EvaluationRecord))
    by_layer = (evaluations[-1].usage if evaluations else None) or {}
    names = dict.fromkeys(name for shares in by_layer.values() for name in shares)
    usage = {}
    for name in names:
        values = [float(value) for shares in by_layer.values() if (value := shares.get(name)) is not None]
        if values:
            usage[name] = sum(values) if name == "dead_subtrees" else fmean(values)
    return usage


def _glue(folder: Path, asked: ComparisonFile, name: str) -> list[GlueScore]:
    """Return a model's scores on every dev split of every finished task, with their differences to the baseline's."""
    scores = []
    for task in asked.tasks:
        place, base_place = folder / GLUE / name / task, folder / GLUE / asked.baseline / task
        results, base = glue_of(place), glue_of(base_place)
        if results is None:
            continue
        for key, result in results.tasks.items():
            metric = result.metrics[0]
            for split, dev in result.dev.items():
                score = GlueScore(
                    task=key, split=split, title=result.title(split), metric=metric, rows=dev.rows,
                    seeds={seed: values[metric] for seed, values in dev.seeds.items()}, median=dev.median[metric],
                    majority=dev.majority[metric],
                )  # fmt: skip
                if base is not None and name != asked.baseline:
                    ends = Sweep(base_place / "sweep", base), Sweep(place / "sweep", results)
                    score = _with_difference(score, compared(*ends, key, split, metric))
                scores.append(score)
    return scores


def _with_difference(score: GlueScore, found: Difference | str | None) -> GlueScore:
    if not isinstance(found, Difference):
        return score
    if not found.has_interval:
        return replace(score, difference=found.value)
    return replace(score, difference=found.value, low=found.low, high=found.high, of_rows=found.of_rows)


def _sessions_of(folder: Path, asked: ComparisonFile, studies: Mapping[str, Study], name: str) -> list[Session]:
    """Return the processes that worked on a model's cells."""
    sessions = []
    for study in studies.values():
        for cell in study_cells(study.file):
            if cell.variant == name and (stored := read_cell(cell.folder(study.folder))):
                sessions += stored.sessions
    for task in asked.tasks:
        if job := read_job(folder / GLUE / name / task):
            sessions += job.sessions
    return sessions


def _cells(
    folder: Path, asked: ComparisonFile, studies: Mapping[str, Study]
) -> tuple[list[CellRecord], dict[str, str], list[str]]:
    """Return how every cell was measured, the reasons of those that failed, and the names of those that are open."""
    records, failed, waiting = [], dict[str, str](), []

    def add(name: str, seeds: list[int], sessions: Sequence[Session], reason: str, is_done: bool) -> None:
        if sessions:
            records.append(_record(name, seeds, sessions))
        if not is_done and reason:
            failed[name] = reason
        elif not is_done:
            waiting.append(name)

    for axis in [TOKENS, *([TIME] if asked.budget else [])]:
        study = studies.get(axis)
        if study is None:
            waiting += [f"{axis}: {name}" for name in asked.models]
            continue
        for cell in study_cells(study.file):
            place = cell.folder(study.folder)
            stored, is_done = read_cell(place), summary_of(place) is not None
            if cell.variant in asked.models:
                sessions, reason = (stored.sessions, stored.failed) if stored else ([], "")
                add(f"{axis}: {cell.name}", [cell.seed], sessions, reason, is_done)
    for task in asked.tasks:
        for name in asked.models:
            place = folder / GLUE / name / task
            job, seeds = read_job(place), asked.seeds_of_task(task)
            is_done = glue_of(place) is not None
            add(f"{GLUE}: {name} on {task}", seeds, job.sessions if job else [], job.failed if job else "", is_done)
    if asked.speed:
        job, times = read_job(folder / SPEED), speed_of(folder / SPEED)
        reason = job.failed if job and times is None else ""
        add(SPEED, [], job.sessions[-1:] if job else [], reason, times is not None)
    return records, failed, waiting


def _record(name: str, seeds: list[int], sessions: Sequence[Session]) -> CellRecord:
    last, others = sessions[-1], [s.other_work for s in sessions if s.other_work is not None]
    return CellRecord(
        name=name, seeds=seeds, command=last.command, commits=sorted({s.commit for s in sessions}), cpu=last.cpu,
        load_before=last.load_before, load_after=last.load_after, seconds=sum(s.seconds or 0.0 for s in sessions),
        other_work=max(others, default=None), beside_other_work=any(s.beside_other_work for s in sessions),
        restarts=len(sessions) - 1,
    )  # fmt: skip


def notes_of(results: Comparison) -> list[str]:
    """Say in sentences how the numbers were measured."""
    asked, notes = results.asked, []
    counts = sorted({t.loss.n for m in results.models for t in (m.by_tokens, m.by_time) if t})
    if counts:
        spread = "one seed has no spread" if counts == [1] else "± is the standard deviation over seeds (n - 1)"
        notes.append(f"Pretraining has {' or '.join(map(str, counts))} seed(s) of {len(asked.seeds)}; {spread}.")
        if counts[-1] > 1:
            notes.append(
                f"Of differences that mean nothing, {chance_beyond(counts[-1]):.0%} lie beyond twice the standard error of "
                f"{counts[-1]} seeds."
            )
    if asked.tasks:
        notes.append(
            f"GLUE is of the models of seed {asked.seeds[0]} and equal tokens: the spread over pretraining seeds is not in it."
        )
    commits, cpus = {commit for cell in results.cells for commit in cell.commits}, {cell.cpu for cell in results.cells}
    for what, values in (("COMMIT", commits), ("PROCESSOR", cpus)):
        if len(values) > 1:
            notes.append(f"NOT ONE {what}: {', '.join(sorted(values))}.")
    if beside := [cell.name for cell in results.cells if cell.beside_other_work]:
        share = (
            "All cells were"
            if len(beside) == len(results.cells)
            else f"{len(beside)} of {len(results.cells)} cells were"
        )
        notes.append(
            f"{share} measured beside other work, so that their seconds, and what was trained for equal time, say little: "
            f"{', '.join(beside)}."
        )
    if results.speed and results.speed.machine["load"] > BUSY:
        notes.append(
            f"OTHER WORK RAN HERE while the models were timed (load {results.speed.machine['load']:.1f} at the start): ratios "
            "are better than times then, but do not quote them."
        )
    return notes

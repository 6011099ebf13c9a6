"""A comparison's folder without the hours: what its cells leave, written by hand."""

import json
from dataclasses import replace
from pathlib import Path

from conftest import write_sweep

from ufbert.bench.encoder_models import Loaded, ModelTimes, ShapeTimes, Timed
from ufbert.compare.jobs import JobFile, write_job
from ufbert.compare.protocol import ComparisonFile
from ufbert.config.presets import load_preset, scaled
from ufbert.runtime.files import write_json
from ufbert.runtime.run_folder import RunFile, Summary, write_run, write_summary
from ufbert.study.cells import Cell, CellFile, StudyFile, VariantFile, write_cell, write_study
from ufbert.study.processes import Session

SESSION = Session("ufbert train", "c0ffee", "a <CPU>", 2, 1, began=1.0, load_before=0.5, load_after=0.6, seconds=360.0)
NAMES = ["ultrafastbert_1x11", "path_dense_1x11", "crammed_bert"]
ASKED = ComparisonFile(
    models=NAMES, scale="tiny", recipe="crammed", corpus="demo", heldout="", budget="20m", tokens=1e7, seeds=[0, 1],
    baseline="crammed_bert", tasks=["rte"], source="dir:glue", glue_seeds=[0, 1, 2], shapes=["1x128"], price=2.0,
    command="ufbert compare a b c",
)  # fmt: skip


def finish_run(run: Path, preset: str, loss: float) -> None:
    """Write what a finished run of a preset at the tiny scale leaves."""
    config = scaled(load_preset(preset), "tiny")
    write_run(run, RunFile("5m", preset, "demo", "tiny", config, started_at=1.0))
    usage = {
        "layer_00": {"leaves_in_use": 0.5, "dead_subtrees": 3.0},
        "layer_01": {"leaves_in_use": 0.7, "dead_subtrees": 4.0},
    }
    evaluation = {"heldout_accuracy": 0.1, "fraction": 0.1, "memory_bytes": 1, "skipped_updates": 0, "usage": usage}
    lines = [
        {"step": n, "heldout_loss": loss + 3 - n, "tokens": 1_250_000 * 2**n, "spent": 10.0 * n, **evaluation}
        for n in range(4)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = {"tokens": 10_000_000, "parameters": 1234, "flops_per_token": 5e6, "memory_bytes": 2_000_000_000}
    write_summary(run, Summary(loss, 9.0, 40.0, **size, architecture=config.model.architecture()))


def finish(study: Path, name: str, seed: int, loss: float, session: Session = SESSION, preset: str = "") -> None:
    """Write what a finished cell of a study leaves."""
    cell = Cell(name, None, seed)
    place = cell.folder(study)
    write_cell(place, CellFile(name, None, seed, ["--a=1"], [session]))
    finish_run(place / "run", preset or name, loss)


def write_study_of(folder: Path, asked: ComparisonFile, axis: str, losses: dict[str, list[float]]) -> None:
    """Write one of the two studies, with the losses of each model by seed."""
    variants = {name: VariantFile([f"--config={name}"], 8) for name in asked.models}
    budget, tokens = (asked.budget, 0.0) if axis == "time" else ("", asked.tokens)
    file = StudyFile(
        corpus="demo", budget=budget, tokens=tokens, max_tokens=1000, variants=variants, seeds=asked.seeds, rates=[],
        baseline=asked.baseline, first_only=asked.first_seed_only, fingerprint="ab",
    )  # fmt: skip
    write_study(folder / axis, file)
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            finish(folder / axis, name, seed, loss)


def write_glue(folder: Path, name: str, task: str, skill: float) -> None:
    """Write what a finished sweep of a task leaves."""
    place = folder / "glue" / name / task
    write_sweep(place / "sweep", tasks=(task,), skill=skill)
    write_job(place, JobFile(["finetune"], [replace(SESSION, command="ufbert finetune")]))


def times_of(names: list[str], baseline: str, **refused: str) -> ModelTimes:
    """Times of models, each a millisecond slower than the one before."""
    timed = [
        Timed(
            name, kind, ms * 1e-3, ms * 0.9e-3, ms * 1.1e-3, 128e3 / ms, *(() if name == baseline else (1.5, 1.4, 1.6))
        )
        for ms, name in enumerate(names, start=1)
        for kind in ("float32", "int8")
    ]
    machine = {"cpu": "a <CPU>", "cores": 2, "load": 0.1, "load_after": 0.2}
    entries = [f"{name}-{kind}" for name in names for kind in ("float32", "int8")]
    return ModelTimes(
        machine, {"used_threads": 2}, "jax", baseline, {name: name for name in names},
        {entry: {"relative": 1e-6, "leaves": 1.0} for entry in entries}, [ShapeTimes("1x128", 1, 128, timed)],
        {entry: Loaded(0.1, 1000, 2000) for entry in entries}, refused,
    )  # fmt: skip


def write_times(folder: Path, times: ModelTimes) -> None:
    """Write what the timing leaves."""
    from dataclasses import asdict

    write_json(folder / "speed" / "speed.json", asdict(times))
    write_job(folder / "speed", JobFile(["bench", "encoder"], [replace(SESSION, command="ufbert bench encoder")]))


def make(folder: Path, asked: ComparisonFile = ASKED) -> None:
    """Write a whole comparison: after equal tokens the tree is a little worse than its control, and dense is best."""
    write_study_of(
        folder, asked, "tokens",
        {"ultrafastbert_1x11": [3.20, 3.22], "path_dense_1x11": [3.10, 3.125], "crammed_bert": [2.9, 2.95]},
    )  # fmt: skip
    write_study_of(
        folder, asked, "time",
        {"ultrafastbert_1x11": [3.50, 3.51], "path_dense_1x11": [3.40, 3.52], "crammed_bert": [3.3, 3.35]},
    )  # fmt: skip
    for name, skill in zip(asked.models, (0.6, 0.61, 0.8), strict=True):
        write_glue(folder, name, "rte", skill)
    write_times(folder, times_of(asked.models, asked.baseline))

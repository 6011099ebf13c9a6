"""Files from strangers and broken runs: every reader gives a value, or a sentence that names the file and the field.

READERS has a row for each format. Its valid file is damaged as its types suggest: each field in turn is absent, null, of
another kind, not finite, out of range, of 5,000 digits or nested 100,000 deep; the file is cut at every tenth byte, is not
UTF-8, is empty, is a folder or a pipe.
"""

import copy
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import pytest
from conftest import write_sweep

from ufbert.compare.jobs import JobFile, read_job
from ufbert.compare.protocol import ComparisonFile, read_comparison
from ufbert.compare.results import Comparison
from ufbert.compare.results import read_results as read_comparison_results
from ufbert.config import FinetuneConfig, ModelConfig
from ufbert.config.presets import preset_folder
from ufbert.data.prepared import Manifest, read_manifest
from ufbert.errors import UserError
from ufbert.glue import sweep
from ufbert.glue.results import GlueResults, read_results
from ufbert.glue.sources.custom import CustomTask, read_task_file
from ufbert.pretrain import budget, checkpoint
from ufbert.pretrain.reference import Point
from ufbert.runtime import claim
from ufbert.runtime.metrics import EvaluationRecord, StepRecord
from ufbert.runtime.run_folder import RunFile, Summary, WhenDone, read_run, read_summary, write_when_done
from ufbert.runtime.typed import read_lines, read_typed
from ufbert.study.cells import CellFile, StudyFile, read_cell, read_study
from ufbert.study.variants import VariantsFile, read_variants

BEFORE = Path(__file__).parent / "fixtures" / "before_house"
SECONDS, BYTES = 600, 2 * 2**30
"""Nets: for all inputs of a reader, on a busy machine; and for the memory that they may add."""
CPU_SECONDS = 20
"""Bound of one input, in seconds of this process on a processor: ten times what is promised, as slow machines run this too."""


class Reader(NamedTuple):
    """A format, and how it is read."""

    name: str
    file: str
    """Name of the file in its folder, a path with "/"."""
    make: Callable[[Path], Any]
    """Writes a valid file, and what must lie around it, into a folder."""
    read: Callable[[Path], Any]
    """Reads the folder."""
    kind: Any
    """The type of the file's content: of the whole file, or of a line."""


def stored(name: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.copytree(BEFORE / name, folder, dirs_exist_ok=True)


def written(file: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(json.dumps(value))


def first_line(of: str, having: str) -> Callable[[Path], Any]:
    """The first line of a stored run's file that has a field."""
    lines = (BEFORE / "run" / of).read_text().splitlines()
    return lambda folder: (folder / of).write_text(next(line for line in lines if f'"{having}"' in line) + "\n")


SUMMARY = {
    "heldout_loss": 2.39, "unigram_loss": 2.47, "gain_over_unigram": 0.08, "steps": 60, "tokens": 15360, "passes": 3.0,
    "spent_seconds": 63.15, "budget_seconds": None, "parameters": 4383, "memory_bytes": 636985344, "device": "cpu",
}  # fmt: skip
METADATA = "checkpoints/50/_CHECKPOINT_METADATA"
SIZES = "checkpoints/50/sizes.json"

TASK = {
    "name": "mine", "train": "a.tsv", "dev": "b.tsv", "test": "c.tsv", "text": "a", "pair": "b", "label": "c",
    "labels": ["no", "yes"], "label_names": ["No", "Yes"], "metrics": ["accuracy"], "regression": None,
}  # fmt: skip

STUDY = {
    "corpus": "demo", "heldout": "", "tokenizer": "", "budget": "5m", "tokens": 0.0, "max_tokens": 20000000,
    "variants": {"trees": {"asked": ["--scale=mini"], "batch_rows": 32}}, "seeds": [0, 1], "rates": [0.003],
    "baseline": "trees", "gap_from": "", "gap_to": "trees", "fingerprint": "ab", "format_version": 1,
}  # fmt: skip
CELL = {
    "variant": "trees", "rate": 0.003, "seed": 0, "words": ["--scale=mini"], "failed": "", "sessions": [{
        "command": "ufbert train", "commit": "0123", "cpu": "AMD EPYC", "cores": 2, "at_once": 1, "began": 1.5,
        "load_before": 0.5, "load_after": 0.5, "seconds": 3.5, "other_work": 0.1, "exit_code": 0,
    }],
}  # fmt: skip
JOB = {"words": ["finetune", "--tasks=rte"], "sessions": CELL["sessions"], "failed": ""}
COMPARISON = {
    "models": ["trees", "dense"], "scale": "mini", "recipe": "modern", "corpus": "demo", "heldout": "", "budget": "20m",
    "tokens": 1e7, "seeds": [0, 1], "baseline": "dense", "command": "ufbert compare", "first_seed_only": ["trees"],
    "tasks": ["rte"], "source": "dir:glue", "glue_seeds": [0], "one_seed_tasks": ["rte"], "protocol": "small", "speed": True,
    "shapes": ["1x128"], "blocks": 9, "seconds_a_block": 0.3, "price": 1.5, "format_version": 1,
}  # fmt: skip
PRETRAINING = {
    "losses": {"0": 3.5, "1": 3.6}, "loss": {"mean": 3.55, "deviation": 0.07, "n": 2}, "accuracy": 0.3, "tokens": 1e7,
    "difference": {"mean": 0.1, "deviation": None, "n": 1}, "to_control": None, "seconds": 600.0, "flops": 1e14,
    "curve": [{"tokens": 0.0, "seconds": 0.0, "flops": 0.0, "loss": 9.0, "accuracy": 0.1}],
}  # fmt: skip
RESULTS = {
    "asked": COMPARISON, "speed": None, "failed": {"a": "b"}, "waiting": ["c"], "notes": ["d"], "unigram_loss": 6.9,
    "verdict": ["e"], "format": "ufbert-comparison", "format_version": 1,
    "cells": [{
        "name": "trees-seed0", "seeds": [0], "command": "ufbert train", "commits": ["0123"], "cpu": "AMD EPYC",
        "load_before": 0.5, "load_after": None, "seconds": 3.5, "other_work": 0.1, "beside_other_work": False, "restarts": 0,
    }],
    "models": [{
        "name": "trees", "options": ["--scale=mini"], "architecture": "4 x 256", "parameters": 5000, "neurons_used": 10,
        "neurons": 1023, "train_flops": 1e7, "infer_flops": 1e6, "control": "dense", "random_twin": "",
        "by_tokens": PRETRAINING, "by_time": None, "usage": {"dead": 0.5}, "memory": 1000, "hours": 0.2,
        "glue": [{
            "task": "rte", "split": "dev", "title": "RTE", "metric": "accuracy", "rows": 277, "seeds": {"0": 0.5},
            "median": 0.5, "majority": 0.52, "difference": None, "low": None, "high": None, "of_rows": False,
        }],
    }],
}  # fmt: skip
VARIANTS = {
    "base": {"scale": "mini", "train.peak_lr": 0.003},
    "variants": {"trees": {"model": {"feedforward": ["tree"], "tree_depth": 3}, "train.weight_decay": 0.1}},
}

READERS = [
    Reader("run", "config.json", stored("run"), read_run, RunFile),
    Reader("summary", "summary.json", written("summary.json", SUMMARY), read_summary, Summary),
    Reader(
        "when done", "when_done.json", lambda folder: write_when_done(folder, "true", 1.5),
        lambda folder: read_typed(folder / "when_done.json", WhenDone), WhenDone,
    ),
    Reader(
        "updates", "metrics.jsonl", first_line("metrics.jsonl", "lr"),
        lambda folder: list(read_lines(folder / "metrics.jsonl", StepRecord)), StepRecord,
    ),
    Reader(
        "evaluations", "metrics.jsonl", first_line("metrics.jsonl", "heldout_loss"),
        lambda folder: list(read_lines(folder / "metrics.jsonl", EvaluationRecord)), EvaluationRecord,
    ),
    Reader(
        "ledger", "ledger.jsonl", first_line("ledger.jsonl", "session"),
        lambda folder: budget.Ledger(folder / "ledger.jsonl"), budget._Line,
    ),
    Reader(
        "checkpoint", METADATA, stored("run"), lambda folder: read_typed(folder / METADATA, checkpoint._Metadata),
        checkpoint._Metadata,
    ),
    Reader(
        "checkpoint's loss", METADATA, stored("run"), lambda folder: checkpoint._loss(folder / "checkpoints" / "50"),
        checkpoint._Metadata,
    ),
    Reader(
        "sizes", SIZES, stored("run"), lambda folder: checkpoint._is_whole(folder / "checkpoints" / "50"),
        dict[str, list[int]],
    ),
    Reader("manifest", "manifest.json", stored("prepared"), read_manifest, Manifest),
    Reader("owner", claim.LOCK, written(claim.LOCK, {"process": 1, "host": "a", "since": "b"}), claim._owner, claim._Owner),
    Reader(
        "reference curves", "reference_curves.json",
        lambda folder: shutil.copy(preset_folder() / "reference_curves.json", folder),
        lambda folder: read_typed(folder / "reference_curves.json", dict[str, tuple[Point, ...]]),
        dict[str, tuple[Point, ...]],
    ),
    Reader(
        "model settings", "model.json", written("model.json", asdict(ModelConfig())),
        lambda folder: read_typed(folder / "model.json", ModelConfig, exact=True), ModelConfig,
    ),
    Reader(
        "fine-tuning settings", "tune.json", written("tune.json", asdict(FinetuneConfig())),
        lambda folder: read_typed(folder / "tune.json", FinetuneConfig, exact=True), FinetuneConfig,
    ),
    Reader(
        "sweep", "glue.json", lambda folder: write_sweep(folder, tasks=("rte",), seeds=(0,), predictions=False),
        read_results, GlueResults,
    ),
    Reader(
        "run of a sweep", "trace.json", written("trace.json", {"curve": [{"epoch": 1, "loss": 0.5}], "truncated": 3}),
        lambda folder: read_typed(folder / "trace.json", sweep._Stored), sweep._Stored,
    ),
    Reader(
        "study", "study.json", written("study.json", STUDY), read_study, StudyFile,
    ),
    Reader("cell", "cell.json", written("cell.json", CELL), read_cell, CellFile),
    Reader("comparison", "comparison.json", written("comparison.json", COMPARISON), read_comparison, ComparisonFile),
    Reader("results of a comparison", "results.json", written("results.json", RESULTS), read_comparison_results, Comparison),
    Reader("cell of a comparison", "cell.json", written("cell.json", JOB), read_job, JobFile),
    Reader(
        "variants", "variants.json", written("variants.json", VARIANTS),
        lambda folder: read_variants(folder / "variants.json"), VariantsFile,
    ),
    Reader(
        "task file", "task.json", written("task.json", TASK), lambda folder: read_task_file(folder / "task.json"),
        CustomTask,
    ),
]  # fmt: skip

WRONG = {
    "null": "null", "text": '"x"', "empty text": '""', "true": "true", "a number": "5", "a fraction": "5.5", "a list": "[[1]]",
    "an object": '{"a": {}}', "NaN": "NaN", "infinite": "-Infinity", "too large": "1e999", "large": "1e300", "far": str(10**18),
    "below": "-1", "huge": str(10**30), "digits": "9" * 5000, "deep": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000, "letters": '"' + "x" * 3_000_000 + '"', "NUL": '"a\\u0000b"',
    "surrogate": '"\\ud800"',
}  # fmt: skip
"""Values that a field may be found with, as JSON."""


def paths(kind: Any, value: Any) -> Iterator[tuple[str | int, ...]]:
    """Paths of all fields of a type; of lists and objects whose names are free, of the first entry of `value`."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    for part in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        origin, inner, entries = get_origin(part), get_args(part), {}
        if is_dataclass(part):
            entries = get_type_hints(part)
        elif hasattr(part, "_fields"):
            entries = dict(enumerate(get_type_hints(part).values()))
        elif origin in (list, tuple) and isinstance(value, list) and value:
            entries = {0: inner[0]}
        elif origin is dict and isinstance(value, dict) and value:
            entries = {next(iter(value)): inner[1]}
        for name, hint in entries.items():
            yield (name,)
            try:
                below = value[name]
            except (LookupError, TypeError):
                below = None
            yield from ((name, *rest) for rest in paths(hint, below))


def changed(valid: Any, path: tuple[str | int, ...], raw: str | None) -> str | None:
    """JSON of `valid` with the text `raw` at a path, or without that field; None where there is no such place."""
    value = copy.deepcopy(valid)
    place = value
    for step in path[:-1]:
        place = place[step] if isinstance(step, int) else place.setdefault(step, {})
        if not isinstance(place, dict | list):
            return None
    if raw is not None:
        place[path[-1]] = "@@"
        return json.dumps(value).replace('"@@"', raw)
    if isinstance(place, dict):
        place.pop(path[-1], None)
    return json.dumps(value)


def inputs(reader: Reader, content: bytes) -> Iterator[tuple[str, bytes, str]]:
    """What was done, the damaged content, and the field that was meant, or ""."""
    valid = json.loads(content)
    for path in paths(reader.kind, valid):
        field = next((str(step) for step in reversed(path) if isinstance(step, str)), "")
        label = ".".join(map(str, path))
        long = len(path) < 3 or "deep" not in label  # of fields far down, one text of three million letters will do
        for name, raw in {"absent": None, **WRONG}.items():
            if (name != "letters" or (long and len(path) == 1)) and (text := changed(valid, path, raw)) is not None:
                yield f"{label}: {name}", text.encode(), field
    for at in range(0, len(content), 10):
        yield f"cut at {at}", content[:at], ""
    for name, raw in WRONG.items():
        yield f"all of it: {name}", raw.encode(), ""
    middle = len(content) // 2
    yield "not UTF-8", content[:middle] + b"\xff\xfe" + content[middle:], ""
    yield "UTF-16", content.decode().encode("utf-16"), ""
    yield "NULs", content[:middle] + bytes(4096) + content[middle:], ""
    yield "a mark", b"\xef\xbb\xbf" + content, ""
    yield "twice", content + content, ""
    yield "blanks", b" " * 2**25, ""
    yield "an unknown field", b'{"colour": 1, ' + content.lstrip()[1:], ""
    yield "unknown fields", b'{"a\\nb": 1,' * 100 + b",".join(b'"%d": 1' % i for i in range(10_000)) + b"}", ""


def fault(reader: Reader, folder: Path, field: str, path: Path) -> str:
    """What is wrong with how a damaged folder is read, or ""."""
    try:
        reader.read(folder)
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 1000:
            return f"is no sentence: {text[:200]!r}"
        if path.name not in text and str(folder) not in text:
            return f"does not name the file: {text}"
        if field and field not in text and field not in ("format", "format_version") and "readable JSON" not in text:
            return f"does not name the field: {text}"
    except Exception as error:
        return f"raises {error!r:.200}"
    return ""


@pytest.fixture
def net():
    """Ends a reader that does not."""

    def too_long(*_: object) -> None:
        raise AssertionError("a reader runs without end")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check(reader: Reader, folder: Path) -> None:
    """Assert that every damaged file of a format is a value or a sentence, in little time and memory."""
    folder.mkdir()
    reader.make(folder)
    reader.read(folder)  # it was valid
    path = folder / reader.file
    content = path.read_bytes()
    peak, faults, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], 0.0
    for label, damaged, field in inputs(reader, content):
        path.write_bytes(damaged)
        began = time.process_time()
        if problem := fault(reader, folder, field, path):
            faults.append(f"{label} {problem}")
        slowest = max(slowest, time.process_time() - began)
    path.unlink()
    for label in ("absent", "a folder", "a pipe"):
        if label == "a folder":
            path.mkdir()
        elif label == "a pipe":
            path.rmdir()
            os.mkfifo(path)
        if problem := fault(reader, folder, "", path):
            faults.append(f"{label} {problem}")
    assert not faults, "\n".join([f"{len(faults)} of {reader.name}:", *faults[:20]])
    assert slowest < CPU_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < BYTES


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_is_a_value_or_a_sentence_that_names_file_and_field(reader, tmp_path, net):
    check(reader, tmp_path / "folder")


def test_there_are_two_thousand_inputs(tmp_path):
    total = 0
    for number, reader in enumerate(READERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        reader.make(folder)
        total += sum(1 for _ in inputs(reader, (folder / reader.file).read_bytes()))
    assert total >= 2000

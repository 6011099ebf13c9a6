"""`finetune.py` and `ufbert finetune`: options to fine-tuned model folders and a table."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.config import FinetuneConfig
from ufbert.device import Device, use_device
from ufbert.errors import UserError
from ufbert.glue.sources import Rows, open_source, read_split
from ufbert.glue.tasks import Task, find_task
from ufbert.writers import LiveLine, write_json


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune a model folder on GLUE tasks, score each on its dev set, and write one model folder per task."""

    model: str
    """Model folder to start from."""
    glue_source: str
    """dir:PATH, a folder of the official TSV files (PATH/SST-2/train.tsv, ...)."""
    tasks: str = "sst2"
    """Comma-separated: cola, sst2, mrpc, stsb, rte."""
    out: str = ""
    """Folder for the results; by default a new one under runs/."""
    seeds: str = "0"
    """Comma-separated seeds; each is a run, and the folder of a task holds the median one."""
    train_rows: int = 0
    """Use this many training rows, drawn with the first seed; 0 uses all."""
    from_scratch: bool = False
    """Ignore the pretrained weights and start from a random initialisation of the same architecture, for comparison."""
    device: Device = "auto"
    """cpu, gpu or tpu."""
    tune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Hyper-parameters, the same for every task."""


def finetune_command(args: list[str]) -> dict[str, Any]:
    """`ufbert finetune ARGS`."""
    import tyro

    return finetune(tyro.cli(FinetuneOptions, args=args, prog="finetune.py"))


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Fine-tune on every task and seed; returns what `glue.json` in the output folder holds.

    All tasks, files and the model are checked before the first update. Raises UserError for any that is wrong.
    """
    tasks = [find_task(name) for name in options.tasks.split(",") if name.strip()]
    seeds = _numbers(options.seeds)
    source = open_source(options.glue_source)
    if not tasks:
        raise UserError("--tasks names no task.")
    folder = Path(options.out) if options.out else _free_folder(Path(options.model))
    if options.out and folder.exists():
        raise UserError(f"{folder} exists already; choose another --out.")
    splits = {task.name: (read_split(source, task, "train"), read_split(source, task, "dev")) for task in tasks}
    use_device(options.device)
    from ufbert.hub.folder import load_model

    model = load_model(options.model)
    results: dict[str, Any] = {"model": str(options.model), "options": asdict(options), "tasks": {}}
    live = LiveLine(every=10.0)
    for task in tasks:
        train, dev = splits[task.name]
        if options.train_rows:
            train = subset(train, options.train_rows, seeds[0])
        live.say(
            f"{task.name}: {len(train.labels):,} training and {len(dev.labels):,} dev rows, {options.tune.epochs} epochs, "
            f"batch {options.tune.batch_rows}, lr {options.tune.peak_lr(model.config):.1e}, {len(seeds)} seed(s)"
        )
        runs = [_one(model, task, train, dev, options, seed, live) for seed in seeds]
        results["tasks"][task.name] = _save(folder, task, runs, seeds)
        write_json(folder / "glue.json", results)
    print(_table(results))
    print(f"results {folder / 'glue.json'}; one model folder per task beside it")
    return results


def _one(model: Any, task: Task, train: Rows, dev: Rows, options: FinetuneOptions, seed: int, live: LiveLine) -> Any:
    from ufbert.glue.finetune import finetune_task, format_metrics

    began = time.monotonic()
    if options.from_scratch:
        import jax

        from ufbert import nn

        model = replace(model, params=nn.init(model.config, jax.random.key(seed), heads=()))
    tuned = finetune_task(model, task, train, dev, options.tune, seed, live.show)
    live.say(f"{task.name} seed {seed}: dev {format_metrics(tuned.metrics)} ({time.monotonic() - began:.0f} s)")
    return tuned


def subset(rows: Rows, count: int, seed: int) -> Rows:
    """`count` rows drawn without replacement. Raises UserError if there are fewer."""
    if count > len(rows.labels):
        raise UserError(f"--train-rows {count} is more than the {len(rows.labels)} rows there are.")
    picks = np.sort(np.random.default_rng(seed).permutation(len(rows.labels))[:count])
    pairs = None if rows.pairs is None else [rows.pairs[i] for i in picks]
    return Rows([rows.texts[i] for i in picks], pairs, [rows.labels[i] for i in picks])


def _save(folder: Path, task: Task, runs: list[Any], seeds: list[int]) -> dict[str, Any]:
    """Write the median run's model folder and return the task's entry of `glue.json`."""
    from ufbert.hub.folder import save_model

    main = [run.metrics[task.metrics[0]] for run in runs]
    median = int(np.argsort(main, kind="stable")[(len(main) - 1) // 2])
    save_model(folder / task.name, runs[median].model)
    return {
        "metrics": list(task.metrics),
        "median": {name: float(np.median([run.metrics[name] for run in runs])) for name in task.metrics},
        "mean": {name: float(np.mean([run.metrics[name] for run in runs])) for name in task.metrics},
        "seeds": {str(seed): run.metrics for seed, run in zip(seeds, runs, strict=True)},
        "curves": {str(seed): run.curve for seed, run in zip(seeds, runs, strict=True)},
        "saved_seed": seeds[median],
    }


def _table(results: dict[str, Any]) -> str:
    lines = ["", f"{'task':<6} {'metric':<10} {'median':>7} {'lowest':>7} {'highest':>8}  seeds"]
    for name, entry in results["tasks"].items():
        for metric in entry["metrics"]:
            found = [run[metric] for run in entry["seeds"].values()]
            lines.append(
                f"{name:<6} {metric:<10} {100 * entry['median'][metric]:7.1f} {100 * min(found):7.1f} "
                f"{100 * max(found):8.1f}  {len(found)}"
            )
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {text!r} is not a list of whole numbers.") from error


def _free_folder(model: Path) -> Path:
    stem = f"glue-{model.resolve().parent.name if model.name == 'model' else model.name}"
    names = (stem if i == 1 else f"{stem}-{i}" for i in range(1, 10_000))
    return next(Path("runs") / name for name in names if not (Path("runs") / name).exists())

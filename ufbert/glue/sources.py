"""Where task rows come from: one interface, three kinds of source, and the choice of tasks.

`hf[:NAME]`  datasets of the Hugging Face hub, by default nyu-mll/glue, or a local folder of them (`datasets_source.py`)
`tfds:PATH`  a data directory of tensorflow_datasets (`tfds_source.py`)
`dir:PATH`   a folder of the official TSV files, and of cuts of them (`tsv_source.py`)
"""

from pathlib import Path

from ufbert.errors import UserError
from ufbert.glue.datasets_source import HUB_NAME, FolderSource, HubSource
from ufbert.glue.rows import Source, TaskData
from ufbert.glue.tasks import TASKS, Task, find_task
from ufbert.glue.tfds_source import TfdsSource
from ufbert.glue.tsv_source import TsvSource


def open_source(spec: str, skip_bad_rows: bool = False) -> Source:
    """The source that `spec` names; with `skip_bad_rows` it leaves broken rows out and counts them.

    Raises UserError for another kind of source or a missing folder; a name on the hub is only asked for when it is used.
    """
    kind, _, rest = spec.partition(":")
    if kind == "hf" and (rest or spec == "hf"):
        name = rest or HUB_NAME
        if not Path(name).is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
            raise UserError(f"The GLUE folder {name} does not exist.")
        return (FolderSource if Path(name).is_dir() else HubSource)(name, skip_bad_rows)
    if kind == "tfds" and rest:
        return TfdsSource(Path(rest), skip_bad_rows)
    if kind == "dir" and rest:
        return TsvSource(Path(rest), skip_bad_rows)
    raise UserError(f"There is no GLUE source {spec!r}; take hf, hf:NAME, hf:PATH, tfds:PATH or dir:PATH.")


def choose_tasks(source: Source, names: str) -> tuple[list[Task], list[str]]:
    """Tasks of `names`, in its order and each once, and the names of official tasks that are left out.

    `names` is `all`, which leaves out what the source does not have complete, or a comma-separated list, of which all must be
    complete: official tasks, and cuts by their folders' names, in any case. Raises UserError if one is not, or if none is left.
    """
    if names.strip().lower() == "all":
        tasks = source.tasks()
        if not tasks:
            needs = source.missing(TASKS["cola"])
            raise UserError(f"The GLUE source has no complete task; there is no {' and no '.join(needs)}, for example.")
        return tasks, [task.folder for task in TASKS.values() if task not in tasks]
    chosen = {task.name: task for task in (_named(source, name.strip()) for name in names.split(",") if name.strip())}
    if not chosen:
        raise UserError("No task is named; take `all` or a list such as `cola,sst2`.")
    for task in chosen.values():
        _require(source, task)
    return list(chosen.values()), []


def _named(source: Source, name: str) -> Task:
    """The cut or the official task of that name. Raises UserError, with the nearest known name."""
    cuts = {cut.name: cut for cut in source.cuts()}
    return cuts.get(name.lower()) or find_task(name, [cut.folder for cut in cuts.values()])


def _require(source: Source, task: Task) -> None:
    if missing := source.missing(task):
        raise UserError(f"The GLUE source does not have all of {task.folder}: there is no {' and no '.join(missing)}.")


def load_task(source: Source, task: Task) -> TaskData:
    """All rows of a task. Raises UserError if its training rows or the dev set that decides are not there, or are broken."""
    _require(source, task)
    splits = {split: source.read(task, split) for split in ("train", *task.dev, *task.test)}
    there = {split: rows for split, rows in splits.items() if rows is not None}
    dev, test = ({split: there[split] for split in part if split in there} for part in (task.dev, task.test))
    return TaskData(task, there["train"], dev, test)

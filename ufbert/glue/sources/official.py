"""GLUE's official tasks: the choice of a source and of tasks, and the official TSV files.

`dir:PATH` reads PATH/SST-2/train.tsv and so on, and cuts such as PATH/QQP-10k; `datasets_source` has the other sources.
"""

from functools import partial
from itertools import pairwise
from pathlib import Path

from ufbert.errors import UserError
from ufbert.glue.sources.datasets_source import HUB_NAME, FolderSource, HubSource, TfdsSource
from ufbert.glue.sources.records import Columns, Source, class_number, collect, require_columns, single_number
from ufbert.glue.sources.table_files import read_tsv
from ufbert.glue.tasks import TASKS, Examples, Task, TaskData, cut_of, find_task

DIAGNOSTIC = tuple(f"{folder}/diagnostic.tsv" for folder in ("diagnostic", "AX", "MNLI"))
"""Places of the AX test set, which comes with no task's download."""


class TsvSource(Source):
    """A folder with one folder a task. Raises UserError if it does not exist."""

    def __init__(self, root: Path, skip_bad_rows: bool = False) -> None:
        if not root.is_dir():
            raise UserError(f"The GLUE folder {root} does not exist.")
        self.root, self.skip_bad_rows = root, skip_bad_rows

    def place(self, task: Task, split: str) -> str:
        return str(self._path(task, split))

    def has(self, task: Task, split: str) -> bool:
        return self._path(task, split).is_file()

    def cuts(self) -> list[Task]:
        folders = (folder.name for folder in sorted(self.root.iterdir()) if folder.is_dir())
        cuts = [task for name in folders if (task := cut_of(name))]
        for first, second in pairwise(sorted(cuts, key=lambda cut: cut.name)):
            if first.name == second.name:
                raise UserError(f"{first.folder} and {second.folder} differ by case alone; rename one of the two.")
        return cuts

    def _read(self, task: Task, split: str) -> Examples:
        path = self._path(task, split)
        if split in task.test:
            # CoLA's test file has a header, though its other files have none; its text column is named as in `datasets`.
            columns = Columns(tuple(map(str, task.text if task.header else task.hub_text)))
        else:
            label = single_number if task.is_regression else partial(class_number, task.labels)
            columns = Columns(tuple(map(str, task.text)), str(task.label), label)
        has_header = task.header or split in task.test
        table = read_tsv(path, () if has_header else tuple(map(str, range(task.columns))))
        require_columns(str(path), columns, table.columns or ())
        return collect(str(path), table.records, columns, self.skip_bad_rows)

    def _path(self, task: Task, split: str) -> Path:
        if split != "ax":
            return self.root / task.folder / f"{split}.tsv"
        places = [self.root / place for place in DIAGNOSTIC]
        return next((path for path in places if path.is_file()), places[0])


def open_source(spec: str, skip_bad_rows: bool = False) -> Source:
    """Open the source that `spec` names; `skip_bad_rows` leaves broken rows out and counts them.

    A name on the hub is looked up when its rows are read. Raises UserError for an unknown kind of source or a missing folder.
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
    """Return the tasks of `names`, each once, and the names of official tasks that are left out.

    `names` is `all`, which leaves out incomplete tasks, or a comma-separated list of official tasks and of cuts by their
    folders' names, in any case. Raises UserError if a listed task is incomplete, or if no task is left.
    """
    if names.strip().lower() == "all":
        tasks = [task for task in (*TASKS.values(), *source.cuts()) if not source.missing(task)]
        if not tasks:
            needs = source.missing(TASKS["cola"])
            raise UserError(f"The GLUE source has no complete task; there is no {' and no '.join(needs)}, for example.")
        return tasks, [task.folder for task in TASKS.values() if task not in tasks]
    listed, cuts = [name.strip() for name in names.split(",") if name.strip()], {cut.name: cut for cut in source.cuts()}
    folders = [cut.folder for cut in cuts.values()]
    tasks = [cuts.get(name.lower()) or find_task(name, folders) for name in listed]
    chosen = {task.name: task for task in tasks}
    if not chosen:
        raise UserError("No task is named; take `all` or a list such as `cola,sst2`.")
    for task in chosen.values():
        _require(source, task)
    return list(chosen.values()), []


def _require(source: Source, task: Task) -> None:
    if missing := source.missing(task):
        raise UserError(f"The GLUE source does not have all of {task.folder}: there is no {' and no '.join(missing)}.")


def load_task(source: Source, task: Task) -> TaskData:
    """Read all rows of a task. Raises UserError if its training rows or the dev set that decides are missing or broken."""
    _require(source, task)
    read = {split: source.read(task, split) for split in ("train", *task.dev, *task.test)}
    splits = {split: examples for split, examples in read.items() if examples is not None}
    dev, test = ({split: splits[split] for split in names if split in splits} for names in (task.dev, task.test))
    return TaskData(task, splits["train"], dev, test)

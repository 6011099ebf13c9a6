"""`dir:PATH`: the official TSV files, PATH/SST-2/train.tsv and so on, and cuts of them such as PATH/QQP-10k."""

from functools import partial
from itertools import pairwise
from pathlib import Path

from ufbert.errors import UserError
from ufbert.glue.records import Columns, class_number, collect, require_columns, single_number
from ufbert.glue.rows import Rows, Source
from ufbert.glue.table_files import read_tsv
from ufbert.glue.tasks import Task, cut_of

DIAGNOSTIC = tuple(f"{folder}/diagnostic.tsv" for folder in ("diagnostic", "AX", "MNLI"))
"""Where the AX test set may lie; it comes with no task's download."""


class TsvSource(Source):
    """A folder with one folder a task. Raises UserError if it is none."""

    def __init__(self, root: Path, skip_bad_rows: bool = False) -> None:
        if not root.is_dir():
            raise UserError(f"The GLUE folder {root} does not exist.")
        self.root, self.skip_bad_rows = root, skip_bad_rows

    def place(self, task: Task, split: str) -> str:
        return str(self._path(task, split))

    def has(self, task: Task, split: str) -> bool:
        return self._path(task, split).is_file()

    def cuts(self) -> list[Task]:
        found = [cut_of(folder.name) for folder in sorted(self.root.iterdir()) if folder.is_dir()]
        cuts = [task for task in found if task is not None]
        for one, other in pairwise(sorted(cuts, key=lambda cut: cut.name)):
            if one.name == other.name:
                raise UserError(f"{one.folder} and {other.folder} differ by case alone; rename one of these folders.")
        return cuts

    def read(self, task: Task, split: str) -> Rows | None:
        path = self._path(task, split)
        if not path.is_file():
            return None
        if split in task.test:
            # A test file has a header and an index even where the others have neither, and its texts are then named as in
            # `datasets`.
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

"""`tfds:PATH`: a data directory of tensorflow_datasets, PATH/glue/cola/2.0.0 and so on, read without TensorFlow."""

from pathlib import Path
from typing import Any

from ufbert.errors import UserError, first_line
from ufbert.glue.datasets_source import dataset_columns, dataset_split
from ufbert.glue.records import Record, collect, require_columns
from ufbert.glue.rows import Rows, Source
from ufbert.glue.tasks import Task


class TfdsSource(Source):
    """The newest version of each configuration of `glue`. Raises UserError if PATH holds none.

    Rows come in the order of their `idx`, where they have one: the library shuffles them when it writes them.
    """

    def __init__(self, root: Path, skip_bad_rows: bool = False) -> None:
        if not (root / "glue").is_dir():
            raise UserError(
                f"{root} is not a data directory of tensorflow_datasets with GLUE in it: it has no folder glue."
            )
        self.root, self.skip_bad_rows = root, skip_bad_rows
        self._builders: dict[str, Any] = {}

    def place(self, task: Task, split: str) -> str:
        config, name = dataset_split(task, split)
        return f"{self.root / 'glue' / config}, split {name}"

    def has(self, task: Task, split: str) -> bool:
        config, name = dataset_split(task, split)
        builder = self._builder(config)
        return builder is not None and name in builder.info.splits

    def read(self, task: Task, split: str) -> Rows | None:
        if not self.has(task, split):
            return None
        config, name = dataset_split(task, split)
        builder = self._builder(config)
        features, place = dict(builder.info.features.items()), self.place(task, split)
        columns = dataset_columns(place, task, split, getattr(features.get("label"), "names", None))
        require_columns(place, columns, features)
        try:
            values = list(builder.as_data_source(name))
        except Exception as error:  # the library raises many kinds for a damaged or unsuitable file
            raise UserError(
                f"{place}: cannot be read without TensorFlow ({first_line(error)}); it can if it was prepared with "
                "file_format='array_record'."
            ) from error
        if "idx" in features:
            values.sort(key=lambda row: int(row["idx"]))
        return collect(place, (Record(i, row) for i, row in enumerate(values)), columns, self.skip_bad_rows, unit="row")

    def _builder(self, config: str) -> Any:
        """What reads the newest version of a configuration; None if there is none. Raises UserError for a damaged one."""
        if config not in self._builders:
            self._builders[config] = _newest(self.root / "glue" / config)
        return self._builders[config]


def _newest(folder: Path) -> Any:
    versions = [path.parent for path in folder.glob("*/dataset_info.json")]
    if not versions:
        return None
    import tensorflow_datasets as tfds

    newest = max(versions, key=lambda path: [int(part) if part.isdecimal() else -1 for part in path.name.split(".")])
    try:
        return tfds.builder_from_directory(newest)
    except Exception as error:  # as many kinds as there are ways to damage a folder
        raise UserError(
            f"{newest} is not a dataset that tensorflow_datasets prepared ({first_line(error)})."
        ) from error

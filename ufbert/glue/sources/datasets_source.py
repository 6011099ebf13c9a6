"""Sources in the formats of two libraries, one configuration a task.

`hf[:NAME]` reads datasets of the Hugging Face hub, or a local folder of them. `tfds:PATH` reads a data directory of
tensorflow_datasets, PATH/glue/cola/2.0.0 and so on, without TensorFlow.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

from ufbert.data.corpora import datasets_library
from ufbert.errors import UserError, first_line
from ufbert.glue.sources.records import Columns, Record, Source, collect, number, require_columns, single_number
from ufbert.glue.sources.table_files import read_table
from ufbert.glue.tasks import Examples, Task

HUB_NAME = "nyu-mll/glue"
_SPLITS = {"dev": "validation", "dev_matched": "validation_matched", "dev_mismatched": "validation_mismatched"}


def dataset_split(task: Task, split: str) -> tuple[str, str]:
    """Return the names of the configuration and the split that hold a split of a task in both libraries."""
    return ("ax", "test") if split == "ax" else (task.name, _SPLITS.get(split, split))


def dataset_columns(place: str, task: Task, split: str, names: list[str] | None = None) -> Columns:
    """Return the columns of a split. `names` are the dataset's own class names, which decide the class of a number.

    Raises UserError if they are not the task's.
    """
    if split in task.test:
        return Columns(task.hub_text)
    if task.is_regression:
        return Columns(task.hub_text, "label", single_number)
    order = tuple(range(len(task.labels))) if names is None else _order(task, names)
    if order is None:
        raise UserError(
            f"{place}: its classes are named {', '.join(names or ())}, where those of {task.name} are "
            f"{', '.join(task.label_names)}; name them so in the dataset's features, or give the rows as a task of your own."
        )
    return Columns(task.hub_text, "label", partial(_class, task, order))


def _order(task: Task, names: list[str]) -> tuple[int, ...] | None:
    """Return the task's class of each of a dataset's class names; None if they are not the task's."""
    plain = list(map(_plain, names))
    return next((tuple(map(known.index, plain)) for known in _known(task) if sorted(known) == sorted(plain)), None)


def _known(task: Task) -> list[list[str]]:
    """List the names that a task's classes may have."""
    return [list(map(_plain, names)) for names in (task.labels, task.label_names, task.hub_labels)]


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ").replace("-", " ")


def _class(task: Task, order: tuple[int, ...], value: Any) -> float:
    """Return the class of a label's text, or of a class number, an index into `order`. Raises ValueError for another label."""
    for known in _known(task):
        if isinstance(value, str) and _plain(value) in known:
            return float(known.index(_plain(value)))
    try:
        index = number(value)
    except ValueError:
        index = -1.0
    if index not in range(len(order)):
        raise ValueError(f"{value!r} is not a class number below {len(order)}, nor one of {', '.join(task.labels)}")
    return float(order[int(index)])


class _DatasetsSource(Source):
    """The common part of the hub and of a local folder: Arrow tables, and Features that may name the classes."""

    def __init__(self, name: str, skip_bad_rows: bool = False) -> None:
        self.name, self.skip_bad_rows = name, skip_bad_rows

    def place(self, task: Task, split: str) -> str:
        config, name = dataset_split(task, split)
        return f"{self.name} {config}, split {name}"

    def _rows(self, task: Task, split: str, dataset: Any) -> Examples:
        names = getattr(dataset.features.get("label"), "names", None)
        place = self.place(task, split)
        columns = dataset_columns(place, task, split, names)
        require_columns(place, columns, dataset.column_names)
        used = [name for name in (*columns.text, columns.label) if name]
        table = dataset.select_columns(used).with_format("arrow")[:]
        values = zip(*(table[name].to_pylist() for name in used), strict=True)
        records = (Record(i, dict(zip(used, row, strict=True))) for i, row in enumerate(values))
        return collect(place, records, columns, self.skip_bad_rows, unit="row")


class HubSource(_DatasetsSource):
    """A dataset of the hub, which `datasets` keeps in its cache, so that it is fetched once."""

    def __init__(self, name: str, skip_bad_rows: bool = False) -> None:
        super().__init__(name, skip_bad_rows)
        self._splits = cache(self._fetch)

    def has(self, task: Task, split: str) -> bool:
        config, name = dataset_split(task, split)
        return name in self._splits(config)

    def _read(self, task: Task, split: str) -> Examples:
        config, name = dataset_split(task, split)
        return self._rows(task, split, self._splits(config)[name])

    def _fetch(self, config: str) -> Any:
        """Fetch the splits of a configuration by name; none if the dataset does not have the configuration."""
        try:
            return datasets_library().load_dataset(self.name, config)
        except Exception as error:  # all but one of the library's many kinds mean that it is out of reach
            if isinstance(error, ValueError) and f"'{config}'" in str(error):
                return {}
            raise UserError(
                f"The dataset {self.name} {config} cannot be had from the hub ({first_line(error)}); give a local "
                "folder as hf:PATH, the official TSV files as dir:PATH, or prepared TFDS files as tfds:PATH."
            ) from error


class FolderSource(_DatasetsSource):
    """A folder with one folder a configuration, in which a split is one of

    - a folder that `save_to_disk` wrote, alone or as one of a DatasetDict: `cola/train/`
    - a Parquet file, or several: `cola/train.parquet`, `cola/train-00000-of-00002.parquet`, ...
    - a CSV file with a header, plain or gzipped: `cola/train.csv`
    """

    def has(self, task: Task, split: str) -> bool:
        return bool(self._files(task, split))

    def _read(self, task: Task, split: str) -> Examples:
        import pyarrow.parquet

        datasets = datasets_library()
        paths = self._files(task, split)
        if ".csv" in paths[0].suffixes:
            return self._csv_rows(task, split, paths[0])
        parts: list[Any] = []
        try:
            if paths[0].is_dir():
                dataset: Any = datasets.load_from_disk(str(paths[0]))
            else:
                parts = [datasets.Dataset(pyarrow.parquet.read_table(path)) for path in paths]
                dataset = datasets.Dataset(pyarrow.concat_tables([part.data.table for part in parts]))
        except Exception as error:  # either library raises many kinds for a damaged file
            raise UserError(f"{paths[0]} cannot be read ({first_line(error)}).") from error
        if any(part.features != dataset.features for part in parts):
            raise UserError(
                f"{paths[0]} and the other parts of its split have different columns or classes; write them alike."
            )
        return self._rows(task, split, dataset)

    def _files(self, task: Task, split: str) -> list[Path]:
        config, name = dataset_split(task, split)
        folder = Path(self.name) / config
        if (folder / name / "state.json").is_file():
            return [folder / name]
        tables = (folder / f"{name}{suffix}" for suffix in (".parquet", ".csv", ".csv.gz"))
        table = next((path for path in tables if path.is_file()), None)
        return [table] if table else sorted(folder.glob(f"{name}-*-of-*.parquet"))

    def _csv_rows(self, task: Task, split: str, path: Path) -> Examples:
        table = read_table(path)
        columns = dataset_columns(str(path), task, split)
        require_columns(str(path), columns, table.columns or ())
        return collect(str(path), table.records, columns, self.skip_bad_rows)


class TfdsSource(Source):
    """The newest version of each configuration of `glue`. Raises UserError if PATH holds none.

    Rows come in the order of their `idx`, where they have one: the library shuffles them when it writes them.
    """

    def __init__(self, root: Path, skip_bad_rows: bool = False) -> None:
        if not (root / "glue").is_dir():
            raise UserError(f"{root} is no data directory of tensorflow_datasets with GLUE: it has no folder glue.")
        self.root, self.skip_bad_rows = root, skip_bad_rows
        self._builder = cache(lambda config: _newest(root / "glue" / config))

    def place(self, task: Task, split: str) -> str:
        config, name = dataset_split(task, split)
        return f"{self.root / 'glue' / config}, split {name}"

    def has(self, task: Task, split: str) -> bool:
        config, name = dataset_split(task, split)
        builder = self._builder(config)
        return builder is not None and name in builder.info.splits

    def _read(self, task: Task, split: str) -> Examples:
        config, name = dataset_split(task, split)
        builder = self._builder(config)
        features, place = dict(builder.info.features.items()), self.place(task, split)
        columns = dataset_columns(place, task, split, getattr(features.get("label"), "names", None))
        require_columns(place, columns, features)
        try:
            values = list(builder.as_data_source(name))
        except Exception as error:  # the library raises many kinds for a damaged file
            remedy = "it can if it was prepared with file_format='array_record'"
            raise UserError(f"{place}: cannot be read without TensorFlow ({first_line(error)}); {remedy}.") from error
        if "idx" in features:
            values.sort(key=lambda row: int(row["idx"]))
        return collect(place, (Record(i, row) for i, row in enumerate(values)), columns, self.skip_bad_rows, unit="row")


def _newest(folder: Path) -> Any:
    """Open the newest version of a configuration; None if there is none. Raises UserError for a damaged one."""
    versions = [path.parent for path in folder.glob("*/dataset_info.json")]
    if not versions:
        return None
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    newest = max(versions, key=lambda path: [int(part) if part.isdecimal() else -1 for part in path.name.split(".")])
    try:
        return tfds.builder_from_directory(newest)
    except Exception as error:  # as many kinds as there are ways to damage a folder
        raise UserError(
            f"{newest} is not a dataset that tensorflow_datasets prepared ({first_line(error)})."
        ) from error

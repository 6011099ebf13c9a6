"""`hf[:NAME]`: datasets of the Hugging Face hub, or a local folder of them, one configuration a task."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ufbert.data.corpora import datasets_library
from ufbert.errors import UserError, first_line
from ufbert.glue.records import Columns, Record, collect, number, require_columns, single_number
from ufbert.glue.rows import Rows, Source
from ufbert.glue.table_files import read_table
from ufbert.glue.tasks import Task

HUB_NAME = "nyu-mll/glue"
_SPLITS = {"dev": "validation", "dev_matched": "validation_matched", "dev_mismatched": "validation_mismatched"}


def dataset_split(task: Task, split: str) -> tuple[str, str]:
    """The configuration and the split in which `datasets` and `tensorflow_datasets` keep a split of a task."""
    return ("ax", "test") if split == "ax" else (task.name, _SPLITS.get(split, split))


def dataset_columns(place: str, task: Task, split: str, names: list[str] | None = None) -> Columns:
    """The columns of a split. `names` are those that the dataset itself gives its class numbers; they decide which class a
    number is. Raises UserError if they are not the task's."""
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
    """The task's class of each of a dataset's class names; None if they are not the task's."""
    for known in (task.labels, task.label_names, task.hub_labels):
        plain = list(map(_plain, known))
        if sorted(map(_plain, names)) == sorted(plain):
            return tuple(plain.index(_plain(name)) for name in names)
    return None


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ").replace("-", " ")


def _class(task: Task, order: tuple[int, ...], value: Any) -> float:
    """The class of a label's text, or of a class number that stands for a place in `order`. Raises ValueError for another."""
    for known in (task.labels, task.label_names, task.hub_labels):
        plain = list(map(_plain, known))
        if isinstance(value, str) and _plain(value) in plain:
            return float(plain.index(_plain(value)))
    try:
        place = number(value)
    except ValueError:
        place = -1.0
    if place not in range(len(order)):
        raise ValueError(f"{value!r} is not a class number below {len(order)}, nor one of {', '.join(task.labels)}")
    return float(order[int(place)])


class _DatasetsSource(Source):
    """What the hub and a local folder have in common: Arrow tables, and Features that may name the classes."""

    def __init__(self, name: str, skip_bad_rows: bool = False) -> None:
        self.name, self.skip_bad_rows = name, skip_bad_rows

    def place(self, task: Task, split: str) -> str:
        config, name = dataset_split(task, split)
        return f"{self.name} {config}, split {name}"

    def _rows(self, task: Task, split: str, dataset: Any) -> Rows:
        names = getattr(dataset.features.get("label"), "names", None)
        place = self.place(task, split)
        columns = dataset_columns(place, task, split, names)
        require_columns(place, columns, dataset.column_names)
        used = [name for name in (*columns.text, columns.label) if name]
        table = dataset.select_columns(used).with_format("arrow")[:]
        values = zip(*(table[name].to_pylist() for name in used), strict=True)
        records: Iterable[Record] = (Record(i, dict(zip(used, row, strict=True))) for i, row in enumerate(values))
        return collect(place, records, columns, self.skip_bad_rows, unit="row")


class HubSource(_DatasetsSource):
    """A dataset of the hub. What has been fetched once stays in the cache of `datasets` and needs no network."""

    def __init__(self, name: str, skip_bad_rows: bool = False) -> None:
        super().__init__(name, skip_bad_rows)
        self._fetched: dict[str, Any] = {}

    def has(self, task: Task, split: str) -> bool:
        config, name = dataset_split(task, split)
        return name in self._splits(config)

    def read(self, task: Task, split: str) -> Rows | None:
        config, name = dataset_split(task, split)
        splits = self._splits(config)
        return self._rows(task, split, splits[name]) if name in splits else None

    def _splits(self, config: str) -> Any:
        """The splits of a configuration by name, none if the dataset does not have it."""
        if config not in self._fetched:
            try:
                self._fetched[config] = datasets_library().load_dataset(self.name, config)
            except Exception as error:  # the library raises many kinds; all but one mean that nothing can be had
                if not (isinstance(error, ValueError) and f"'{config}'" in str(error)):
                    raise UserError(
                        f"The dataset {self.name} {config} cannot be had from the hub ({first_line(error)}); give a local "
                        "folder as hf:PATH, the official TSV files as dir:PATH, or prepared TFDS files as tfds:PATH."
                    ) from error
                self._fetched[config] = {}
        return self._fetched[config]


class FolderSource(_DatasetsSource):
    """A folder with one folder a configuration, in which a split is one of

    - a folder that `save_to_disk` wrote, alone or as one of a DatasetDict: `cola/train/`
    - a Parquet file, or several: `cola/train.parquet`, `cola/train-00000-of-00002.parquet`, ...
    - a CSV file with a header, plain or gzipped: `cola/train.csv`
    """

    def has(self, task: Task, split: str) -> bool:
        return bool(self._files(task, split))

    def read(self, task: Task, split: str) -> Rows | None:
        import pyarrow as pa
        import pyarrow.parquet

        datasets = datasets_library()
        paths = self._files(task, split)
        if not paths:
            return None
        if ".csv" in paths[0].suffixes:
            return self._csv_rows(task, split, paths[0])
        parts: list[Any] = []
        try:
            if paths[0].is_dir():
                dataset: Any = datasets.load_from_disk(str(paths[0]))
            else:
                parts = [datasets.Dataset(pyarrow.parquet.read_table(path)) for path in paths]
                dataset = datasets.Dataset(pa.concat_tables([part.data.table for part in parts]))
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
        found = next((path for path in tables if path.is_file()), None)
        return [found] if found else sorted(folder.glob(f"{name}-*-of-*.parquet"))

    def _csv_rows(self, task: Task, split: str, path: Path) -> Rows:
        table = read_table(path)
        columns = dataset_columns(str(path), task, split)
        require_columns(str(path), columns, table.columns or ())
        return collect(str(path), table.records, columns, self.skip_bad_rows)

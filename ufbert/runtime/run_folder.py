"""The files of a run folder: config.json, summary.json, samples.json and when_done.json. (metrics.jsonl: `metrics.py`.)"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ufbert.config import Device, Recipe, RunConfig, Scale
from ufbert.errors import UserError
from ufbert.runtime.files import write_json
from ufbert.runtime.typed import Count, Header, decode, read_typed, read_whole

FORMAT, FORMAT_VERSION = "ufbert-run", 1
"""A folder of a newer format is refused."""
CONFIG_FILE, SUMMARY_FILE, WHEN_DONE_FILE = "config.json", "summary.json", "when_done.json"
SAMPLES_FILE = "samples.json"
COMMANDS = ("when_done", "when_finished", "when_failed")
"""Options that are commands to run at the end of a run."""

Number = Annotated[float, Meta(ge=0, le=1e15)]
"""Seconds, money or a rate."""


@dataclass(frozen=True)
class PreparedText:
    """The rows that a run uses."""

    folder: str
    fingerprint: str
    vocab_size: Count
    """Size that the tokenizer was asked to have; 0 if one was given."""


@dataclass(frozen=True)
class RunFile:
    """config.json of a run folder: the options that it was started with and the configuration that they gave.

    Raises UserError from the constructor if the configuration contradicts itself.
    """

    budget: str
    config: str
    corpus: str
    scale: Scale
    run: RunConfig
    started_at: Number
    """Seconds since 1970."""
    prepared_data: PreparedText | None = None
    """None before the rows are there."""
    init_from: str = ""
    """The model folder that it starts from, and the hash of its files."""
    init_sha256: str = ""
    recipe: Recipe = "crammed"
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    device: Device = "auto"
    heldout: str = ""
    tokenizer: str = ""
    prepared: str = ""
    max_hours_wall: Number = 0.0
    price: Number = 0.0
    tensorboard: bool = False
    reference: str = ""
    out: str = ""
    track: str = ""
    when_done: str = ""
    """A command that was to be run at the end, as are the next two. Folders are handed around, so none ever is."""
    when_finished: str = ""
    when_failed: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions of Python and the libraries, and the machine."""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def options(self) -> dict[str, Any]:
        """The fields that are options of `train`, by name, but for the commands to run at the end."""
        others = (
            "run", "started_at", "prepared_data", "init_sha256", "environment", "format", "format_version", *COMMANDS,
        )  # fmt: skip
        return {name: value for name, value in vars(self).items() if name not in others}

    @property
    def started_from(self) -> str | None:
        """The model that the run starts from, for a reader; None if it starts from random weights."""
        return f"{self.init_from}, sha256 {self.init_sha256}" if self.init_from else None


def read_run(folder: Path) -> RunFile:
    """Read config.json of a run folder. Raises UserError if there is none, or none of this version, or if it is damaged."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise UserError(f"There is no run in {folder}.")
    data = read_whole(path)
    header = decode(data, Header, str(path))
    if header.format != FORMAT:
        raise UserError(f"{folder} is not a run folder of ufbert.")
    if header.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {header.format_version}; this ufbert reads {FORMAT_VERSION}. Use its own."
        )
    return decode(data, RunFile, str(path), exact=True)


def write_run(folder: Path, run: RunFile) -> None:
    """Write config.json of a run folder, whole or not at all. Raises UserError if the disk refuses."""
    write_json(folder / CONFIG_FILE, asdict(run))


@dataclass(frozen=True)
class Summary:
    """summary.json of a run folder, which stands there when the run is finished. Losses are in nats."""

    heldout_loss: float
    unigram_loss: float
    """Held-out loss of guessing by word frequency."""
    spent_seconds: Number
    gain_over_unigram: float | None = None
    averaged_heldout_loss: float | None = None
    """Of the average over past weights, and `last_heldout_loss` that of the last ones, if both were evaluated."""
    last_heldout_loss: float | None = None
    steps: Count = 0
    skipped_updates: Count = 0
    rollbacks: Count = 0
    tokens: Count = 0
    passes: float = 0.0
    budget_seconds: float | None = None
    restarts: Count = 0
    restart_seconds: float = 0.0
    parameters: Count = 0
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    memory_bytes: Count | None = None
    tree_backend: str = ""
    device: str = ""
    devices: Count = 1
    processes: Count = 1
    architecture: str = ""
    """The model as it was trained, at its scale."""
    started_from: str | None = None
    """The model folder that it started from, and `started_heldout_loss` that model's own loss; None for random weights."""
    started_heldout_loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the values by name, without those of an average or of a model to start from that there is none of."""
        optional = ("averaged_heldout_loss", "last_heldout_loss", "started_from", "started_heldout_loss")
        return {name: value for name, value in vars(self).items() if value is not None or name not in optional}


def write_summary(folder: Path, summary: Summary) -> None:
    """Write summary.json of a run folder, whole or not at all. Raises UserError if the disk refuses."""
    write_json(folder / SUMMARY_FILE, summary.to_json())


def read_summary(folder: Path) -> Summary:
    """Read summary.json of a run folder. Raises UserError if there is none or if it is damaged."""
    return read_typed(folder / SUMMARY_FILE, Summary)


@dataclass(frozen=True)
class Guess:
    """A word piece that the model takes for likely, as it is written within a text."""

    token: str
    probability: float


@dataclass(frozen=True)
class Sample:
    """A masked token of held-out text, and what the trained model takes for likely there."""

    text: str
    """With [MASK] for the token in question; other masked tokens are there as they were."""
    token: str
    """The one that stood there."""
    guesses: list[Guess]
    """The likeliest first."""


def write_samples(folder: Path, samples: Sequence[Sample]) -> None:
    """Write samples.json of a run folder, whole or not at all. Raises UserError if the disk refuses."""
    write_json(folder / SAMPLES_FILE, [asdict(sample) for sample in samples])


def read_samples(folder: Path) -> list[Sample]:
    """Read samples.json of a run folder; none if it is absent or damaged, since nothing depends on it."""
    try:
        return read_typed(folder / SAMPLES_FILE, list[Sample])
    except UserError:
        return []


@dataclass(frozen=True)
class WhenDone:
    """when_done.json: the last commands of a run are started, and when (seconds since 1970)."""

    command: str
    """One a line."""
    at: float


def write_when_done(folder: Path, command: str, at: float) -> None:
    """Note that the last commands of a run are started. Raises UserError if the disk refuses."""
    write_json(folder / WHEN_DONE_FILE, asdict(WhenDone(command, at)))

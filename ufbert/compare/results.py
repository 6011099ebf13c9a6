"""The results of a comparison: the format `results.json`, written and read. All that the tables and the page show is in it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from ufbert.bench.encoder_models import ModelTimes
from ufbert.compare.protocol import ComparisonFile
from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.runtime.files import write_json
from ufbert.runtime.typed import Count, Header, decode, read_whole

FORMAT, FORMAT_VERSION = "ufbert-comparison", 1
RESULTS_FILE = "results.json"
Axis = Literal["tokens", "time"]


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation over seeds (n - 1); None for one seed, which has no spread."""
    n: Count


def spread_of(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of the values of some seeds, at least one."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class CurvePoint:
    """A held-out evaluation, averaged over the seeds."""

    tokens: float
    seconds: float
    flops: float
    """Floating-point operations of the training until then."""
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Pretraining:
    """A model trained for equal tokens or for equal time. Losses are in nats."""

    losses: dict[int, float]
    """Held-out loss by seed."""
    loss: Spread
    difference: Spread | None
    """Loss less that of the baseline, paired by seed; None without a seed in common, and for the baseline."""
    to_control: Spread | None
    """Loss less that of its control, paired by seed."""
    accuracy: float
    """Share of the masked tokens that are guessed at the end, a mean over seeds."""
    tokens: float
    seconds: float
    """Of the budget, on average."""
    flops: float
    curve: list[CurvePoint]


@dataclass(frozen=True)
class GlueScore:
    """A model on one dev split of one task. Scores are fractions, not points of a hundred."""

    task: str
    split: str
    title: str
    metric: str
    rows: Count
    seeds: dict[int, float]
    median: float
    majority: float
    """Of always giving the training rows' most frequent answer."""
    difference: float | None = None
    """To the baseline's median; None for the baseline, or where the two cannot be compared."""
    low: float | None = None
    high: float | None = None
    """The 95 % interval of the difference, as glue-table computes it."""
    of_rows: bool = False
    """True if the interval holds the chance of dev rows and seeds, False if that of seeds alone."""


@dataclass(frozen=True)
class Model:
    """A model of the comparison: its size, and what was measured of it."""

    name: str
    options: list[str]
    """As words of a command line."""
    architecture: str
    """As it was trained, at its scale."""
    parameters: Count
    neurons_used: Count
    """Of the feedforward that has most neurons, those that a token uses in inference."""
    neurons: Count
    """And all of them."""
    train_flops: float
    """Of a token in training, forward and backward."""
    infer_flops: float
    """Of a token in inference, forward, only what it uses."""
    control: str = ""
    """The model that has as many plain neurons as this one uses, and is equal otherwise; "" if none is compared."""
    random_twin: str = ""
    """The model whose trees are this one's with random decisions; "" if none is compared."""
    by_tokens: Pretraining | None = None
    by_time: Pretraining | None = None
    usage: dict[str, float] = field(default_factory=dict)
    """What of its trees, leaves or experts was in use on held-out text at the end, means over layers; dead subtrees in all."""
    memory: Count = 0
    """Most bytes in use while it was trained, of the process or the accelerator; 0 if that is not known."""
    glue: list[GlueScore] = field(default_factory=list)
    hours: float = 0.0
    """Machine time of all its cells but the timing."""
    config: ModelConfig | None = None
    """Its architecture to the last option; None in files of before it was recorded."""

    def trained(self, axis: Axis) -> Pretraining | None:
        """Return its training for equal tokens or equal time."""
        return self.by_tokens if axis == "tokens" else self.by_time


@dataclass(frozen=True)
class CellRecord:
    """How a cell was measured, over all processes that worked on it."""

    name: str
    seeds: list[int]
    command: str
    """Of the last."""
    commits: list[str]
    cpu: str
    load_before: float
    load_after: float | None
    seconds: float
    other_work: float | None
    """Cores that other processes kept busy meanwhile, at most of all its processes."""
    beside_other_work: bool
    restarts: Count


@dataclass(frozen=True)
class Comparison:
    """results.json: all of a comparison, of whatever is finished."""

    asked: ComparisonFile
    models: list[Model]
    speed: ModelTimes | None
    cells: list[CellRecord]
    failed: dict[str, str]
    """Reason by cell, of those that failed at last."""
    waiting: list[str]
    """Cells that have not run, or not to their end."""
    notes: list[str]
    """How it was measured, in sentences."""
    unigram_loss: float | None = None
    """Held-out loss of guessing by word frequency, in nats."""
    verdict: list[str] = field(default_factory=list)
    """What it amounts to, in sentences that follow from the numbers."""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def model(self, name: str) -> Model:
        """Return the model of that name."""
        return next(model for model in self.models if model.name == name)


def write_results(folder: Path, comparison: Comparison) -> None:
    """Write results.json, whole or not at all. Raises UserError if the disk refuses."""
    write_json(folder / RESULTS_FILE, asdict(comparison))


def read_results(place: Path) -> Comparison:
    """Read the results of a folder, or of its results.json. Raises UserError for a missing, damaged or other file."""
    path = place / RESULTS_FILE if place.is_dir() else place
    text = read_whole(path)
    if decode(text, Header, str(path)) != Header(FORMAT, FORMAT_VERSION):
        raise UserError(f"{path} is not the results.json of a comparison, of format version {FORMAT_VERSION}.")
    return decode(text, Comparison, str(path))

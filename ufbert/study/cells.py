"""Cells: what of a study stands on disk, which cell comes next, and how the best rate is chosen.

A study's folder holds `study.json` and, for every cell, `cells/NAME/` with `cell.json` (how it was run), `log.txt` (what
`train` printed) and `run/`, an ordinary run folder.
"""

from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import Meta

from ufbert.config.checks import Positive, Seed, shown
from ufbert.errors import UserError
from ufbert.runtime.files import write_json
from ufbert.runtime.run_folder import Number, Summary, read_summary
from ufbert.runtime.typed import Count, read_typed

STUDY_FILE, CELL_FILE, LOG_FILE = "study.json", "cell.json", "log.txt"
FORMAT = 1
Batch = Annotated[int, Meta(ge=1, le=2**24)]


@dataclass(frozen=True)
class VariantFile:
    """A variant, as it was first started."""

    asked: list[str]
    """Its options, as words of a command line."""
    batch_rows: Batch
    """The batch that was decided on, perhaps by a measured speed."""


@dataclass(frozen=True)
class StudyFile:
    """study.json: the protocol that all cells share, and what was asked last."""

    corpus: str
    budget: str
    tokens: Number
    max_tokens: Count
    """Tokens of the corpus that are read, at most."""
    variants: dict[str, VariantFile]
    """In the order of their names on the command line."""
    seeds: list[Seed]
    rates: list[Positive]
    """Empty for each variant's own rate."""
    baseline: str
    tokenizer: str = ""
    heldout: str = ""
    fingerprint: str = ""
    """Of the prepared text; "" before it is there."""
    gap_from: str = ""
    gap_to: str = ""
    format_version: Annotated[int, Meta(ge=FORMAT, le=FORMAT)] = FORMAT

    def __post_init__(self) -> None:
        for flag in ("baseline", "gap_from", "gap_to"):
            if (name := getattr(self, flag)) not in self.variants and (name or flag == "baseline"):
                raise UserError(f"{flag} is {shown(name)}, which is none of its variants.")
        if not self.seeds:
            raise UserError("seeds is empty.")


@dataclass(frozen=True)
class Session:
    """A process that worked on a cell. What has a default is known when it has ended."""

    command: str
    commit: str
    """Commit of the code, with -dirty for changes, or the version of the installed package."""
    cpu: str
    cores: Count
    at_once: Count
    """Cells that ran side by side, at most."""
    began: Number
    """Seconds since 1970."""
    load_before: Number
    """Load average of the last minute."""
    load_after: Number | None = None
    seconds: Number | None = None
    other_work: Number | None = None
    """Cores that other processes kept busy meanwhile, on average; None where the system does not say."""
    exit_code: int | None = None


@dataclass(frozen=True)
class CellFile:
    """cell.json: a cell of a study, and how it was run."""

    variant: str
    rate: Positive | None
    """None for the variant's own."""
    seed: Seed
    words: list[str]
    """Its options as `train` takes them."""
    sessions: list[Session] = field(default_factory=list)
    failed: str = ""
    """Why its last session failed."""


class Cell(NamedTuple):
    """A variant at a rate with a seed."""

    variant: str
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """Its name, which is its folder's."""
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return f"{self.variant}{rate}-seed{self.seed}"

    def folder(self, study: Path) -> Path:
        """Return its folder in that of the study."""
        return study / "cells" / self.name


def read_study(folder: Path) -> StudyFile:
    """Read study.json. Raises UserError if there is none, or if it is damaged."""
    if not (folder / STUDY_FILE).exists():
        raise UserError(f"There is no study in {folder}.")
    return read_typed(folder / STUDY_FILE, StudyFile, exact=True)


def write_study(folder: Path, study: StudyFile) -> None:
    """Write study.json, whole or not at all. Raises UserError if the disk refuses."""
    write_json(folder / STUDY_FILE, asdict(study))


def read_cell(folder: Path) -> CellFile | None:
    """Read cell.json of a cell's folder; None if there is none. Raises UserError if it is damaged."""
    return read_typed(folder / CELL_FILE, CellFile, exact=True) if (folder / CELL_FILE).exists() else None


def write_cell(folder: Path, cell: CellFile) -> None:
    """Write cell.json, whole or not at all. Raises UserError if the disk refuses."""
    write_json(folder / CELL_FILE, asdict(cell))


def summary_of(folder: Path) -> Summary | None:
    """Read the summary of a finished cell; None if it is not finished, or if that is damaged: `train --resume` mends it."""
    try:
        return read_summary(folder / "run")
    except UserError:
        return None


def heldout_loss(folder: Path) -> float | None:
    """Return the held-out loss of a finished cell in nats; None if it is not finished."""
    summary = summary_of(folder)
    return None if summary is None else summary.heldout_loss


def same_study(before: StudyFile, now: StudyFile) -> StudyFile:
    """Return the study to go on with: what `now` asks, with the decisions of `before`. Variants and seeds may be added.

    Raises UserError if the protocol, or a variant of that name, was another.
    """
    for name in ("corpus", "heldout", "tokenizer", "budget", "tokens"):
        ours, theirs = getattr(before, name), getattr(now, name)
        if ours != theirs:
            raise UserError(f"The study was started with {name}={ours or None}; it cannot go on with {theirs or None}.")
    for name, variant in now.variants.items():
        was = before.variants.get(name)
        if was is not None and was.asked != variant.asked:
            raise UserError(
                f"The variant {name} was started with {' '.join(was.asked) or 'no options'}; it cannot go on with "
                f"{' '.join(variant.asked) or 'none'}. Give the new one another name, or take another --out."
            )
    kept = {name: before.variants.get(name, variant) for name, variant in now.variants.items()}
    return replace(now, variants=kept, max_tokens=before.max_tokens, fingerprint=before.fingerprint)


def first_cells(study: StudyFile, variant: str) -> list[Cell]:
    """Return the cells of the first seed, one for each rate."""
    return [Cell(variant, rate, study.seeds[0]) for rate in study.rates or [None]]


def best_rate(study: StudyFile, folder: Path, variant: str) -> Cell | None:
    """Return the cell of the first seed with the lowest held-out loss; None while none is finished."""
    losses = {cell: heldout_loss(cell.folder(folder)) for cell in first_cells(study, variant)}
    finished = {cell: loss if isfinite(loss) else inf for cell, loss in losses.items() if loss is not None}
    return min(finished, key=finished.__getitem__) if finished else None


def open_cells(study: StudyFile, folder: Path, settled: set[Cell]) -> list[Cell]:
    """Return the cells that can run now, in order: the first seed of all variants, then the other seeds at the best rates.

    `settled` are those that this session has brought to an end, good or bad. Others are open unless they are finished.
    """

    def is_open(cell: Cell) -> bool:
        return cell not in settled and summary_of(cell.folder(folder)) is None

    firsts = {name: first_cells(study, name) for name in study.variants}
    cells = [cell for seed_cells in firsts.values() for cell in seed_cells if is_open(cell)]
    for seed in study.seeds[1:]:
        for name, at_rates in firsts.items():
            if any(is_open(cell) for cell in at_rates):
                continue  # the rate is not chosen yet
            best = best_rate(study, folder, name)
            if best is not None and is_open(cell := best._replace(seed=seed)):
                cells.append(cell)
    return cells


def counted_cells(study: StudyFile, folder: Path, variant: str) -> list[Cell]:
    """Return the finished cells of a variant that count: those of each seed at its best rate."""
    best = best_rate(study, folder, variant)
    cells = [best._replace(seed=seed) for seed in study.seeds] if best else []
    return [cell for cell in cells if summary_of(cell.folder(folder)) is not None]


def finished_cells(study: StudyFile, folder: Path) -> list[Cell]:
    """Return the finished cells of the study, those at rates that do not count included."""
    cells = dict.fromkeys(cell for name in study.variants for cell in first_cells(study, name))
    cells |= dict.fromkeys(cell for name in study.variants for cell in counted_cells(study, folder, name))
    return [cell for cell in cells if summary_of(cell.folder(folder)) is not None]


def n_cells(study: StudyFile) -> int:
    """Count the cells of the whole study."""
    return len(study.variants) * (max(1, len(study.rates)) + len(study.seeds) - 1)

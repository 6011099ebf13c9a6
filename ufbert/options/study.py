"""Options of `ufbert study`. Imports no jax."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from ufbert.config import Device
from ufbert.errors import UserError
from ufbert.options.given import seeds_of
from ufbert.options.train import TextOptions


@dataclass(frozen=True, kw_only=True)
class StudyOptions(TextOptions):
    """Compare variants of a pretraining run under one protocol: one text, one tokenizer, one budget of tokens or of time, the
    same seeds. Options of `train` that stand here hold for all variants, and each variant adds its own. Every cell (variant,
    learning rate, seed) is an ordinary run; the same command again goes on with what is not finished."""

    variants: Annotated[tuple[str, ...], Positional] = ()
    """Variants, each a word such as "dense" or "trees: --model.feedforward=tree --model.tree-depth=8"."""
    file: str = ""
    """A .toml or .json file of variants: a table [variants.NAME] each, and [base] for options of all."""
    out: str = ""
    """Folder of the study."""
    tokens: float = 0.0
    """Equal tokens: every variant takes the updates that read so many tokens, such as 10e6. Instead of --budget."""
    budget: str = ""
    """Equal time: every variant gets so long (20m, 1h), or so many updates (200steps). Instead of --tokens."""
    seeds: str = "0"
    """Comma-separated seeds; the differences to the baseline are paired by seed."""
    rates: str = ""
    """Comma-separated learning rates. The first seed runs at each, and the other seeds at the one with the lowest held-out
    loss; the first seed counts at that rate only. Without it, every variant has the rate of its preset, scale and recipe."""
    baseline: str = ""
    """The variant that the others are compared with; by default the first."""
    at_once: int = 1
    """Cells that run side by side and share the processor's cores; their timings then say little."""
    gap_from: str = ""
    """A variant, such as the dense layer of as many neurons as a token uses: 0 of the gap closed."""
    gap_to: str = ""
    """A variant, such as the dense layer of all neurons: the whole gap closed."""
    plan: bool = False
    """Only list the cells and the hours they will take."""
    report: bool = False
    """Only draw the tables and the page of what is there, of --out."""
    device: Device = "auto"
    """cpu, gpu or tpu."""

    def __post_init__(self) -> None:
        if not self.out:
            raise UserError("A study needs --out FOLDER.")
        if not self.report and bool(self.tokens) == bool(self.budget):
            raise UserError("A study needs one budget: --tokens, the same tokens for all, or --budget, the same time.")
        if not 0 <= self.tokens <= 1e13:
            raise UserError(f"--tokens is {self.tokens:g}; it must lie between 0 and 1e13.")
        if not 1 <= self.at_once <= 256:
            raise UserError(f"--at-once is {self.at_once}; it must lie between 1 and 256.")
        if bool(self.gap_from) != bool(self.gap_to):
            raise UserError("A gap needs two ends: --gap-from and --gap-to, each a variant.")
        _ = self.seed_list, self.rate_list  # refuse a wrong list before anything is read

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds as numbers. Raises UserError if they are no seeds."""
        return seeds_of(self.seeds) or (0,)

    @property
    def rate_list(self) -> tuple[float, ...]:
        """The learning rates as numbers, () for each variant's own. Raises UserError if they are no rates."""
        try:
            rates = tuple(float(part) for part in self.rates.split(",")) if self.rates else ()
        except ValueError as error:
            raise UserError(f"--rates {self.rates[:60]!r} is not a list of numbers.") from error
        if len({f"{rate:g}" for rate in rates}) < len(rates):
            raise UserError(f"--rates {self.rates[:60]} names a rate twice.")
        if wrong := [rate for rate in rates if not 0 < rate < 1e6]:
            raise UserError(f"--rates names {wrong[0]:g}; a learning rate must be above 0.")
        return rates

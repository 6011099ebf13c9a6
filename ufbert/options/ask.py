"""Options of `ufbert fill-mask` and `ufbert predict`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from ufbert.config import Device
from ufbert.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """Options of both commands."""

    model: str
    """Model folder; mini for the model that comes with ufbert, hf:OWNER/NAME[@REVISION] for one on the Hugging Face hub."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Type of the weights of linear layers and trees, rounded when the model is loaded. Narrow ones are read and multiplied
    faster, and send some tokens another way through a tree (how many is printed). auto takes int8 for a folder that `ufbert
    compress --method quantize` made, which holds it, and else float32."""
    exact_routing: bool = False
    """Decide turns in trees by the unrounded weights, so that no token goes another way."""
    truncate: bool = False
    """Cut texts that are longer than the model reads, instead of refusing them."""
    threads: int = 0
    """Threads on a CPU; 0 takes all cores."""
    device: Device = "auto"
    """cpu, gpu or tpu."""

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= 4096:
            raise UserError(f"--threads is {self.threads}; it must lie between 0 and 4096.")


@dataclass(frozen=True, kw_only=True)
class FillMaskOptions(AskOptions):
    """Print the likeliest word pieces for each [MASK] of a text."""

    text: Annotated[str, Positional]
    """Text with at least one [MASK]."""
    top: int = 5
    """Number of guesses to print."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top < 2**31:
            raise UserError(f"--top is {self.top}; it must lie between 1 and 2^31 - 1.")


@dataclass(frozen=True, kw_only=True)
class PredictOptions(AskOptions):
    """Print a line for each text, or pair of texts: its label and the label's probability, or a value. Labels that do not
    exclude each other are all printed."""

    texts: Annotated[tuple[str, ...], Positional] = ()
    """Texts; two by two for a model that was fine-tuned on pairs."""
    lines: str = ""
    """UTF-8 file with a text on each line (two, with a tab between them, for pairs), each of which gets a line: label, tab,
    probability. Only newlines end a line."""
    pairs: bool = False
    """Take texts in pairs, for a model folder that does not say if its task is on pairs (those imported from other
    libraries). A folder that says so needs no option."""
    top: int = 1
    """Labels to print for each text, the likeliest first; 0 prints all."""
    on_error: Literal["stop", "skip"] = "stop"
    """For a text that is empty, too long or not UTF-8: stop with nothing printed, or skip it. A skipped text gets an empty
    line and is named on stderr, and the exit status is 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts and self.lines:
            raise UserError("Give texts or --lines, not both.")
        if not self.texts and not self.lines:
            raise UserError("Give at least one text, or --lines FILE.")
        if not 0 <= self.top < 2**31:
            raise UserError(f"--top is {self.top}; it must lie between 0 and 2^31 - 1.")

"""`ufbert fill-mask` and `ufbert predict`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ufbert.device import Device, use_device
from ufbert.errors import UserError

if TYPE_CHECKING:
    from ufbert.inference.predictor import Predictor


def _positional() -> Any:
    import tyro

    return tyro.conf.Positional


@dataclass(frozen=True)
class FillMaskOptions:
    """Print the likeliest word pieces for each [MASK] of a text."""

    model: str
    """Model folder."""
    text: Annotated[str, _positional()]
    """Text with at least one [MASK]."""
    top: int = 5
    """How many guesses to print."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type of the trees' weights. Narrow ones are read faster, send some tokens another way (how many is printed), and are
    rounded when the model is loaded; the rest computes in float32 on a CPU."""
    exact_routing: bool = False
    """Decide turns by the unrounded weights, so that no token goes another way."""
    threads: int = 0
    """Threads on a CPU; 0 takes all cores."""
    device: Device = "auto"
    """cpu, gpu or tpu."""


@dataclass(frozen=True)
class PredictOptions:
    """Print the label of a text, or of a pair of texts, and its probability."""

    model: str
    """Fine-tuned model folder."""
    texts: Annotated[tuple[str, ...], _positional()]
    """One text, or two for a task on pairs."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type of the trees' weights. Narrow ones are read faster, send some tokens another way (how many is printed), and are
    rounded when the model is loaded; the rest computes in float32 on a CPU."""
    exact_routing: bool = False
    """Decide turns by the unrounded weights, so that no token goes another way."""
    threads: int = 0
    """Threads on a CPU; 0 takes all cores."""
    device: Device = "auto"
    """cpu, gpu or tpu."""


def _load(options: FillMaskOptions | PredictOptions, texts: Sequence[str]) -> "Predictor":
    """The model that the options name; says, of narrow weights, how many of the texts' tokens they send another way."""
    use_device(options.device, threads=options.threads)
    from ufbert.inference.predictor import Predictor

    predictor = Predictor.load(options.model, options.dtype, options.exact_routing)
    if options.dtype != "float32":
        share = predictor.changed_routes(texts)
        print(f"{options.dtype} weights send {share:.2%} of these tokens another way through a tree", file=sys.stderr)
    return predictor


def fill_mask_command(args: list[str]) -> None:
    """`ufbert fill-mask ARGS`."""
    import tyro

    options = tyro.cli(FillMaskOptions, args=args, prog="ufbert fill-mask")
    if options.top < 1:
        raise UserError(f"--top is {options.top}; it must be at least 1.")
    predictor = _load(options, [options.text])
    for number, guesses in enumerate(predictor.fill_mask(options.text, options.top), start=1):
        print(f"mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:7.2%}  {guess.token}")


def predict_command(args: list[str]) -> None:
    """`ufbert predict ARGS`."""
    import tyro

    options = tyro.cli(PredictOptions, args=args, prog="ufbert predict")
    if len(options.texts) not in (1, 2):
        raise UserError(f"predict takes one text, or two for a task on pairs, not {len(options.texts)}.")
    answer = _load(options, options.texts).predict(*options.texts)
    print(answer.label if answer.probability is None else f"{answer.label}  {answer.probability:.2%}")

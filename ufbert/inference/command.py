"""`ufbert fill-mask` and `ufbert predict`."""

from dataclasses import dataclass
from typing import Annotated, Any

from ufbert.device import Device, use_device
from ufbert.errors import UserError


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
    device: Device = "auto"
    """cpu, gpu or tpu."""


@dataclass(frozen=True)
class PredictOptions:
    """Print the label of a text, or of a pair of texts, and its probability."""

    model: str
    """Fine-tuned model folder."""
    texts: Annotated[tuple[str, ...], _positional()]
    """One text, or two for a task on pairs."""
    device: Device = "auto"
    """cpu, gpu or tpu."""


def fill_mask_command(args: list[str]) -> None:
    """`ufbert fill-mask ARGS`."""
    import tyro

    options = tyro.cli(FillMaskOptions, args=args, prog="ufbert fill-mask")
    if options.top < 1:
        raise UserError(f"--top is {options.top}; it must be at least 1.")
    use_device(options.device)
    from ufbert.inference.predictor import Predictor

    for number, guesses in enumerate(Predictor.load(options.model).fill_mask(options.text, options.top), start=1):
        print(f"mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:7.2%}  {guess.token}")


def predict_command(args: list[str]) -> None:
    """`ufbert predict ARGS`."""
    import tyro

    options = tyro.cli(PredictOptions, args=args, prog="ufbert predict")
    if len(options.texts) not in (1, 2):
        raise UserError(f"predict takes one text, or two for a task on pairs, not {len(options.texts)}.")
    use_device(options.device)
    from ufbert.inference.predictor import Predictor

    answer = Predictor.load(options.model).predict(*options.texts)
    print(answer.label if answer.probability is None else f"{answer.label}  {answer.probability:.2%}")

"""`ufbert fill-mask` and `ufbert predict`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ufbert.config import Device
from ufbert.data.text_files import read_lines
from ufbert.errors import UserError
from ufbert.runtime.device import use_device

if TYPE_CHECKING:
    from ufbert.inference.predictor import Predictor


def _positional() -> Any:
    import tyro

    return tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """What both commands know."""

    model: str
    """Model folder."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Type of the weights of linear layers and trees, rounded when the model is loaded. Narrow ones are read and multiplied
    faster, and send some tokens another way through a tree (how many is printed)."""
    exact_routing: bool = False
    """Decide turns in trees by the unrounded weights, so that no token goes another way."""
    truncate: bool = False
    """Cut texts that are longer than the model reads, instead of refusing them."""
    threads: int = 0
    """Threads on a CPU; 0 takes all cores."""
    device: Device = "auto"
    """cpu, gpu or tpu."""


@dataclass(frozen=True, kw_only=True)
class FillMaskOptions(AskOptions):
    """Print the likeliest word pieces for each [MASK] of a text."""

    text: Annotated[str, _positional()]
    """Text with at least one [MASK]."""
    top: int = 5
    """How many guesses to print."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(AskOptions):
    """Print the label of a text, or of a pair of texts, and its probability; or those of a file's lines. Labels that do not
    exclude each other are all printed."""

    texts: Annotated[tuple[str, ...], _positional()] = ()
    """One text, or two for a task on pairs."""
    lines: str = ""
    """UTF-8 file with a text on each line (two, with a tab between them, for a task on pairs), each of which gets a line:
    label, tab, probability. Only newlines end a line."""


def _load(options: AskOptions, texts: Sequence[str]) -> "Predictor":
    """The model that the options name; says, of narrow weights, how many of the texts' tokens they send another way."""
    use_device(options.device, threads=options.threads)
    from ufbert.hub.folder import load_model
    from ufbert.inference.predictor import Predictor, changed_routes

    model = load_model(options.model, lazily=True)
    predictor = Predictor(model, options.dtype, options.exact_routing, truncate=options.truncate)
    if options.dtype != "float32" and not options.exact_routing and "tree" in model.config.feedforward:
        share = changed_routes(predictor.engine, model, texts[:100])
        print(f"{options.dtype} weights send {share:.2%} of these tokens another way through a tree", file=sys.stderr)
    return predictor


def fill_mask_command(args: list[str]) -> None:
    """`ufbert fill-mask ARGS`."""
    import tyro

    options = tyro.cli(FillMaskOptions, args=args, prog="ufbert fill-mask")
    if not 1 <= options.top < 2**31:
        raise UserError(f"--top is {options.top}; it must lie between 1 and 2^31 - 1.")
    predictor = _load(options, [options.text])
    for number, guesses in enumerate(predictor.fill_mask([options.text], options.top)[0], start=1):
        print(f"mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:7.2%}  {guess.token}")


def predict_command(args: list[str]) -> None:
    """`ufbert predict ARGS`."""
    import tyro

    options = tyro.cli(PredictOptions, args=args, prog="ufbert predict")
    if options.lines:
        return _predict_lines(options)
    if len(options.texts) not in (1, 2):
        raise UserError(
            f"predict takes one text, or two for a task on pairs, not {len(options.texts)}; or --lines FILE."
        )
    text, *pair = options.texts
    predictor = _load(options, options.texts)
    if predictor.has_independent_labels:
        for label, probability in predictor.label_probabilities([text], pair or None)[0].items():
            print(f"{label}  {probability:.2%}")
        return
    answer = predictor.classify([text], pair or None)[0]
    print(answer.label if answer.probability is None else f"{answer.label}  {answer.probability:.2%}")


def _predict_lines(options: PredictOptions) -> None:
    if options.texts:
        raise UserError("Give texts or --lines, not both.")
    parts = [line.split("\t") for line in read_lines(Path(options.lines))]
    columns = len(parts[0]) if parts else 1
    for number, found in enumerate(parts, start=1):
        if len(found) != columns or columns > 2:
            wanted = "1 or 2 are" if columns > 2 else f"{columns}, as in line 1, {'is' if columns == 1 else 'are'}"
            raise UserError(
                f"{options.lines}, line {number}: {len(found)} texts parted by tabs, where {wanted} wanted."
            )
        if not all(part.strip() for part in found):
            raise UserError(f"{options.lines}, line {number}: a text is empty; fill it, or take the line out.")
    if not parts:
        raise UserError(f"{options.lines} has no lines.")
    texts = [found[0] for found in parts]
    predictor = _load(options, texts)
    pairs = [found[1] for found in parts] if columns == 2 else None
    if predictor.has_independent_labels:
        for odds in predictor.label_probabilities(texts, pairs):
            print("\t".join(f"{label}\t{probability:.4f}" for label, probability in odds.items()))
        return
    for answer in predictor.classify(texts, pairs):
        print(answer.label if answer.probability is None else f"{answer.label}\t{answer.probability:.4f}")

"""`ufbert fill-mask` and `ufbert predict`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ufbert.data.text_files import read_lines
from ufbert.errors import UserError
from ufbert.hub.folder import load_model
from ufbert.inference.predictor import Predictor, changed_routes
from ufbert.options.ask import AskOptions, FillMaskOptions, PredictOptions
from ufbert.runtime.device import use_device


def _load(options: AskOptions, texts: Sequence[str]) -> Predictor:
    """Load the model that the options name, and print how many of the texts' tokens its narrow weights route otherwise."""
    use_device(options.device, threads=options.threads)
    model = load_model(options.model, lazily=True)
    predictor = Predictor(model, options.dtype, options.exact_routing, truncate=options.truncate)
    if options.dtype != "float32" and not options.exact_routing and "tree" in model.config.feedforward:
        share = changed_routes(predictor.engine, model, texts[:100])
        print(f"{options.dtype} weights send {share:.2%} of these tokens another way through a tree", file=sys.stderr)
    return predictor


def fill_mask(options: FillMaskOptions) -> None:
    """Print the likeliest word pieces for each [MASK] of a text. Raises UserError if there is none."""
    predictor = _load(options, [options.text])
    for number, guesses in enumerate(predictor.fill_mask([options.text], options.top)[0], start=1):
        print(f"mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:7.2%}  {guess.token}")


def predict(options: PredictOptions) -> None:
    """Print the label of a text or a pair, or those of a file's lines. Raises UserError for texts that cannot be read."""
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

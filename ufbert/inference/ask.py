"""`ufbert fill-mask` and `ufbert predict`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ufbert.data.text_files import read_lines
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, load_model
from ufbert.inference.predictor import Answer, Predictor, changed_routes
from ufbert.inference.questions import BadText, Failure, text_fault
from ufbert.options.ask import AskOptions, FillMaskOptions, PredictOptions
from ufbert.runtime.console import phase
from ufbert.runtime.device import use_device

NAMED = 20
"""Bad texts that are named; the rest is only counted."""


class Item(NamedTuple):
    """A text of the command line, or a line of a file."""

    place: str
    """`text 2`, or `FILE, line 2`."""
    texts: tuple[str, ...]
    """One text, or two of a pair."""
    fault: str
    """Why it cannot be answered, as a clause, or an empty string."""


def fill_mask(options: FillMaskOptions) -> None:
    """Print the likeliest word pieces for each [MASK] of a text. Raises UserError if there is none."""
    use_device(options.device, threads=options.threads)
    model = load_model(options.model, lazily=True)
    with phase("packing the weights"):
        predictor = _predictor(options, model, [options.text])
    with phase("answering"):
        masks = predictor.fill_mask(options.text, options.top)
    for number, guesses in enumerate(masks, start=1):
        print(f"mask {number}")
        for guess in guesses:
            print(f"  {guess.probability:7.2%}  {guess.token}")


def predict(options: PredictOptions) -> None:
    """Print a line for each text or pair, or for each line of a file: its label, and the label's probability.

    Raises UserError for texts that do not fit the model's task, and for the first text that has no answer. With `--on-error
    skip` such a text gets an empty line, and UserError is raised at the end.
    """
    lines = read_lines(Path(options.lines), keep_bad=options.on_error == "skip") if options.lines else []
    if options.lines and not lines:
        raise UserError(f"{options.lines} has no lines.")
    use_device(options.device, threads=options.threads)
    model = load_model(options.model, lazily=True)
    are_pairs = _are_pairs(options, model)
    items = _file_items(options.lines, lines, are_pairs, model) if options.lines else _items(options, are_pairs, model)
    bad = [item for item in items if item.fault]
    if bad and options.on_error == "stop":
        raise UserError(f"{bad[0].place}: {bad[0].fault}.")
    good = [item for item in items if not item.fault]
    with phase("packing the weights"):
        predictor = _predictor(options, model, [item.texts[0] for item in good])
    with phase(f"answering {len(good):,} texts"):
        answers = iter(_answers(options, predictor, good))
    n_failed = 0
    for item in items:
        answer = item.fault or next(answers)
        if isinstance(answer, Failure):
            answer = _clause(answer.pair is not None, answer.reason)
        if isinstance(answer, str):
            n_failed += 1
            if n_failed <= NAMED:
                print(f"{item.place}: {answer}.", file=sys.stderr)
        print("" if isinstance(answer, str) else _written(answer, options, len(items)))
    if n_failed:
        raise UserError(f"{n_failed:,} of {len(items):,} texts have no answer; their lines are empty.")


def _predictor(options: AskOptions, model: ModelFolder, texts: Sequence[str]) -> Predictor:
    """Make the predictor, and print how many of the texts' tokens its narrow weights route otherwise."""
    predictor = Predictor(model, options.dtype, options.exact_routing, truncate=options.truncate)
    narrow = predictor.engine.dtype
    rounds_routes = narrow != "float32" and not options.exact_routing and "tree" in model.config.feedforward
    if texts and rounds_routes and model.quantized is None:
        share = changed_routes(predictor.engine, model, texts[:100])
        print(f"{narrow} weights send {share:.2%} of these tokens another way through a tree", file=sys.stderr)
    return predictor


def _are_pairs(options: PredictOptions, model: ModelFolder) -> bool | None:
    """Decide if texts come in pairs; None if neither the model folder nor an option says so.

    Raises UserError for `--pairs` with a model of single texts.
    """
    known = None if model.task is None else model.task.pairs
    if options.pairs and known is False:
        raise UserError(f"This model's task ({_name(model)}) is on single texts; leave --pairs out.")
    return options.pairs or known


def _items(options: PredictOptions, are_pairs: bool | None, model: ModelFolder) -> list[Item]:
    """Return the texts of the command line, two by two if they are pairs. Raises UserError if their number does not fit."""
    texts = options.texts
    if are_pairs and len(texts) % 2:
        why = (
            "--pairs asks for pairs of texts"
            if options.pairs
            else f"This model's task ({_name(model)}) is on pairs of texts"
        )
        count = "1 text is" if len(texts) == 1 else f"{len(texts)} texts are"
        raise UserError(f'{why}, and {count} given. Give texts two by two: "first" "second".')
    if are_pairs is None and len(texts) > 1 and model.task is not None:
        print(
            "this model folder does not say if its task is on pairs; each text is answered by itself (--pairs takes them two "
            "by two)",
            file=sys.stderr,
        )
    step = 2 if are_pairs else 1
    groups = [texts[at : at + step] for at in range(0, len(texts), step)]
    kind = "pair" if are_pairs else "text"
    return [Item(f"{kind} {number}", group, _fault(group)) for number, group in enumerate(groups, start=1)]


def _file_items(file: str, lines: Sequence[str], are_pairs: bool | None, model: ModelFolder) -> list[Item]:
    """Return the lines of a file, each a text, or two with a tab between them."""
    parts = [tuple(line.split("\t")) for line in lines]
    first = len(parts[0])
    columns = min(first, 2) if are_pairs is None else 1 + are_pairs
    why = ", as in line 1," if are_pairs is None and first == columns else ""
    items = []
    for number, texts in enumerate(parts, start=1):
        fault = _fault(texts)
        if len(texts) != columns:
            count = "1 text" if len(texts) == 1 else f"{len(texts)} texts parted by tabs"
            fault = f"{count}, where {columns}{why} {'is' if columns == 1 else 'are'} wanted"
            if are_pairs is False:
                fault += f", since this model's task ({_name(model)}) is on single texts; write a blank for a tab"
        items.append(Item(f"{file}, line {number}", texts, fault))
    return items


def _name(model: ModelFolder) -> str:
    return model.task.name if model.task else ""


def _fault(texts: tuple[str, ...]) -> str:
    reason = text_fault(*texts[:2])
    return reason and _clause(len(texts) > 1, reason)


def _clause(is_pair: bool, reason: str) -> str:
    return f"the {'pair' if is_pair else 'text'} {reason}"


def _answers(
    options: PredictOptions, predictor: Predictor, items: Sequence[Item]
) -> list[float | list[Answer] | Failure]:
    """Ask for each item: a value, or the labels that were asked for. Raises UserError, which names the place of a bad text."""
    if not items:
        return []
    texts = [item.texts[0] for item in items]
    pairs = [item.texts[1] for item in items] if len(items[0].texts) == 2 else None
    is_value = predictor.task is not None and not predictor.task.labels
    top = 0 if is_value and options.top == 1 else options.top or None
    on_error = "return" if options.on_error == "skip" else "raise"
    try:
        if predictor.has_independent_labels:
            odds = predictor.label_probabilities(texts, pairs, on_error=on_error)
            return [each if isinstance(each, Failure) else [Answer(*pair) for pair in each.items()] for each in odds]
        return predictor.classify(texts, pairs, top=top, on_error=on_error)
    except BadText as error:
        raise UserError(f"{items[error.index].place}: {_clause(pairs is not None, error.reason)}.") from None


def _written(answer: float | list[Answer], options: PredictOptions, n_items: int) -> str:
    """Write an answer: in columns for a file, for a reader otherwise."""
    if not isinstance(answer, list):
        return f"{answer:.6g}"
    if options.lines:
        return "\t".join(f"{label}\t{probability:.4f}" for label, probability in answer)
    return ("\n" if n_items == 1 else "  ").join(f"{label}  {probability:.2%}" for label, probability in answer)

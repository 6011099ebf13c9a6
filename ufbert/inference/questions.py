"""Texts as they are asked for: one or a list, single or in pairs; and the reasons why one of them has no answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ufbert.data.encode import Encoded
from ufbert.errors import UserError

OnError = Literal["raise", "return"]
"""For a text that has no answer: raise BadText, or return a Failure in its place."""


@dataclass(frozen=True)
class Failure:
    """The place of a text that has no answer, in a list of answers."""

    text: str
    pair: str | None
    """The second text, of a pair."""
    reason: str
    """The rest of a sentence that begins with the text, for example "is empty"."""

    def __str__(self) -> str:
        return f"{quoted(self.text, self.pair)} {self.reason}."


class BadText(UserError):
    """A text that has no answer. It is at place `index`, from 0, of those that were asked for."""

    def __init__(self, sentence: str, index: int, reason: str) -> None:
        super().__init__(sentence)
        self.index, self.reason = index, reason


class Questions(NamedTuple):
    """Texts, or pairs of texts."""

    texts: list[str]
    pairs: list[str] | None
    """The second texts."""
    is_one: bool
    """True if one text was asked for by itself, so that its answer comes by itself."""

    def pair(self, i: int) -> str | None:
        """Return the second text at place i, if texts come in pairs."""
        return None if self.pairs is None else self.pairs[i]

    def error(self, i: int, reason: str) -> BadText:
        """Make the exception for the text at place i."""
        where = quoted(self.texts[i], self.pair(i))
        kind = "text" if self.pairs is None else "pair"
        subject = f"The {kind} {where}" if self.is_one else f"{kind.capitalize()} {i + 1}, {where},"
        return BadText(f"{subject} {reason}.", i, reason)


def questions(texts: str | Sequence[str], pairs: str | Sequence[str] | None = None) -> Questions:
    """Gather texts, or texts and the second text of each. A string is one text.

    Raises UserError if texts and second texts do not go together.
    """
    is_one = isinstance(texts, str)
    if pairs is not None and isinstance(pairs, str) != is_one:
        raise UserError("A text goes with one second text, and a list of texts with a list of second texts.")
    firsts, seconds = _listed(texts), None if pairs is None else _listed(pairs)
    if seconds is not None and len(seconds) != len(firsts):
        raise UserError(f"There are {len(firsts)} texts and {len(seconds)} second texts.")
    return Questions(firsts, seconds, is_one)


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


class Answers:
    """Answers in the making, each at the place of its text. Raises BadText for a text without one, unless told to return it."""

    def __init__(self, asked: Questions, on_error: OnError) -> None:
        self.asked, self.on_error = asked, on_error
        self.open = list(range(len(asked.texts)))
        """Places without an answer or a failure."""
        self._places: list[Any] = [None] * len(asked.texts)

    def refuse(self, reasons: Callable[[int, int], str]) -> list[int]:
        """Close the open places of bad texts, and return the numbers of the others among the places that were open.

        `reasons(number, i)` says what is wrong with the text at place i, or is empty.
        """
        kept = []
        for number, i in enumerate(self.open):
            if not (reason := reasons(number, i)):
                kept.append(number)
            elif self.on_error == "raise":
                raise self.asked.error(i, reason)
            else:
                self._places[i] = Failure(self.asked.texts[i], self.asked.pair(i), reason)
        self.open = [self.open[number] for number in kept]
        return kept

    def close(self, answers: Sequence[Any]) -> Any:
        """Put answers into the open places, and return all: a list, or the one answer that was asked for."""
        for i, answer in zip(self.open, answers, strict=True):
            self._places[i] = answer
        return self._places[0] if self.asked.is_one else self._places


def text_fault(text: str, pair: str | None = None) -> str:
    """Return why no model can read a text or pair, or an empty string."""
    if not text.strip() or (pair is not None and not pair.strip()):
        return "is empty" if pair is None else "has an empty text"
    try:
        f"{text}{pair}".encode()
    except UnicodeEncodeError:
        return "is not valid Unicode (was its file UTF-8?)"
    return ""


def picked(rows: Encoded, numbers: Sequence[int]) -> Encoded:
    """Return the rows of these numbers."""
    return rows._replace(ids=[rows.ids[n] for n in numbers], type_ids=[rows.type_ids[n] for n in numbers])


def quoted(text: str, pair: str | None = None) -> str:
    """Quote the beginning of a text, or of both of a pair, for a message."""
    return " and ".join(
        repr(part if len(part) <= 40 else part[:37] + "...") for part in (text, pair) if part is not None
    )

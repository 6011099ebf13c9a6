"""The exceptions a user is meant to read: a sentence that says what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input or a wrong place. The command line prints `error: <sentence>` and exits with status 2."""


class Interrupted(Exception):
    """Asked to stop by a signal, and all is saved. The command line prints the sentence and exits with `code`, 128 + the
    signal's number."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


def near_miss(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return "did you mean X?" with the nearest of the known names, or else a list of them, to end a sentence with."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(names)}."

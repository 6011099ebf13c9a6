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


def near_miss(name: str, known: Iterable[str]) -> str:
    """Return "did you mean NAME?" for the known name that is most like a mistyped one, or the list of all if none is."""
    by_key = {key.lower(): key for key in known}
    near = difflib.get_close_matches(name.lower(), by_key, n=1, cutoff=0.5)
    return f"did you mean {by_key[near[0]]}?" if near else f"known are {', '.join(by_key.values())}."


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, without a full stop, or the exception's type if there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

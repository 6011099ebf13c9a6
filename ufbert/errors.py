"""The exceptions a user is meant to read: a sentence that says what was wrong, where, and what to do."""


class UserError(Exception):
    """Wrong input or a wrong place. The command line prints `error: <sentence>` and exits with status 2."""


class Interrupted(Exception):
    """Asked to stop by a signal, and all is saved. The command line prints the sentence and exits with `code`, 128 + the
    signal's number."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code

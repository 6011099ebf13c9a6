"""The one exception a user is meant to read: a sentence that says what was wrong, where, and what to do."""


class UserError(Exception):
    """Wrong input or a wrong place. The command line prints `error: <sentence>` and exits with status 2."""

"""The commands that a person wants run when a run has ended, however it ended."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from ufbert.errors import Interrupted, UserError
from ufbert.runtime import crash, signals


def exit_code(error: BaseException) -> int:
    """Return the status that the command line ends with after an error."""
    if isinstance(error, Interrupted | signals.Stopped):
        return error.code
    if isinstance(error, BrokenPipeError):
        return 141
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError | OSError) else crash.EXIT_CODE


@contextmanager
def last_commands(
    commands: Callable[[int], list[str]],
    folder: Path,
    release: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda commands: None,
) -> Generator[None]:
    """Run the shell commands that `commands` has for an exit status once the block has ended, well or badly.

    `release` is called first, as a command may end the machine. Before that, if the block has ended well, `note` gets the
    commands, one a line. If a library holds the process up after a signal, they run just before it is ended. Raises UserError
    if the block ended well and a command did not; after a block that failed, that is printed.
    """
    once = threading.Lock()

    def run(code: int) -> list[str]:
        return _run_all(commands(code), code, folder) if once.acquire(blocking=False) else []

    signals.WATCHER.at_end = run
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        release()
        if commands(code) and isinstance(error, Exception):
            _say(f"the run has not ended well: {error or type(error).__name__}")
        with signals.WATCHER.waiting():
            for complaint in run(code):
                _say(complaint)
        raise
    else:
        if commands(0):
            note("\n".join(commands(0)))  # one of them may end this process
        release()
        with signals.WATCHER.waiting():
            complaints = run(0)
        if complaints:
            raise UserError(f"The run is saved in {folder}, but {'; '.join(complaints)}.")
    finally:
        signals.WATCHER.at_end = None


def _run_all(commands: list[str], code: int, folder: Path) -> list[str]:
    """Run commands that find the run's exit status and folder in their environment, and return what failed."""
    environment = {**os.environ, "UFBERT_EXIT_CODE": str(code), "UFBERT_RUN": str(folder.absolute())}
    complaints = []
    for command in commands:
        _say(f"when done: {command}")
        status = subprocess.run(command, shell=True, env=environment).returncode
        if status:
            complaints.append(f"`{command}` ended with status {status}")
    return complaints


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # the console may be gone, and the commands must run all the same
        print(text, file=sys.stderr, flush=True)

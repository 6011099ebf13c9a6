"""The last net: an error that nobody foresaw becomes a sentence, and a file for whoever mends it."""

import contextlib
import os
import platform
import sys
import tempfile
import traceback
from pathlib import Path

from ufbert.runtime.files import user_cache

EXIT_CODE = 70
"""Exit status of a command that ended with an error nobody foresaw: EX_SOFTWARE of sysexits.h."""
NET_OFF = "UFBERT_NO_NET"
"""Variable of the environment that has such errors raised as they are."""


def report_crash(error: BaseException) -> str:
    """Write an error's traceback to a file and return a sentence that names it.

    The file lies in `crashes/` of the user's cache, or else in the system's folder for temporary files. Raises `error` itself
    if $UFBERT_NO_NET is set.
    """
    if os.environ.get(NET_OFF):
        raise error
    lines = [f"{' '.join(sys.argv)}\nPython {platform.python_version()} on {platform.platform()}\n\n"]
    text = "".join([*lines, *traceback.format_exception(error)])
    cause = (str(error).strip().splitlines() or [""])[0][:200]
    told = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
    for folder in (user_cache() / "crashes", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix="ufbert-", suffix=".txt", dir=folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return f"{told}. This is a fault of ufbert, or of a library; please report it with the traceback in {name}."
    return f"{told}. This is a fault of ufbert, or of a library; its traceback could not be written anywhere."

"""Where ufbert keeps what it can make again."""

import os
import re
from pathlib import Path


def user_cache() -> Path:
    """$UFBERT_CACHE, or ufbert/ in the user's cache folder: prepared text and compiled steps."""
    own = os.environ.get("UFBERT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ufbert"


def expand_home(option: str) -> str:
    """An option with the user's home folder for every `~` that begins a path in it, as in `--out=~/run` or
    `text:~/a.txt,~/b.txt`: a shell does that for none but a whole word."""
    return re.sub(r"(^|[=:,])~(?=/|$)", lambda start: start[1] + os.path.expanduser("~"), option)

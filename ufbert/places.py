"""Where ufbert keeps what it can make again."""

import os
from pathlib import Path


def user_cache() -> Path:
    """$UFBERT_CACHE, or ufbert/ in the user's cache folder: prepared text and compiled steps."""
    own = os.environ.get("UFBERT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ufbert"

"""How a result came about: the command, the commit of the code, the processor and its load."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROVENANCE = ("command", "commit", "processor", "load")
"""What every page says of its result first."""


def environment(words: Sequence[str], packages: Sequence[str]) -> dict[str, str]:
    """Return, for a reader, how a result comes about: the command in `words`, commit, processor, load, and versions.

    `load` is the average of the last minute: processes that ran or wanted to, those of others included.
    """
    facts = machine_facts()
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "command": shlex.join(words),
        "commit": commit(),
        "processor": f"{facts['cpu']}, {facts['cores']} cores to use",
        "load": f"{facts['load']:.2f} at the start",
        "python": platform.python_version(),
        "machine": platform.platform(),
        **versions,
    }


def machine_facts() -> dict[str, Any]:
    """Return the processor's name, the cores that this process may use, and the load of the last minute."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else platform.machine(), "cores": cores, "load": os.getloadavg()[0]}


def commit() -> str:
    """Return the commit that the package's code lies in, with -dirty if it was changed, or the package's version."""
    package = Path(__file__).parent.parent
    git = ["git", "-C", str(package)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "cli.py"], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("ufbert")

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
VECTORS = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "bfloat16"}
"""Names of the instructions on wide vectors, by their flags in /proc/cpuinfo."""


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = cpu_name(info.read_text(encoding="utf-8")) if info.is_file() else ""
    return {"cpu": name or platform.machine(), "cores": cores, "load": os.getloadavg()[0]}


def cpu_name(info: str) -> str:
    """Return the name of the first processor in the text of /proc/cpuinfo; "" if it has none.

    Virtual machines call processors of several generations by one name, so the family, the model and the widest vectors stand
    behind it: "AMD EPYC (family 26, model 2; AVX-512, VNNI, bfloat16)".
    """
    first = info.partition("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    if not fields.get("model name"):
        return ""
    flags = fields.get("flags", "").split()
    sets = [name for flag, name in VECTORS.items() if flag in flags] or ["AVX2"] * ("avx2" in flags)
    number = (
        f"family {fields['cpu family']}, model {fields['model']}" if {"cpu family", "model"} <= fields.keys() else ""
    )
    detail = "; ".join(part for part in (number, ", ".join(sets)) if part)
    return fields["model name"] + (f" ({detail})" if detail else "")


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

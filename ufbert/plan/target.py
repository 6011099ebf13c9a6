"""The device that a plan is for: the one here, or one of the table of peaks."""

import os
from dataclasses import dataclass

import jax

from ufbert import nn
from ufbert.config import RunConfig, TreeBackend
from ufbert.cost.devices import DevicePeaks, device_of_kind, find_device
from ufbert.cost.parts import local_speeds
from ufbert.cost.reached import Reached, memory_evidence, reached, speed_evidence
from ufbert.cost.speeds import Speeds, peak_speeds
from ufbert.ops.fff import usual_backend
from ufbert.pretrain.resolve import Platform
from ufbert.runtime.device import use_device

GPU_MEMORY_SHARE = 0.75
"""Share of a GPU's memory that jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclass(frozen=True)
class Target:
    """The device that a plan is for."""

    name: str
    peaks: DevicePeaks | None
    """None for a CPU, or an accelerator that is not in the table."""
    on_cpu: bool
    local: bool
    """It is the device that jax runs on here."""
    dtype: str

    @property
    def memory(self) -> float:
        """Bytes that training may use; 0 if that is not known."""
        if self.peaks is not None:
            return self.peaks.memory * (GPU_MEMORY_SHARE if self.peaks.platform == "gpu" else 1.0)
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if self.on_cpu else 0.0

    @property
    def platform(self) -> Platform:
        """The device as the choice of a scale sees it."""
        return Platform(self.on_cpu, self.dtype == "bfloat16", self.speeds, self.trees)

    @property
    def shares(self) -> Reached | None:
        """What a program compiled for a CPU says of this device; None if that device's own is compiled."""
        return None if self.local or self.peaks is None else reached(self.peaks.name)

    @property
    def evidence(self) -> dict[str, str]:
        """Say what stands behind the figures of a plan: each begins with `measured`, `published` or `assumed`."""
        compiled = "measured here: of the step that was compiled"
        table = {"peaks": "measured here", "speed": "measured here: of parts of this model", "memory": compiled}
        if not self.on_cpu:
            table["speed"] = speed_evidence(self.peaks.name if self.peaks else "")
        if self.peaks:
            table["peaks"] = f"published: {self.peaks.source}"
        if self.peaks and not self.local:
            table["memory"] = memory_evidence(self.peaks.name)
        return table | {
            "compilation": compiled if self.local else "assumed",
            "checkpoints": "assumed",
            "text": "assumed",
        }

    def speeds(self, run: RunConfig) -> Speeds:
        """Return the speeds of the table, or else those of the parts of `run`, measured here."""
        return peak_speeds(self.peaks, self.dtype) if self.peaks else local_speeds(run)

    def trees(self, run: RunConfig) -> TreeBackend:
        """Return the backend that computes trees there, which for an accelerator is not the one that jax runs on."""
        if self.local:
            return nn.tree_backend(run.model, run.micro_tokens)
        assert self.peaks is not None
        known = ("masked", "gather", "pallas") if self.peaks.platform == "gpu" else ("masked", "gather")
        if run.model.tree_backend in known:
            return run.model.tree_backend
        return usual_backend(self.peaks.platform, run.micro_tokens, run.model.tree_depth, native_kernels=False)


def start_target(name: str) -> Target:
    """Decide the device and start jax: on it if it is here, else on the CPU, whose compiler stands in for its own.

    Raises UserError for a name that is not in the table.
    """
    if name not in ("auto", "cpu"):
        peaks = find_device(name)
        use_device("cpu")
        return Target(peaks.name, peaks, on_cpu=False, local=False, dtype=peaks.dtype)
    if use_device("cpu" if name == "cpu" else "auto") == "cpu":
        return Target("this machine's CPU", None, on_cpu=True, local=True, dtype="float32")
    kind = jax.devices()[0].device_kind
    peaks = device_of_kind(kind)
    return Target(kind, peaks, on_cpu=False, local=True, dtype=peaks.dtype if peaks else "bfloat16")

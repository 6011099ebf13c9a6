"""How much of its peaks a device reaches in training, and what says so: the one table that plans and `--scale auto` rest on.

The time of a step is its products' and that of everything else, which moves memory: kernels run one after the other. The
products were measured alone. `traffic` is then fitted so that crammed BERT is as fast as it was measured:

    traffic = (1 / tokens a second - operations a token / speed of products) * bytes a second / bytes a token

with the operations and bytes that `ufbert plan` counts. `memory` is fitted likewise. A test compares the table with itself.
"""

from typing import Literal, NamedTuple

Evidence = Literal["measured", "published", "assumed"]
"""`measured` by this package on that device, `published` by others, or `assumed` from another device."""


class Measurement(NamedTuple):
    """A preset at its own size on a device, with 128 rows of 128 tokens a micro-batch."""

    device: str
    preset: str
    trees: str
    """The backend that computed trees; "" for a model without."""
    tokens_per_second: float | None
    """None where the program has changed since."""
    memory: float | None
    """The most bytes held; None if that was not noted."""
    evidence: Evidence
    source: str

    @property
    def of(self) -> str:
        """The preset and the backend of its trees."""
        return f"{self.preset} by {self.trees}" if self.trees else self.preset


MEASUREMENTS = (
    Measurement("h200", "crammed_bert", "", 626_576, 9.1e9, "measured", "one H200, jax 0.11.2, 27 November 2026"),
    Measurement("h100", "ultrafastbert_1x11", "gather", None, 9.4e9, "measured", "one H100 80 GB, 26 November 2026"),
    Measurement("a6000", "crammed_bert", "", 105_000, None, "published", "crammed BERT's issue #45, in PyTorch"),
)


class Reached(NamedTuple):
    """Shares of a device's peaks, and what a program for it moves and holds over what one for a CPU does."""

    products: float
    """Speed of matrix products over the peak of their type."""
    float32: float
    """The same for true float32 products, which routing uses."""
    traffic: float
    """Bytes, at the peak of the memory's speed, over those that XLA counts in the CPU's program. An accelerator's compiler
    fuses more, and its kernels are slower than the memory."""
    memory: float
    """Bytes of activations over those that the CPU's program holds. Weights, gradient and optimizer's state come on top."""
    gathered: float
    """The same for trees by `gather`, whose gathered rows an accelerator's program does not hold."""
    like: str = ""
    """The device that the speed is assumed from; "" if it is known."""


_KNOWN = {"h200": Reached(0.67, 0.8, 0.33, 0.34, 0.19), "a6000": Reached(0.67, 0.8, 0.28, 0.34, 0.19)}
_LIKE = "h200"
"""The device that all others are assumed to be like."""


def reached(device: str) -> Reached:
    """Return what a device of the table reaches."""
    return _KNOWN.get(device, _KNOWN[_LIKE]._replace(like=_LIKE))


def speed_evidence(device: str) -> str:
    """Say what stands behind the speed that is planned for a device: the kind, and the figures it is fitted to."""
    like = reached(device).like
    known = [m for m in MEASUREMENTS if m.device == (like or device) and m.tokens_per_second]
    figures = ", ".join(f"{m.of} {m.tokens_per_second:,.0f}" for m in known)
    source = f"{figures} tokens/s ({'; '.join(dict.fromkeys(m.source for m in known))})"
    return f"assumed: as on {like}, {source}" if like else f"{known[0].evidence}: {source}"


def memory_evidence(device: str) -> str:
    """Say what stands behind the memory that is planned for a device that is not here."""
    here = [m for m in MEASUREMENTS if m.memory and m.device == device]
    known = here or [m for m in MEASUREMENTS if m.memory]
    figures = "; ".join(f"{m.of} {(m.memory or 0.0) / 1e9:.1f} GB ({m.source})" for m in known)
    return f"measured: {figures}" if here else f"assumed: as measured, {figures}"

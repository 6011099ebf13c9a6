"""How much of its peaks a device reaches in training, and what says so: the one table that plans and `--scale auto` rest on.

The time of a step is its products' and that of everything else, which moves memory: kernels run one after the other. On the
H100 the products were measured alone, and `traffic` was then fitted so that crammed BERT's update takes what it took there.
"""

from typing import Literal, NamedTuple

Evidence = Literal["measured", "published", "assumed"]
"""`measured` by this package on that device, `published` by others, or `assumed` from another device."""


class Measurement(NamedTuple):
    """The speed of a preset at its own size, with 128 rows of 128 tokens a micro-batch, on a device."""

    device: str
    preset: str
    trees: str
    """The backend that computed trees; "" for a model without."""
    tokens_per_second: float
    memory: float | None
    """The most bytes held; None if that was not noted."""
    evidence: Evidence
    source: str


_H100 = "one H100 80 GB, jax 0.11.2, 26 November 2026"
MEASUREMENTS = (
    Measurement("h100", "crammed_bert", "", 337_000, None, "measured", _H100),
    Measurement("h100", "ultrafastbert_1x11", "gather", 323_000, 9.4e9, "measured", _H100),
    Measurement("h100", "ultrafastbert_1x11", "masked", 97_870, None, "measured", _H100),
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
    speed_evidence: Evidence
    memory_evidence: Evidence
    like: str = ""
    """The device that assumed figures come from."""


_ON_H100 = Reached(0.67, 0.8, 0.71, 0.19, "measured", "measured")
_REACHED = {
    "h100": _ON_H100,
    "a6000": Reached(0.67, 0.8, 0.28, 0.19, "published", "assumed", like="h100"),
}


def reached(device: str) -> Reached:
    """Return what a device of the table reaches; one that nothing is known of is assumed to be like an H100."""
    assumed = _ON_H100._replace(speed_evidence="assumed", memory_evidence="assumed", like="h100")
    return _REACHED.get(device, assumed)


def speed_evidence(device: str) -> str:
    """Say what stands behind the speed that is planned for a device, with the figures that it is fitted to."""
    shares = reached(device)
    known = [m for m in MEASUREMENTS if m.device == (device if shares.speed_evidence != "assumed" else shares.like)]
    figures = ", ".join(f"{m.preset}{f' by {m.trees}' if m.trees else ''} {m.tokens_per_second:,.0f}" for m in known)
    like = f"from the {shares.like}, " if shares.speed_evidence == "assumed" else ""
    return f"{shares.speed_evidence}: {like}{figures} tokens/s ({'; '.join(dict.fromkeys(m.source for m in known))})"


def memory_evidence(device: str) -> str:
    """Say what stands behind the memory that is planned for a device that is not here."""
    shares = reached(device)
    measured = shares.memory_evidence == "measured"
    known = [m for m in MEASUREMENTS if m.memory and m.device == (device if measured else shares.like)]
    figures = ", ".join(f"{m.preset} by {m.trees} {(m.memory or 0) / 1e9:.1f} GB" for m in known)
    return f"{shares.memory_evidence}: {'' if measured else f'from the {shares.like}, '}{figures} ({known[0].source})"

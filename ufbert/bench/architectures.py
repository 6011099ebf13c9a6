"""The encoders that the PyTorch peers know, as settings of `ModelConfig`; sizes are free."""

from typing import Any

from ufbert.config import ModelConfig
from ufbert.errors import UserError

ENCODERS: dict[str, dict[str, Any]] = {
    "crammed": {
        "mixer": ("attention",), "feedforward": ("glu",), "activation": "gelu", "norm": "pre", "first_norm": True,
        "norm_bias": True, "positions": "scaled_sinusoid", "qk_norm": False, "n_token_types": 0, "use_bias": False,
        "embedding_norm": True, "embedding_projection": False, "final_norm": True,
    },
    "bert": {
        "mixer": ("attention",), "feedforward": ("dense",), "activation": "gelu", "norm": "post", "norm_bias": True,
        "positions": "learned", "qk_norm": False, "n_token_types": 2, "use_bias": True, "embedding_norm": True,
        "embedding_projection": False, "final_norm": False,
    },
}  # fmt: skip
"""Dense crammed BERT (pre-norm), and the BERT of 2019 (post-norm)."""
CLASSIFIER = {"pooling": "first", "pooler": "tanh"}


def find_difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first field of `found` that is not as wanted; "" if all are. Tuples are kinds of layers, whose order is free."""
    for name, value in wanted.items():
        have = getattr(found, name)
        if (set(have) != set(value)) if isinstance(have, tuple) else have != value:
            return name
    return ""


def peer_of(config: ModelConfig) -> str:
    """`bert` or `crammed`, the peer that is fine-tuned beside the model. Raises UserError if there is none."""
    kind, name = ("bert", "BERT") if config.norm == "post" else ("crammed", "crammed BERT")
    wanted = ENCODERS[kind] | CLASSIFIER
    other = find_difference(config, wanted)
    if other:
        raise UserError(
            f"The peer of a {config.norm}-norm encoder is a dense {name}: it has model.{other} {wanted[other]!r}, not "
            f"{getattr(config, other)!r}."
        )
    return kind

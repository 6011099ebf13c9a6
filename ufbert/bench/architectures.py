"""The encoders that the PyTorch peers know, as settings of `ModelConfig`; sizes are free."""

from typing import Any

ENCODERS: dict[str, dict[str, Any]] = {
    "crammed": {
        "mixer": ("attention",), "feedforward": ("glu",), "activation": "gelu", "norm": "pre", "first_norm": True,
        "norm_bias": True, "positions": "scaled_sinusoid", "qk_norm": False, "n_token_types": 0, "use_bias": False,
        "embedding_norm": True, "embedding_projection": False, "final_norm": True,
    },
}  # fmt: skip
"""Dense crammed BERT."""


def find_difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first field of `found` that is not as wanted; "" if all are. Tuples are kinds of layers, whose order is free."""
    for name, value in wanted.items():
        have = getattr(found, name)
        if (set(have) != set(value)) if isinstance(have, tuple) else have != value:
            return name
    return ""

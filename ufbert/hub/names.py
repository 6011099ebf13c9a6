"""The names of a checkpoint's tensors, brought to those of its library's present-day classes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ufbert.errors import UserError
from ufbert.hub.layout import Tensors

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, DataParallel, FSDP and activation checkpointing put into the names of what they wrap."""
BUFFERS = re.compile(r".*embeddings\.(position_ids|token_type_ids)|.*rotary_emb\..*|.*\.pe")
"""Tensors that hold no weights."""


class Named(NamedTuple):
    """Tensors under present-day names."""

    tensors: dict[str, np.ndarray]
    stored: dict[str, str]
    """The name that the file has for each."""
    missing_root: str
    """What the file leaves out at the beginning of every name of the encoder."""
    wrappers: list[str]
    """What was taken out of the names."""

    def shown(self, name: str) -> str:
        """A tensor's name as the file has it, or would have it."""
        return self.stored.get(name, name.removeprefix(self.missing_root))


def present_day(tensors: Tensors, root: str, parts: tuple[str, ...], where: str) -> Named:
    """Tensors without the marks of wrappers, with the norms' present-day names, and with the `root` that the `parts` of a bare
    encoder lack. Raises UserError if two tensors come to one name."""
    wrappers = [name for name in WRAPPERS if any(name in stored.split(".") for stored in tensors)]
    plain = {stored: without_wrappers(stored) for stored in tensors}
    missing_root = "" if any(name.startswith(root) for name in plain.values()) else root
    named, origin = {}, {}
    for stored, name in plain.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        name = missing_root + name if name.startswith(parts) else name
        if name in named:
            raise UserError(
                f"{where} holds {origin[name]} and {stored}, which are the same tensor of the model; take one out."
            )
        named[name], origin[name] = tensors[stored], stored
    return Named(named, origin, missing_root, wrappers)


def without_wrappers(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def with_tied(named: Named, copies: Mapping[str, str]) -> Named:
    """The tensors, where one that is stored only under the name of its copy has its own again."""
    under = {copy: source for copy, source in copies.items() if copy in named.tensors and source not in named.tensors}
    tensors = {under.get(name, name): array for name, array in named.tensors.items()}
    return named._replace(
        tensors=tensors, stored={under.get(name, name): stored for name, stored in named.stored.items()}
    )

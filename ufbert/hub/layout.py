"""The names and layout of another library's tensors: one table, read in both directions.

A layout is a list of rules. A rule names one foreign tensor, the parameters of ours that it holds, and how to take it apart
and put it together. From the table follow the names and shapes that a checkpoint must have, import, export, and the
comparison of gradients; none of them can disagree with another.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ufbert.errors import UserError
from ufbert.hub.tensors import check_floats, first_few

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Marks of torch.compile, DataParallel, FSDP and activation checkpointing in the names of a wrapped model."""
BUFFERS = re.compile(r".*embeddings\.(position_ids|token_type_ids)|.*rotary_emb\..*|.*\.pe")
"""Tensors that hold no weights."""


class Named(NamedTuple):
    """Tensors under present-day names."""

    tensors: dict[str, np.ndarray]
    stored: dict[str, str]
    """The name that the file has for each."""
    missing_root: str
    """Beginning that the file leaves out of every name of the encoder."""
    wrappers: list[str]
    """Marks that were taken out of the names."""

    def shown(self, name: str) -> str:
        """A tensor's name as the file has it, or would have it."""
        return self.stored.get(name, name.removeprefix(self.missing_root))


def present_day(tensors: Tensors, root: str, parts: tuple[str, ...], where: str) -> Named:
    """Name tensors as present-day classes do: no marks of wrappers, and the `root` that the `parts` of a bare encoder lack.

    Raises UserError if two tensors come to one name.
    """
    wrappers = [name for name in WRAPPERS if any(name in stored.split(".") for stored in tensors)]
    plain = {stored: without_wrappers(stored) for stored in tensors}
    missing_root = "" if any(name.startswith(root) for name in plain.values()) else root
    named, origin = {}, {}
    for stored, name in plain.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        name = missing_root + name if name.startswith(parts) else name
        if name in named:
            raise UserError(f"{where} holds {origin[name]} and {stored}, which are the same tensor; take one out.")
        named[name], origin[name] = tensors[stored], stored
    return Named(named, origin, missing_root, wrappers)


def without_wrappers(name: str) -> str:
    """Take the marks of wrappers out of a tensor's name."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def with_tied(named: Named, copies: Mapping[str, str]) -> Named:
    """Give a tensor that is stored only under the name of its copy its own name again."""
    under = {copy: source for copy, source in copies.items() if copy in named.tensors and source not in named.tensors}
    tensors = {under.get(name, name): array for name, array in named.tensors.items()}
    stored = {under.get(name, name): stored for name, stored in named.stored.items()}
    return named._replace(tensors=tensors, stored=stored)


class Rule(NamedTuple):
    """One foreign tensor. `split` gives our arrays in the order of `paths`; `join` is its inverse."""

    name: str
    paths: tuple[str, ...]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    join: Callable[..., np.ndarray]


class Layout(NamedTuple):
    """Every tensor of a checkpoint."""

    rules: list[Rule]
    copies: Mapping[str, str] = {}
    """Tied tensors, by the name they repeat: may be absent from a checkpoint, but must not differ."""
    constants: Mapping[str, np.ndarray] = {}
    """Tensors that carry no information; written, and not read."""
    writes_copies: bool = False
    """True if this library's own checkpoints hold the copies."""


def same(name: str, path: str) -> Rule:
    """Make the rule of a tensor that is stored alike."""
    return Rule(name, (path,), lambda a: (a,), lambda a: a)


def reshaped(name: str, path: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> Rule:
    """Make the rule of a tensor of the same numbers in the same order."""
    return Rule(name, (path,), lambda a: (a.reshape(ours),), lambda a: a.reshape(theirs))


def linear(name: str, path: str, *, bias: bool) -> list[Rule]:
    """Make the rules of a torch linear layer, whose weight is (out, in); our kernel is (in, out)."""
    rules = [Rule(f"{name}.weight", (f"{path}.kernel",), lambda a: (a.T,), lambda a: a.T)]
    return [*rules, same(f"{name}.bias", f"{path}.bias")] if bias else rules


def norm(name: str, path: str, *, bias: bool = True) -> list[Rule]:
    """Make the rules of a LayerNorm."""
    rules = [same(f"{name}.weight", f"{path}.scale")]
    return [*rules, same(f"{name}.bias", f"{path}.bias")] if bias else rules


def stacked_linears(name: str, paths: tuple[str, ...]) -> Rule:
    """Make the rule of linear layers whose weights lie one after the other in a (sum of outs, in) tensor of equal parts."""
    return Rule(
        name,
        tuple(f"{path}.kernel" for path in paths),
        lambda a: tuple(part.T for part in np.split(a, len(paths))),
        lambda *kernels: np.concatenate([kernel.T for kernel in kernels]),
    )


def expected_shapes(layout: Layout, ours: Shapes) -> dict[str, tuple[int, ...]]:
    """Find name and shape of every foreign tensor but the copies, from the shapes of our parameters."""
    shapes = {}
    for rule in layout.rules:
        parts = [np.broadcast_to(np.float32(0), ours[path]) for path in rule.paths]
        shapes[rule.name] = rule.join(*parts).shape
    return shapes | {name: np.shape(value) for name, value in layout.constants.items()}


def check_tensors(
    found: Shapes, expected: Shapes, where: str, says: str = "", shown: Callable[[str], str] = lambda name: name
) -> None:
    """Raise UserError naming the first few missing, unexpected or misshapen tensors, by what `shown` makes of their names.

    `says` is a sentence about the configuration that follows.
    """
    missing = [f"{shown(name)} is missing" for name in expected if name not in found]
    unexpected = [f"{shown(name)} is unexpected" for name in found if name not in expected]
    misshapen = [
        f"{shown(name)} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [first_few(names, 4) for names in (missing, unexpected, misshapen) if names]
    if problems:
        raise UserError(f"{where} does not fit its configuration: {'; '.join(problems)}. {says}".rstrip())


def to_ours(
    layout: Layout,
    tensors: Tensors,
    ours: Shapes,
    where: str,
    says: str = "",
    shown: Callable[[str], str] = lambda name: name,
) -> dict[str, np.ndarray]:
    """Make our parameters, flat by path, of a checkpoint's tensors.

    Raises UserError as `check_tensors` and `check_floats`, and for copies that differ from their original.
    """
    expected = expected_shapes(layout, ours)
    copies = {name: source for name, source in layout.copies.items() if name in tensors}
    found = {name: tuple(array.shape) for name, array in tensors.items()}
    check_tensors(
        found, {**expected, **{name: expected[source] for name, source in copies.items()}}, where, says, shown
    )
    check_floats({rule.name: tensors[rule.name].dtype for rule in layout.rules}, where, shown)
    different = [shown(name) for name, source in copies.items() if not np.array_equal(tensors[name], tensors[source])]
    if different:
        raise UserError(f"{where} has untied weights, which this encoder ties: {', '.join(different)}.")
    return split_all(layout, tensors)


def split_all(layout: Layout, tensors: Tensors) -> dict[str, np.ndarray]:
    """Apply every rule to tensors that are known to fit (also to gradients, which have no copies or constants)."""
    flat: dict[str, np.ndarray] = {}
    for rule in layout.rules:
        flat.update(zip(rule.paths, rule.split(tensors[rule.name]), strict=True))
    return flat


def to_theirs(layout: Layout, flat: Tensors) -> dict[str, np.ndarray]:
    """Make a checkpoint's tensors of our parameters, flat by path; contiguous float32."""
    tensors = {rule.name: rule.join(*(flat[path] for path in rule.paths)) for rule in layout.rules}
    tensors |= dict(layout.constants)
    if layout.writes_copies:
        tensors |= {name: tensors[source].copy() for name, source in layout.copies.items()}
    return {name: np.asarray(array, np.float32, order="C") for name, array in tensors.items()}

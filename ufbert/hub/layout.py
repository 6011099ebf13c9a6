"""How another library lays out its tensors: one table, read in both directions.

A layout is a list of rules. A rule names one foreign tensor, the parameters of ours that it holds, and how to take it apart
and put it together. From the table follow the names and shapes that a checkpoint must have, import, export, and the
comparison of gradients; none of them can disagree with another.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ufbert.errors import UserError
from ufbert.hub.tensors import check_floats, first_few

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


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
    """Whether this library's own checkpoints hold the copies."""


def same(name: str, path: str) -> Rule:
    """A tensor that is stored alike."""
    return Rule(name, (path,), lambda a: (a,), lambda a: a)


def reshaped(name: str, path: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> Rule:
    """A tensor of the same numbers in the same order."""
    return Rule(name, (path,), lambda a: (a.reshape(ours),), lambda a: a.reshape(theirs))


def linear(name: str, path: str, *, bias: bool) -> list[Rule]:
    """A torch linear layer, whose weight is (out, in), as a kernel (in, out)."""
    rules = [Rule(f"{name}.weight", (f"{path}.kernel",), lambda a: (a.T,), lambda a: a.T)]
    return [*rules, same(f"{name}.bias", f"{path}.bias")] if bias else rules


def norm(name: str, path: str, *, bias: bool = True) -> list[Rule]:
    """A LayerNorm."""
    rules = [same(f"{name}.weight", f"{path}.scale")]
    return [*rules, same(f"{name}.bias", f"{path}.bias")] if bias else rules


def stacked_linears(name: str, paths: tuple[str, ...]) -> Rule:
    """Linear layers of one input whose weights lie one after the other in one (sum of outs, in) tensor of equal parts."""
    return Rule(
        name,
        tuple(f"{path}.kernel" for path in paths),
        lambda a: tuple(part.T for part in np.split(a, len(paths))),
        lambda *kernels: np.concatenate([kernel.T for kernel in kernels]),
    )


def expected_shapes(layout: Layout, ours: Shapes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every foreign tensor but the copies, from the shapes of our parameters."""
    shapes = {}
    for rule in layout.rules:
        parts = [np.broadcast_to(np.float32(0), ours[path]) for path in rule.paths]
        shapes[rule.name] = rule.join(*parts).shape
    return shapes | {name: np.shape(value) for name, value in layout.constants.items()}


def check_tensors(found: Shapes, expected: Shapes, where: str, shown: Callable[[str], str] = lambda name: name) -> None:
    """Raise UserError naming the first few missing, unexpected or misshapen tensors, by what `shown` makes of their names."""
    missing = [f"{shown(name)} is missing" for name in expected if name not in found]
    unexpected = [f"{shown(name)} is unexpected" for name in found if name not in expected]
    misshapen = [
        f"{shown(name)} has shape {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [first_few(names, 4) for names in (missing, unexpected, misshapen) if names]
    if problems:
        raise UserError(f"{where} does not fit its configuration: {'; '.join(problems)}.")


def to_ours(
    layout: Layout, tensors: Tensors, ours: Shapes, where: str, shown: Callable[[str], str] = lambda name: name
) -> dict[str, np.ndarray]:
    """Our parameters, flat by path, from a checkpoint's tensors.

    Raises UserError naming missing, unexpected or misshapen tensors, by what `shown` makes of their names, tensors that are no
    floating point numbers, and copies that differ from their original.
    """
    expected = expected_shapes(layout, ours)
    copies = {name: source for name, source in layout.copies.items() if name in tensors}
    found = {name: tuple(array.shape) for name, array in tensors.items()}
    check_tensors(found, {**expected, **{name: expected[source] for name, source in copies.items()}}, where, shown)
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
    """A checkpoint's tensors from our parameters, flat by path; contiguous float32."""
    tensors = {rule.name: rule.join(*(flat[path] for path in rule.paths)) for rule in layout.rules}
    tensors |= dict(layout.constants)
    if layout.writes_copies:
        tensors |= {name: tensors[source].copy() for name, source in layout.copies.items()}
    return {name: np.asarray(array, np.float32, order="C") for name, array in tensors.items()}

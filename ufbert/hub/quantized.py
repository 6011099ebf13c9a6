"""int8 weights in a model folder: which parameters are rounded, and how `model.safetensors` stores them.

A rounded parameter is int8, from -127 to 127. Beside it lies `NAME.factor`, float32: a weight is its whole number times its
factor. Tables, and trees on paths, have a factor for each of their rows (the last axis is one row). Linear layers have a
factor for each of their columns, which are the outputs (the axis before the last is one column); so have the input weights of
leaves and experts.

With static activations each linear layer also has `NAME.input`, float32, two numbers: the step and the zero by which its input
is rounded, to step * (n - zero), n = 0 .. 255.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from ufbert.config.checks import check_kinds
from ufbert.errors import UserError
from ufbert.hub.tensors import StoredTensor, first_few

Side = Literal["rows", "columns"]

SIDES: dict[str, Side] = {
    r"encoder\.embeddings\.(tokens|positions)|masked_lm\.decoder": "rows",
    r"encoder\.value_embeddings\.tables": "rows",
    r"encoder\.ngrams\.[a-z_]+": "rows",
    r"encoder\.layer_\d+\.tree\.w_(in|out)": "rows",
    r"encoder\.layer_\d+\.(leaf|routed)_tree\.leaf_in": "columns",
    r"encoder\.layer_\d+\.(leaf|routed)_tree\.leaf_out": "rows",
    r"encoder\.layer_\d+\.switch\.w_(in|out)": "columns",
    r"encoder\.(layer_\d+|embeddings|ngrams)\..*kernel": "columns",
}
"""Paths of the parameters that are rounded, and what shares a factor; the first that matches counts. Whatever decides (the
nodes of leaf trees and routed trees, the router of experts), norms, biases and the small heads stay float32."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a folder are rounded: `quantized` of its `config.json`."""

    activations: Literal["dynamic", "static"] = "dynamic"
    """Rounding of a linear layer's input: each row by its largest number, or all by a step that was chosen on text."""
    wide: tuple[int, ...] = ()
    """Layers whose weights are float32."""
    tables: bool = True
    """True if embeddings and other tables are rounded, too."""
    exact_routing: bool = False
    """True if the input weights of trees, which decide and compute, are float32."""

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self), "quantized.")

    def side(self, path: str, shape: tuple[int, ...]) -> Side | None:
        """Return what shares a factor in a parameter, or None if it stays float32."""
        side = next((side for pattern, side in SIDES.items() if re.fullmatch(pattern, path)), None)
        layer = re.match(r"encoder\.layer_(\d+)\.", path)
        if side is None or len(shape) < 2 or 0 in shape:
            return None
        if layer and (int(layer[1]) in self.wide or (self.exact_routing and path.endswith(".tree.w_in"))):
            return None
        return None if not layer and side == "rows" and not self.tables else side

    def has_input(self, path: str) -> bool:
        """Decide if a rounded parameter has the rounding of its input."""
        return self.activations == "static" and path.endswith(".kernel")


@dataclass(frozen=True)
class QuantizedTensor:
    """A rounded parameter, which gives its float32 numbers whenever it is asked for them."""

    whole: StoredTensor | Int[np.ndarray, "..."]
    factor: Float[np.ndarray, "..."]
    side: Side
    input: Float[np.ndarray, " rounding"]
    """Step and zero of a linear layer's input, or nothing."""
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)
    """Type of the numbers it gives; jax takes an array's word for it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.whole.shape

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    def integers(self) -> Int[np.ndarray, "..."]:
        """Return the int8 numbers."""
        return self.whole.as_stored() if isinstance(self.whole, StoredTensor) else self.whole

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.integers() * np.expand_dims(self.factor, axis_of(self.side))
        return array if dtype is None else array.astype(dtype, copy=False)


def axis_of(side: Side) -> int:
    """Return the axis whose numbers share a factor."""
    return -1 if side == "rows" else -2


def to_stored(flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return what `model.safetensors` holds of parameters by path."""
    stored = {}
    for path, value in flat.items():
        if isinstance(value, QuantizedTensor):
            stored |= {path: value.integers(), f"{path}.factor": value.factor}
            stored |= {f"{path}.input": value.input} if value.input.size else {}
        else:
            stored[path] = np.asarray(value, np.float32)
    return stored


def from_stored(
    tensors: Mapping[str, StoredTensor], how: Quantization, n_layers: int, where: str
) -> dict[str, StoredTensor | QuantizedTensor]:
    """Return the parameters that tensors hold, by path; factors are read, weights are not.

    Raises UserError for a layer that the model lacks, for tensors of another type than `how` says, and for factors that are
    absent, of another shape or not positive.
    """
    absent = [i for i in how.wide if not 0 <= i < n_layers]
    if absent:
        raise UserError(f"{where} belongs to a model of {n_layers} layers, and quantized.wide names layer {absent[0]}.")
    params: dict[str, StoredTensor | QuantizedTensor] = {}
    parts = {f"{path}.{part}" for path in tensors for part in ("factor", "input")}
    for path, tensor in tensors.items():
        if path in parts:
            continue
        side = how.side(path, tensor.shape)
        if (tensor.stored == np.int8) != (side is not None):
            wanted = "int8" if side else "float32"
            raise UserError(f"{where} holds {path} as {tensor.stored.name}, and its config.json says {wanted}.")
        if side is None:
            params[path] = tensor
            continue
        shape = list(tensor.shape)
        del shape[axis_of(side)]
        factor = _numbers(tensors, f"{path}.factor", tuple(shape), where)
        rounding = _numbers(tensors, f"{path}.input", (2,), where) if how.has_input(path) else np.zeros(0, np.float32)
        if rounding.size and not (rounding[1] == np.rint(rounding[1]) and rounding[1] <= 255):
            raise UserError(
                f"{where} has a zero of {rounding[1]} in {path}.input; it must be a whole number up to 255."
            )
        params[path] = QuantizedTensor(tensor, factor, side, rounding)
    known = {f"{path}.factor" for path, value in params.items() if isinstance(value, QuantizedTensor)}
    known |= {f"{path}.input" for path in params if how.has_input(path) and isinstance(params[path], QuantizedTensor)}
    strange = [path for path in tensors if path not in params and path not in known]
    if strange:
        raise UserError(f"{where} holds what its config.json does not speak of: {first_few(strange)}.")
    return params


def _numbers(tensors: Mapping[str, StoredTensor], path: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Read a factor or a rounding, whose numbers are positive; a zero may be 0."""
    if path not in tensors:
        raise UserError(f"{where} has no {path}, and without it no weights.")
    if tensors[path].shape != shape or tensors[path].stored != np.float32:
        have = f"{tensors[path].stored.name} of shape {tensors[path].shape}"
        raise UserError(f"{where} holds {path} as {have}, not float32 of shape {shape}.")
    numbers = np.asarray(tensors[path])
    positive = numbers[:1] if path.endswith(".input") else numbers
    if not (np.isfinite(numbers).all() and (positive > 0).all() and (numbers >= 0).all()):
        raise UserError(f"{path} of {where} has numbers that are no factors: they must be finite and above 0.")
    return numbers

"""A single original fast feedforward layer: PyPI `fastfeedforward` state in and out, and a folder of its own.

The state holds `node_weights (n, d)`, `node_biases (n, 1)`, `w1s (g, d, w)`, `b1s (g, w)`, `w2s (g, w, o)`, `b2s (g, o)`,
the number `depth`, and where usage was counted, `node_usage` and `leaf_usage`. A layer is no encoder and has no tokenizer,
so its folder is of another format than a model folder: `config.json` (`"format": "ufbert-leaf-layer"`) and the same
state in `model.safetensors`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ufbert.config import ActivationName
from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.hub.download import model_folder
from ufbert.hub.layout import Tensors, check_tensors
from ufbert.hub.tensors import check_floats, read_config, read_tensors, write_folder
from ufbert.ops.leaf_fff import LeafTree

FORMAT, VERSION = "ufbert-leaf-layer", 1
NAMES = {
    "node_w": "node_weights", "node_b": "node_biases", "w_in": "w1s", "b_in": "b1s", "w_out": "w2s", "b_out": "b2s",
}  # fmt: skip
COUNTERS = ("leaf_usage", "node_usage")


@dataclass(frozen=True)
class _Stored:
    """`config.json` of a layer folder."""

    format: str
    format_version: int
    activation: ActivationName = "relu"


def is_state(names: set[str]) -> bool:
    """True if these are tensors of a `fastfeedforward` layer."""
    return {"node_weights", "w1s", "w2s"} <= names


def from_state(tensors: Tensors, where: str) -> LeafTree:
    """Read the layer in a `fastfeedforward` state. Raises UserError naming missing, unexpected or misshapen tensors."""
    shapes = {name: tuple(array.shape) for name, array in tensors.items() if name not in (*COUNTERS, "depth")}
    g, d, w = shapes["w1s"] if len(shapes.get("w1s", ())) == 3 else (1, 1, 1)
    o = shapes["w2s"][-1] if shapes.get("w2s") else 1
    expected = {"node_w": (g - 1, d), "node_b": (g - 1, 1), "w_in": (g, d, w), "b_in": (g, w)}
    expected |= {"w_out": (g, w, o), "b_out": (g, o)}
    check_tensors(shapes, {NAMES[name]: shape for name, shape in expected.items()}, where)
    check_floats({name: tensors[name].dtype for name in NAMES.values()}, where)
    if 0 in (g, d, w, o):
        raise UserError(f"{where} holds a layer of {g} leaves of {w} neurons, {d} inputs and {o} outputs.")
    depth = np.asarray(tensors.get("depth", g.bit_length() - 1))
    # 2^depth of a depth of 10^12 has no end, so the depth is compared with the length of g in bits.
    if depth.size != 1 or depth.reshape(()) != g.bit_length() - 1 or g & (g - 1):
        said = shown(depth.reshape(-1)[:9].tolist() if depth.ndim else depth.item())
        raise UserError(f"{where} does not fit its configuration: {g} leaves at depth {said}, where 2^depth belong.")
    arrays = {name: jnp.asarray(np.asarray(tensors[NAMES[name]], np.float32)) for name in NAMES}
    return LeafTree(**arrays | {"node_b": arrays["node_b"].reshape(-1)})


def to_state(layer: LeafTree) -> dict[str, np.ndarray]:
    """Write the layer as a `fastfeedforward` state, without usage counters."""
    state = {NAMES[name]: np.asarray(array) for name, array in layer._asdict().items()}
    state["node_biases"] = state["node_biases"].reshape(-1, 1)
    return state | {"depth": np.asarray(len(state["w1s"]).bit_length() - 1, np.int64)}


def save_layer(folder: str | Path, layer: LeafTree, activation: str) -> None:
    """Write a layer folder, whole or not at all. Raises UserError if the disk refuses."""
    config = {"format": FORMAT, "format_version": VERSION, "activation": activation}
    write_folder(folder, to_state(layer), {"config.json": json.dumps(config, indent=2) + "\n"})


def load_layer(folder: str | Path) -> tuple[LeafTree, str]:
    """Read a layer folder, or one of the Hugging Face hub (`hf:OWNER/NAME`): weights for `ufbert.ops.leaf_fff`, and its
    nonlinearity. Raises UserError if it is damaged."""
    folder = model_folder(folder)
    activation = read_config(folder / "config.json", _Stored, FORMAT, VERSION, "a leaf-tree layer").activation
    return from_state(read_tensors(folder / "model.safetensors"), str(folder)), activation

"""A single original fast feedforward layer: PyPI `fastfeedforward` state in and out, and a folder of its own.

The state holds `node_weights (n, d)`, `node_biases (n, 1)`, `w1s (g, d, w)`, `b1s (g, w)`, `w2s (g, w, o)`, `b2s (g, o)`,
the number `depth`, and where usage was counted, `node_usage` and `leaf_usage`. A layer is no encoder and has no tokenizer,
so its folder is of another format than a model folder: `config.json` (`"format": "ufbert-leaf-layer"`) and the same
state in `model.safetensors`.
"""

import json
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import numpy as np

from ufbert.config import ActivationName
from ufbert.errors import UserError
from ufbert.hub.layout import Tensors, check_floats, check_tensors
from ufbert.hub.tensors import read_json, read_tensors, write_folder
from ufbert.ops.leaf_fff import LeafTree

FORMAT, VERSION = "ufbert-leaf-layer", 1
NAMES = {
    "node_w": "node_weights",
    "node_b": "node_biases",
    "w_in": "w1s",
    "b_in": "b1s",
    "w_out": "w2s",
    "b_out": "b2s",
}
COUNTERS = ("leaf_usage", "node_usage")


def is_state(names: set[str]) -> bool:
    """Whether these are tensors of a `fastfeedforward` layer."""
    return {"node_weights", "w1s", "w2s"} <= names


def from_state(tensors: Tensors, where: str) -> LeafTree:
    """The layer in a `fastfeedforward` state. Raises UserError naming each missing, unexpected or misshapen tensor."""
    found = {name: tuple(array.shape) for name, array in tensors.items() if name not in (*COUNTERS, "depth")}
    g, d, w = found["w1s"] if len(found.get("w1s", ())) == 3 else (1, 1, 1)
    o = found["w2s"][-1] if found.get("w2s") else 1
    shapes = {"node_w": (g - 1, d), "node_b": (g - 1, 1), "w_in": (g, d, w), "b_in": (g, w)}
    shapes |= {"w_out": (g, w, o), "b_out": (g, o)}
    check_tensors(found, {NAMES[name]: shape for name, shape in shapes.items()}, where)
    check_floats({name: tensors[name] for name in NAMES.values()}, where)
    depth = np.asarray(tensors.get("depth", g.bit_length() - 1))
    if depth.size != 1 or g != 2 ** min(max(int(depth.reshape(())), 0), 40):
        raise UserError(
            f"{where} does not fit its configuration: {g} leaves at depth {depth.tolist()}, where 2^depth belong."
        )
    arrays = {name: jnp.asarray(np.asarray(tensors[NAMES[name]], np.float32)) for name in NAMES}
    return LeafTree(**arrays | {"node_b": arrays["node_b"].reshape(-1)})


def to_state(layer: LeafTree) -> dict[str, np.ndarray]:
    """The layer as a `fastfeedforward` state, without usage counters."""
    state = {NAMES[name]: np.asarray(array) for name, array in layer._asdict().items()}
    state["node_biases"] = state["node_biases"].reshape(-1, 1)
    return state | {"depth": np.asarray(len(state["w1s"]).bit_length() - 1, np.int64)}


def save_layer(folder: str | Path, layer: LeafTree, activation: str) -> None:
    """Write a layer folder, whole or not at all. Raises UserError if the disk refuses."""
    config = {"format": FORMAT, "format_version": VERSION, "activation": activation}
    write_folder(folder, to_state(layer), {"config.json": json.dumps(config, indent=2) + "\n"})


def load_layer(folder: str | Path) -> tuple[LeafTree, str]:
    """A layer folder: its weights, for the functions of `ufbert.ops.leaf_fff`, and the name of its nonlinearity.

    Raises UserError if it is absent, of another kind, or damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("format") != FORMAT:
        raise UserError(f"{folder} does not hold a leaf-tree layer.")
    version, activation = config.get("format_version"), config.get("activation", "relu")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(f"{folder} has format version {version!r}; this ufbert reads up to {VERSION}. Upgrade it.")
    unknown = sorted(set(config) - {"format", "format_version", "activation"})
    if unknown:
        raise UserError(f"{folder} has a setting this version does not know: {', '.join(unknown)}.")
    if activation not in get_args(ActivationName):
        raise UserError(
            f"{folder} says activation={activation!r}; it must be one of {', '.join(get_args(ActivationName))}."
        )
    return from_state(read_tensors(folder / "model.safetensors"), str(folder)), activation

"""The ONNX operators of every kind of layer, and the graph that they are added to.

A rule takes the graph, the configuration, the layer's parameters, the name of its input (b, t, d) and names of what the batch
holds besides: `ids`, the tokens; `hidden`, to add to attention's logits; `values`, to add to its values (empty for nothing);
with rotary positions `cos` and `sin`. It returns its output's name.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ufbert.config import ActivationName, ModelConfig
from ufbert.ops.ngrams import FACTOR, NGRAMS, table_seed
from ufbert.ops.routed_tree import directions, folded, hashed_leaves, leaf_bias

Part = Mapping[str, Any]
"""Parameters of a layer, or of one of its parts."""


class Graph:
    """Nodes and constants, in the order in which they were added; values are known by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self._scope = ""

    def at(self, scope: str) -> "Graph":
        """Let the names of what follows begin with `scope`."""
        self._scope = scope
        return self

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Add a constant and return its name; small equal ones are kept once."""
        array = np.asarray(value, dtype, order="C")
        if array.size <= 8:
            name = f"{array.dtype.name}_{array.shape}_{array.tolist()}"
        else:
            name = f"{self._scope}constant_{len(self.constants)}"
        self.constants.setdefault(name, array)
        return name

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add an operator and return the name (or names) of its output."""
        from onnx import helper

        names = [f"{self._scope}{kind}_{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, names[0], **attributes))
        return names[0] if outputs == 1 else names

    def number(self, kind: str, x: str, value: float) -> str:
        """Add an operator of a value and a number."""
        return self.add(kind, x, self.constant(value))

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape: 0 keeps a dimension, -1 takes what is left."""
        return self.add("Reshape", x, self.constant(shape, np.int64))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """Insert dimensions of size one."""
        return self.add("Unsqueeze", x, self.constant(axes, np.int64))

    def total(self, x: str, axis: int, keep: bool = False) -> str:
        """Sum along an axis."""
        return self.add("ReduceSum", x, self.constant([axis], np.int64), keepdims=int(keep))

    def linear(self, x: str, part: Part) -> str:
        """Add x W (+ b)."""
        y = self.add("MatMul", x, self.constant(part["kernel"]))
        return self.add("Add", y, self.constant(part["bias"])) if "bias" in part else y

    def norm(self, x: str, part: Part, eps: float) -> str:
        """Add a LayerNorm over channels."""
        bias = part["bias"] if "bias" in part else np.zeros_like(part["scale"])
        return self.add(
            "LayerNormalization", x, self.constant(part["scale"]), self.constant(bias), axis=-1, epsilon=eps
        )

    def activate(self, x: str, kind: ActivationName) -> str:
        """Add the nonlinearity of that name."""
        if kind == "symmetric_gelu":
            return self.add("Mul", x, self.add("Erf", self.number("Mul", x, 2.0**-0.5)))
        if kind == "relu":
            return self.add("Relu", x)
        return self.add("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def rows(self, x: str) -> str:
        """Count the rows of a matrix, in a tensor of one element."""
        return self.add("Shape", x, start=0, end=1)


def ngrams(g: Graph, cfg: ModelConfig, part: Part) -> str:
    """Add the vectors of hashed tables (`ufbert.ops.ngrams`), in whole numbers of 64 bits that stay below 2^63."""

    def whole(kind: str, x: str, value: int) -> str:
        return g.add(kind, x, g.constant(value, np.int64))

    def near(x: str, offset: int, fill: int) -> str:
        """The value `offset` places further on in each row."""
        if not offset:
            return x
        padded = g.add("Pad", x, g.constant([0, 1, 0, 1], np.int64), g.constant(fill, np.int64))
        first, last = (0, -2) if offset < 0 else (2, 2**31 - 1)
        ends = (g.constant([number], np.int64) for number in (first, last, 1))
        return g.add("Slice", padded, *ends)

    def mix(x: str) -> str:
        for _ in range(2):
            x = whole("Mod", whole("Mul", g.add("BitwiseXor", x, whole("Div", x, 2**16)), FACTOR), 2**32)
        return g.add("BitwiseXor", x, whole("Div", x, 2**16))

    ids = {}
    for offset in (-1, 0, 1):
        same = g.add("Equal", near("attention_mask", offset, -1), "attention_mask")
        ids[offset] = g.add("Where", same, near("input_ids", offset, 0), g.constant(cfg.pad_id, np.int64))
    rows = []
    for key in cfg.ngram_keys:
        h = g.constant(int(table_seed(key)), np.int64)
        for offset in NGRAMS[key].offsets:
            h = mix(g.add("BitwiseXor", ids[offset], h))
        rows.append(g.add("Gather", g.constant(part[key]), whole("Mod", h, cfg.ngram_rows)))
    if cfg.ngram_width:
        return g.linear(g.add("Concat", *rows, axis=-1) if len(rows) > 1 else rows[0], part["projection"])
    return g.add("Sum", *rows)


def attention(g: Graph, cfg: ModelConfig, part: Part, x: str, context: dict[str, str]) -> str:
    """Add multi-head attention."""
    k = cfg.width_of_head

    def heads(name: str) -> str:
        y = g.linear(x, part[name])
        if name == "value" and context["values"]:
            y = g.add("Add", y, context["values"])
        y = g.reshape(y, 0, 0, cfg.n_heads, k)
        if f"{name}_norm" in part:
            mean = g.add("ReduceMean", g.add("Mul", y, y), g.constant([-1], np.int64))
            y = g.add("Div", y, g.add("Sqrt", g.number("Add", mean, 1e-6)))
            y = g.add("Mul", y, g.constant(part[f"{name}_norm"]["scale"]))
        if cfg.positions == "rotary" and name != "value":
            one, other = g.add("Split", y, outputs=2, axis=-1, num_outputs=2)
            cos, sin = context["cos"], context["sin"]
            turned = [
                g.add("Sub", g.add("Mul", one, cos), g.add("Mul", other, sin)),
                g.add("Add", g.add("Mul", other, cos), g.add("Mul", one, sin)),
            ]
            y = g.add("Concat", *turned, axis=-1)
        return g.add("Transpose", y, perm=[0, 2, 3, 1] if name == "key" else [0, 2, 1, 3])

    logits = g.number("Div", g.add("MatMul", heads("query"), heads("key")), math.sqrt(k))
    odds = g.add("Softmax", g.add("Add", logits, context["hidden"]), axis=-1)
    mixed = g.add("Transpose", g.add("MatMul", odds, heads("value")), perm=[0, 2, 1, 3])
    return g.linear(g.reshape(mixed, 0, 0, cfg.n_heads * k), part["out"])


def fourier(g: Graph, cfg: ModelConfig, part: Part, x: str, context: dict[str, str]) -> str:
    """Add FNet's mixing: the real part of the transform over channels and tokens."""
    y = g.unsqueeze(x, 3)
    for axis in (2, 1):
        y = g.add("DFT", y, "", g.constant(axis, np.int64))
    y = g.add("Gather", y, g.constant(0, np.int64), axis=3)
    ortho = cfg.fourier_norm == "ortho" or (cfg.fourier_norm == "auto" and cfg.norm == "pre")
    return g.number("Mul", y, (cfg.only_len * cfg.d_model) ** -0.5) if ortho else y


def dense(g: Graph, cfg: ModelConfig, part: Part, x: str, context: dict[str, str]) -> str:
    """Add activation(x W_in) W_out."""
    return g.linear(g.activate(g.linear(x, part["in"]), cfg.activation), part["out"])


def glu(g: Graph, cfg: ModelConfig, part: Part, x: str, context: dict[str, str]) -> str:
    """Add (activation(x W_gate) * x W_value) W_out."""
    gate = g.activate(g.linear(x, part["gate"]), cfg.activation)
    return g.linear(g.add("Mul", gate, g.linear(x, part["value"])), part["out"])


def tree(g: Graph, cfg: ModelConfig, part: Part, x: str, context: dict[str, str]) -> str:
    """Add the sum over trees and over the nodes of each row's path (`ufbert.ops.fff`), which weights of its own decide if the
    layer has `route`."""
    m, n, d = cfg.n_trees, cfg.nodes_per_tree, cfg.d_model
    rows = g.reshape(x, -1, d)
    wide, count = g.unsqueeze(rows, 1), g.add("Concat", g.rows(rows), g.constant([m], np.int64), axis=0)
    w_in, w_out = (g.constant(np.asarray(part[name]).reshape(m * n, d)) for name in ("w_in", "w_out"))
    bias = g.constant(np.asarray(part["bias"]).reshape(m * n))
    roots = g.constant(n * np.arange(m)[None], np.int64)
    if "route" in part and cfg.tree_depth:
        route, first = g.constant(np.asarray(part["route"]).reshape(m * (n // 2), d)), n // 2 * np.arange(m)[None]
        route_roots = g.constant(first, np.int64)
    node = g.add("Expand", g.constant([[0]], np.int64), count)
    y = ""
    for level in range(cfg.tree_depth + 1):
        at = g.add("Add", node, roots) if m > 1 else node
        product = g.total(g.add("Mul", wide, g.add("Gather", w_in, at)), 2)
        z = g.add("Add", product, g.add("Gather", bias, at))
        weight = g.unsqueeze(g.activate(z, cfg.tree_activation), 2)
        found = g.total(g.add("Mul", weight, g.add("Gather", w_out, at)), 1)
        y = g.add("Add", y, found) if y else found
        if level < cfg.tree_depth:
            if "route" in part:
                decider = g.add("Gather", route, g.add("Add", node, route_roots) if m > 1 else node)
                z = g.total(g.add("Mul", wide, decider), 2)
            right = g.add("Cast", g.add("Greater", z, g.constant(0.0)), to=7)
            left = g.add("Add", g.add("Add", node, node), g.constant(1, np.int64))
            node = g.add("Add", left, right)
    return g.add("Reshape", y, g.add("Shape", x))


def leaf_tree(g: Graph, cfg: ModelConfig, part: Part, x: str, context: dict[str, str]) -> str:
    """Add each row's own leaf (`ufbert.ops.leaf_fff`)."""
    d, depth = cfg.d_model, cfg.tree_depth
    rows = g.reshape(x, -1, d)
    node = g.add("Expand", g.constant([0], np.int64), g.rows(rows))
    if depth:
        node_w, node_b = g.constant(part["node"]), g.constant(part["node_bias"])
    for _ in range(depth):
        z = g.add("Add", g.total(g.add("Mul", rows, g.add("Gather", node_w, node)), 1), g.add("Gather", node_b, node))
        right = g.add("Cast", g.add("GreaterOrEqual", z, g.constant(0.0)), to=7)
        node = g.add("Add", g.add("Add", g.add("Add", node, node), g.constant(1, np.int64)), right)
    leaf = g.add("Sub", node, g.constant(2**depth - 1, np.int64))
    leaves = {name: g.add("Gather", g.constant(part[name]), leaf) for name in ("leaf_in", "leaf_out")}
    biases = {name: g.add("Gather", g.constant(part[f"{name}_bias"]), leaf) for name in ("leaf_in", "leaf_out")}
    squeezed = g.constant([1], np.int64)
    hidden = g.add("Squeeze", g.add("MatMul", g.unsqueeze(rows, 1), leaves["leaf_in"]), squeezed)
    hidden = g.activate(g.add("Add", hidden, biases["leaf_in"]), cfg.activation)
    y = g.add("Squeeze", g.add("MatMul", g.unsqueeze(hidden, 1), leaves["leaf_out"]), squeezed)
    y = g.add("Add", y, biases["leaf_out"])
    if cfg.master_leaf:
        share = float(part["master_share"][0])
        master = g.linear(g.activate(g.linear(rows, part["master_in"]), cfg.activation), part["master_out"])
        y = g.add("Add", g.number("Mul", y, 1 - share), g.number("Mul", master, share))
    return g.add("Reshape", y, g.add("Shape", x))


def routed_tree(g: Graph, cfg: ModelConfig, part: Part, x: str, context: dict[str, str]) -> str:
    """Add each row's leaf of every tree, times its gate (`ufbert.ops.routed_tree`)."""
    n_leaves = 2**cfg.tree_depth
    rows, squeezed = g.reshape(x, -1, cfg.d_model), g.constant([1], np.int64)
    wide, y, bias = g.unsqueeze(rows, 1), "", leaf_bias(part)
    leaves = {side: np.asarray(folded(part, side)) for side in ("in", "out")}
    chosen = np.asarray(hashed_leaves(jnp.arange(cfg.vocab_size), cfg.n_trees, n_leaves), np.int64)
    for tree in range(cfg.n_trees):
        gate = ""
        if cfg.tree_router == "token":
            leaf = g.reshape(g.add("Gather", g.constant(chosen[:, tree], np.int64), context["ids"]), -1)
        else:
            leaf, certain = _leaf_and_certainty(
                g, np.asarray(directions(jnp.asarray(part["node"][tree]))), part["node_bias"][tree], rows
            )
            gate = g.number("Mul", certain, 2.0 / cfg.tree_depth) if cfg.tree_gate == "path" and cfg.tree_depth else ""
        w_in, w_out = (g.add("Gather", g.constant(leaves[side][tree]), leaf) for side in ("in", "out"))
        hidden = g.add("MatMul", wide, w_in)
        if bias is not None:
            hidden = g.add("Add", hidden, g.unsqueeze(g.add("Gather", g.constant(bias.b_in[tree]), leaf), 1))
        found = g.add("Squeeze", g.add("MatMul", g.activate(hidden, cfg.activation), w_out), squeezed)
        if bias is not None:
            found = g.add("Add", found, g.add("Gather", g.constant(bias.b_out[tree]), leaf))
        found = g.add("Mul", found, g.unsqueeze(gate, 1)) if gate else found
        y = g.add("Add", y, found) if y else found
    if cfg.master_leaf:
        shared = g.linear(g.activate(g.linear(rows, part["shared_in"]), cfg.activation), part["shared_out"])
        y = g.add("Add", y, shared)
    return g.add("Reshape", y, g.add("Shape", x))


def _leaf_and_certainty(g: Graph, node_w: Any, node_b: Any, rows: str) -> tuple[str, str]:
    """Add the descent of one tree. Returns the leaf, and the sum over decisions of sigmoid(|logit|), "" without any."""
    node, certain, depth = (
        g.add("Expand", g.constant([0], np.int64), g.rows(rows)),
        "",
        (len(node_b) + 1).bit_length() - 1,
    )
    if depth:
        weights, biases = g.constant(node_w), g.constant(node_b)
    for _ in range(depth):
        z = g.total(g.add("Mul", rows, g.add("Gather", weights, node)), 1)
        z = g.add("Add", z, g.add("Gather", biases, node))
        sure = g.add("Sigmoid", g.add("Abs", z))
        certain = g.add("Add", certain, sure) if certain else sure
        right = g.add("Cast", g.add("Greater", z, g.constant(0.0)), to=7)
        node = g.add("Add", g.add("Add", g.add("Add", node, node), g.constant(1, np.int64)), right)
    return g.add("Sub", node, g.constant(2**depth - 1, np.int64)), certain


def switch(g: Graph, cfg: ModelConfig, part: Part, x: str, context: dict[str, str]) -> str:
    """Add each row's likeliest expert, times its probability (`ufbert.ops.switch`)."""
    rows = g.reshape(x, -1, cfg.d_model)
    odds = g.add("Softmax", g.add("MatMul", rows, g.constant(part["router"])), axis=-1)
    expert = g.add("ArgMax", odds, axis=-1, keepdims=0)
    y = g.number("Mul", rows, 0.0)
    for e in range(cfg.n_experts):
        mine = g.add("Transpose", g.add("NonZero", g.add("Equal", expert, g.constant(e, np.int64))), perm=[1, 0])
        hidden = g.add("MatMul", g.add("GatherND", rows, mine), g.constant(part["w_in"][e]))
        found = g.add("MatMul", g.activate(hidden, cfg.activation), g.constant(part["w_out"][e]))
        y = g.add("ScatterND", y, mine, found)
    gate = g.add("ReduceMax", odds, g.constant([-1], np.int64), keepdims=1)
    return g.add("Reshape", g.add("Mul", y, gate), g.add("Shape", x))

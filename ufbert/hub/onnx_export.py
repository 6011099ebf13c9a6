"""A model folder as an ONNX graph of standard operators, which ONNX Runtime and others execute as it is.

A tree layer is a gather of each row's node, a dot product and a step to a child, level by level: only the weights on the path
are touched there, too. Linear layers are `MatMul` with constant weights, which quantisers know. Inputs are `input_ids` and
`attention_mask` (1 on tokens, 0 on padding), (b, t) int64, and `token_type_ids` where the model has such; outputs
`last_hidden_state` (b, t, d) and `logits`, (b, t, v) of a masked-LM head or (b, c) of a classifier.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.config import ActivationName, ModelConfig
from ufbert.data.tokenizer import special_ids
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder
from ufbert.hub.tensors import write_folder
from ufbert.nn import Params
from ufbert.ops.mixing import sinusoid

OPSET = 20
"""Version of the operators: the first with Gelu."""
LARGEST = 2**31 - 2**20
"""Bytes of a single ONNX file; protocol buffers end there."""


class Graph:
    """Nodes and constants, in the order in which they were added; values are known by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self._scope = ""

    def at(self, scope: str) -> "Graph":
        """Names of what follows begin with `scope`."""
        self._scope = scope
        return self

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """The name of a constant; small equal ones are kept once."""
        array = np.asarray(value, dtype, order="C")
        if array.size <= 8:
            name = f"{array.dtype.name}_{array.shape}_{array.tolist()}"
        else:
            name = f"{self._scope}constant_{len(self.constants)}"
        self.constants.setdefault(name, array)
        return name

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The name (or names) of an operator's output."""
        from onnx import helper

        names = [f"{self._scope}{kind}_{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, names[0], **attributes))
        return names[0] if outputs == 1 else names

    def number(self, kind: str, x: str, value: float) -> str:
        """An operator of a value and a number."""
        return self.add(kind, x, self.constant(value))

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps a dimension, -1 takes what is left."""
        return self.add("Reshape", x, self.constant(shape, np.int64))

    def unsqueeze(self, x: str, *axes: int) -> str:
        """New dimensions of size one."""
        return self.add("Unsqueeze", x, self.constant(axes, np.int64))

    def total(self, x: str, axis: int, keep: bool = False) -> str:
        """The sum along an axis."""
        return self.add("ReduceSum", x, self.constant([axis], np.int64), keepdims=int(keep))

    def linear(self, x: str, part: Params) -> str:
        """x W (+ b)."""
        y = self.add("MatMul", x, self.constant(part["kernel"]))
        return self.add("Add", y, self.constant(part["bias"])) if "bias" in part else y

    def norm(self, x: str, part: Params, eps: float) -> str:
        """LayerNorm over channels."""
        bias = part["bias"] if "bias" in part else np.zeros_like(part["scale"])
        return self.add(
            "LayerNormalization", x, self.constant(part["scale"]), self.constant(bias), axis=-1, epsilon=eps
        )

    def activate(self, x: str, kind: ActivationName) -> str:
        """The nonlinearity of that name."""
        if kind == "symmetric_gelu":
            return self.add("Mul", x, self.add("Erf", self.number("Mul", x, 2.0**-0.5)))
        if kind == "relu":
            return self.add("Relu", x)
        return self.add("Gelu", x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def rows(self, x: str) -> str:
        """The number of rows of a matrix, as a tensor of one element."""
        return self.add("Shape", x, start=0, end=1)


def export_onnx(model: ModelFolder, folder: Path) -> str:
    """Write `model.onnx` and `tokenizer.json` into a folder, whole or not at all, and return what was written.

    Raises UserError without the package `onnx`, for a model of over two gigabytes, and if the disk refuses.
    """
    try:
        import onnx
    except ImportError as error:
        raise UserError("Exporting to ONNX needs the package onnx: pip install 'ufbert[onnx]'.") from error
    made = build(model)
    size = made.ByteSize()
    if size > LARGEST:
        raise UserError(f"The model takes {size / 1e9:.1f} GB, and an ONNX file at most 2.")
    onnx.checker.check_model(made)
    files = {"model.onnx": made.SerializeToString(), "tokenizer.json": model.tokenizer.to_str(pretty=True)}
    write_folder(folder, None, files)
    return f"model.onnx, opset {OPSET}, {size / 1e6:,.0f} MB"


def build(model: ModelFolder) -> Any:
    """The `onnx.ModelProto`."""
    from onnx import TensorProto, helper, numpy_helper

    cfg, params, g = model.config, model.params, Graph()
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if cfg.n_token_types else [])]
    t: Any = cfg.only_len or "tokens"
    hidden = encoder(g, cfg, params["encoder"])
    outputs = {hidden: ("last_hidden_state", ["batch", t, cfg.d_model])}
    if "masked_lm" in params:
        outputs[masked_lm(g.at("masked_lm/"), cfg, params, hidden)] = ("logits", ["batch", t, cfg.vocab_size])
    elif "classifier" in params:
        n_outputs = params["classifier"]["out"]["bias"].shape[-1]
        outputs[classifier(g.at("classifier/"), cfg, params["classifier"], hidden)] = ("logits", ["batch", n_outputs])
    for value, (name, _) in outputs.items():
        g.nodes.append(helper.make_node("Identity", [value], [name], name))
    graph = helper.make_graph(
        g.nodes,
        "ufbert",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", t]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.values()],
        [numpy_helper.from_array(array, name) for name, array in g.constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="ufbert")
    made.ir_version = min(made.ir_version, 10)
    ids = special_ids(model.tokenizer)
    about: dict[str, Any] = {
        "max_len": cfg.max_len,
        "pad_id": cfg.pad_id,
        "cls_id": ids.cls,
        "sep_id": ids.sep,
        "mask_id": ids.mask,
    }
    if model.task is not None:
        about |= {"task": model.task.name, "labels": ",".join(model.task.labels)}
        about |= {"independent": model.task.independent}
    helper.set_model_props(made, {name: str(value) for name, value in about.items()})
    return made


def encoder(g: Graph, cfg: ModelConfig, params: Params) -> str:
    """The hidden states of the last layer."""
    part = params["embeddings"]
    g.at("embeddings/")
    length = g.add("Shape", "input_ids", start=1, end=2)

    def first(table: Any) -> str:
        """A table's rows for the positions 0, 1, ..."""
        return g.add("Slice", g.constant(table), g.constant([0], np.int64), length, g.constant([0], np.int64))

    x = g.add("Gather", "embeddings.tokens", "input_ids")
    g.constants["embeddings.tokens"] = np.asarray(part["tokens"], np.float32)
    if cfg.positions == "learned":
        x = g.add("Add", x, first(part["positions"]))
    elif cfg.positions == "scaled_sinusoid":
        x = g.add("Add", x, first(float(part["position_scale"][0]) * np.asarray(sinusoid(cfg.max_len, cfg.d_model))))
    if cfg.n_token_types:
        x = g.add("Add", x, g.add("Gather", g.constant(part["types"]), "token_type_ids"))
    if cfg.embedding_norm:
        x = g.norm(x, part["norm"], cfg.norm_eps)
    if cfg.embedding_projection:
        x = g.linear(x, part["projection"])
    hidden = g.number("Mul", g.add("Sub", g.constant(1.0), g.add("Cast", "attention_mask", to=1)), -3e38)
    context = {"hidden": g.unsqueeze(hidden, 1, 2)}  # added to logits: no token sees padding
    if cfg.positions == "rotary":
        half = cfg.d_model // cfg.n_heads // 2
        angle = np.outer(np.arange(cfg.max_len), cfg.rotary_base ** (-np.arange(half) / half))
        context |= {name: g.unsqueeze(first(f(angle)), 1) for name, f in (("cos", np.cos), ("sin", np.sin))}
    for i, (mixer, feedforward) in enumerate(cfg.layers):
        layer = params[f"layer_{i:02d}"]
        g.at(f"layer_{i:02d}/")
        mix = attention if mixer == "attention" else fourier
        feed = FEEDFORWARDS[feedforward]
        if cfg.norm == "pre":
            normed = g.norm(x, layer["mixer_norm"], cfg.norm_eps) if i > 0 or cfg.first_norm else x
            x = g.add("Add", x, mix(g, cfg, layer.get(mixer, {}), normed, context))
            normed = g.norm(x, layer["feedforward_norm"], cfg.norm_eps)
            x = g.add("Add", x, feed(g, cfg, layer[feedforward], normed))
        else:
            x = g.add("Add", x, mix(g, cfg, layer.get(mixer, {}), x, context))
            x = g.norm(x, layer["mixer_norm"], cfg.norm_eps)
            x = g.add("Add", x, feed(g, cfg, layer[feedforward], x))
            x = g.norm(x, layer["feedforward_norm"], cfg.norm_eps)
    return g.norm(x, params["final_norm"], cfg.norm_eps) if cfg.final_norm else x


def attention(g: Graph, cfg: ModelConfig, part: Params, x: str, context: dict[str, str]) -> str:
    """Multi-head attention."""
    k = cfg.d_model // cfg.n_heads

    def heads(name: str) -> str:
        y = g.reshape(g.linear(x, part[name]), 0, 0, cfg.n_heads, k)
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
    return g.linear(g.reshape(mixed, 0, 0, cfg.d_model), part["out"])


def fourier(g: Graph, cfg: ModelConfig, part: Params, x: str, context: dict[str, str]) -> str:
    """FNet's mixing: the real part of the transform over channels and tokens."""
    y = g.unsqueeze(x, 3)
    for axis in (2, 1):
        y = g.add("DFT", y, "", g.constant(axis, np.int64))
    y = g.add("Gather", y, g.constant(0, np.int64), axis=3)
    ortho = cfg.fourier_norm == "ortho" or (cfg.fourier_norm == "auto" and cfg.norm == "pre")
    return g.number("Mul", y, (cfg.only_len * cfg.d_model) ** -0.5) if ortho else y


def dense(g: Graph, cfg: ModelConfig, part: Params, x: str) -> str:
    """activation(x W_in) W_out."""
    return g.linear(g.activate(g.linear(x, part["in"]), cfg.activation), part["out"])


def glu(g: Graph, cfg: ModelConfig, part: Params, x: str) -> str:
    """(activation(x W_gate) * x W_value) W_out."""
    gate = g.activate(g.linear(x, part["gate"]), cfg.activation)
    return g.linear(g.add("Mul", gate, g.linear(x, part["value"])), part["out"])


def tree(g: Graph, cfg: ModelConfig, part: Params, x: str) -> str:
    """The sum over trees and over the nodes of each row's path (`ufbert.ops.fff`)."""
    m, n, d = cfg.n_trees, cfg.nodes_per_tree, cfg.d_model
    rows = g.reshape(x, -1, d)
    wide, count = g.unsqueeze(rows, 1), g.add("Concat", g.rows(rows), g.constant([m], np.int64), axis=0)
    w_in, w_out = (g.constant(np.asarray(part[name]).reshape(m * n, d)) for name in ("w_in", "w_out"))
    bias = g.constant(np.asarray(part["bias"]).reshape(m * n))
    roots = g.constant(n * np.arange(m)[None], np.int64)
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
            right = g.add("Cast", g.add("Greater", z, g.constant(0.0)), to=7)
            left = g.add("Add", g.add("Add", node, node), g.constant(1, np.int64))
            node = g.add("Add", left, right)
    return g.add("Reshape", y, g.add("Shape", x))


def leaf_tree(g: Graph, cfg: ModelConfig, part: Params, x: str) -> str:
    """Each row's own leaf (`ufbert.ops.leaf_fff`)."""
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


def switch(g: Graph, cfg: ModelConfig, part: Params, x: str) -> str:
    """Each row's likeliest expert, times its probability (`ufbert.ops.switch`)."""
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


FEEDFORWARDS = {"dense": dense, "glu": glu, "tree": tree, "leaf_tree": leaf_tree, "switch": switch}


def masked_lm(g: Graph, cfg: ModelConfig, params: Params, x: str) -> str:
    """Token logits."""
    part = params["masked_lm"]
    if cfg.head_transform:
        x = g.norm(g.activate(g.linear(x, part["transform"]), cfg.activation), part["norm"], cfg.norm_eps)
    logits = g.add("MatMul", x, g.add("Transpose", "embeddings.tokens", perm=[1, 0]))
    return g.add("Add", logits, g.constant(part["bias"])) if cfg.head_bias else logits


def classifier(g: Graph, cfg: ModelConfig, part: Params, x: str) -> str:
    """A classifier's scores."""
    if cfg.pooling == "first":
        pooled = g.add("Gather", x, g.constant(0, np.int64), axis=1)
    else:
        real = g.add("Cast", "attention_mask", to=1)
        sums = g.total(g.add("Mul", x, g.unsqueeze(real, 2)), 1)
        pooled = g.add("Div", sums, g.add("Max", g.total(real, 1, keep=True), g.constant(1.0)))
    pooled = g.linear(pooled, part["pooler"]["dense"])
    if cfg.pooler == "transform":
        pooled = g.norm(g.activate(pooled, cfg.activation), part["pooler"]["norm"], cfg.norm_eps)
    else:
        pooled = g.add("Tanh", pooled)
    return g.linear(pooled, part["out"])

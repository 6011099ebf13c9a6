"""A model folder as an ONNX graph of standard operators, which ONNX Runtime and others execute as it is.

A tree layer is a gather of each row's node, a dot product and a step to a child, level by level: only the weights on the path
are touched there, too. Linear layers are `MatMul` with constant weights, which quantisers know. Inputs are `input_ids` and
`attention_mask` (1 on tokens, 0 on padding), (b, t) int64, and `token_type_ids` where the model has such; outputs
`last_hidden_state` (b, t, d) and `logits`, (b, t, v) of a masked-LM head or (b, c) of a classifier.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ufbert.config import ModelConfig
from ufbert.data.tokenizer import special_ids
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder
from ufbert.hub.tensors import write_folder
from ufbert.nn import Params
from ufbert.nn.onnx_rules import Graph, ngrams
from ufbert.nn.registry import FEEDFORWARDS, MIXERS, Layer, OnnxRule
from ufbert.ops.mixing import sinusoid

OPSET = 20
"""Version of the operators: the first with Gelu."""
LARGEST = 2**31 - 2**20
"""Bytes of a single ONNX file; protocol buffers end there."""


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
    """Build the `onnx.ModelProto`."""
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
    about: dict[str, Any] = {"max_len": cfg.max_len, "pad_id": cfg.pad_id}
    about |= {"cls_id": ids.cls, "sep_id": ids.sep, "mask_id": ids.mask}
    if model.task is not None:
        about |= {"task": model.task.name, "labels": ",".join(model.task.labels)}
        about |= {"independent": model.task.independent}
    helper.set_model_props(made, {name: str(value) for name, value in about.items()})
    return made


def encoder(g: Graph, cfg: ModelConfig, params: Params) -> str:
    """Compute the hidden states of the last layer."""
    part = params["embeddings"]
    g.at("embeddings/")
    length = g.add("Shape", "input_ids", start=1, end=2)

    def first(table: Any) -> str:
        """Take a table's rows for the positions 0, 1, ..."""
        return g.add("Slice", g.constant(table), g.constant([0], np.int64), length, g.constant([0], np.int64))

    x = g.add("Gather", "embeddings.tokens", "input_ids")
    g.constants["embeddings.tokens"] = np.asarray(part["tokens"], np.float32)
    if cfg.positions == "learned":
        x = g.add("Add", x, first(part["positions"]))
    elif cfg.positions == "scaled_sinusoid":
        x = g.add("Add", x, first(float(part["position_scale"][0]) * np.asarray(sinusoid(cfg.max_len, cfg.d_model))))
    if cfg.n_token_types:
        x = g.add("Add", x, g.add("Gather", g.constant(part["types"]), "token_type_ids"))
    near = ngrams(g.at("ngrams/"), cfg, params["ngrams"]) if cfg.ngram_rows else ""
    g.at("embeddings/")
    if near and not cfg.ngram_layer:
        x = g.add("Add", x, near)
    if cfg.embedding_norm:
        x = g.norm(x, part["norm"], cfg.norm_eps)
    if cfg.embedding_projection:
        x = g.linear(x, part["projection"])
    hidden = g.number("Mul", g.add("Sub", g.constant(1.0), g.add("Cast", "attention_mask", to=1)), -3e38)
    context = {"ids": "input_ids", "hidden": g.unsqueeze(hidden, 1, 2)}  # added to logits: no token sees padding
    if cfg.positions == "rotary":
        half = cfg.width_of_head // 2
        angle = np.outer(np.arange(cfg.max_len), cfg.rotary_base ** (-np.arange(half) / half))
        context |= {name: g.unsqueeze(first(f(angle)), 1) for name, f in (("cos", np.cos), ("sin", np.sin))}
    values, outputs = token_values(g, cfg, params), []
    for i, (mixer, feedforward) in enumerate(cfg.layers):
        layer = params[f"layer_{i:02d}"]
        g.at(f"layer_{i:02d}/")
        if near and 0 < i == cfg.ngram_layer:
            x = g.add("Add", x, near)
        context["values"] = values[i]
        if (lower := cfg.skips[i]) is not None:
            x = g.add("Add", x, g.number("Mul", outputs[lower], float(params["skip_scales"][lower])))
        parts = [(mixer, _rule("mixer", mixer, MIXERS), "mixer_norm")]
        if feedforward != "none":
            parts += [(feedforward, _rule("feedforward", feedforward, FEEDFORWARDS), "feedforward_norm")]
        for name, rule, norm in parts:
            is_normed = norm in layer  # not before the first mixer of some models
            normed = g.norm(x, layer[norm], cfg.norm_eps) if cfg.norm == "pre" and is_normed else x
            x = g.add("Add", x, rule(g, cfg.of_layer(i), layer.get(name, {}), normed, context))
            if cfg.norm == "post":
                x = g.norm(x, layer[norm], cfg.norm_eps)
        outputs.append(x)
    return g.norm(x, params["final_norm"], cfg.norm_eps) if cfg.final_norm else x


def token_values(g: Graph, cfg: ModelConfig, params: Params) -> list[str]:
    """Look up the value embeddings of each layer, times its scale; an empty name for a layer without."""
    if not cfg.value_embeddings:
        return [""] * cfg.n_layers
    part = params["value_embeddings"]
    g.at("value_embeddings/")
    vectors = [g.add("Gather", g.constant(table), "input_ids") for table in part["tables"]]
    scales = iter(part["scales"])
    return ["" if j is None else g.number("Mul", vectors[j], float(next(scales))) for j in cfg.value_tables]


def _rule(part: str, kind: str, layers: Mapping[str, Layer]) -> OnnxRule:
    """Look up the rule of a kind. Raises UserError with the sentence that its entry has instead."""
    rule = layers[kind].onnx
    if isinstance(rule, str):
        raise UserError(f"The {part} {kind!r} cannot be exported to ONNX: {rule}")
    return rule


def masked_lm(g: Graph, cfg: ModelConfig, params: Params, x: str) -> str:
    """Compute token logits."""
    part = params["masked_lm"]
    if cfg.head_transform:
        x = g.norm(g.activate(g.linear(x, part["transform"]), cfg.activation), part["norm"], cfg.norm_eps)
    decoder = "embeddings.tokens" if cfg.tie_head else g.constant(part["decoder"])
    logits = g.add("MatMul", x, g.add("Transpose", decoder, perm=[1, 0]))
    return g.add("Add", logits, g.constant(part["bias"])) if cfg.head_bias else logits


def classifier(g: Graph, cfg: ModelConfig, part: Params, x: str) -> str:
    """Compute a classifier's scores."""
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

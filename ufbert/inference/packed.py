"""An encoder on packed weights: the forward pass of `ufbert.nn.encode`, in plain functions that call the C++ kernels.

`pack` rounds an encoder's weights to a narrower type, and lays them out as the kernels read them. The tree keeps the names
of the parameters that it was made from, with three differences:

- the `kernel` of a linear layer is a `native.Packed`;
- attention has one linear layer `qkv` in place of `query`, `key` and `value`;
- `w_in` and `w_out` of a tree, and tables, may be bfloat16, or `native.Quantized`.

The int8 weights of a quantised folder (`ufbert.hub.quantized`) are taken as they are stored.

`PACKED_LAYERS` has two functions for each kind of mixer and feedforward: one packs a layer, the other computes it. Kinds
that are not there keep their weights, and are computed by their training modules.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.hub.quantized import QuantizedTensor
from ufbert.nn.embeddings import token_values
from ufbert.nn.layers import Context
from ufbert.nn.ngrams import table_rows
from ufbert.nn.registry import FEEDFORWARDS, MIXERS
from ufbert.ops import fff, native, routed_tree
from ufbert.ops.dense import ACTIVATIONS
from ufbert.ops.mixing import attention_mask, rotate, sinusoid

Dtype = Literal["float32", "bfloat16", "int8"]
Width = Literal["float32", "bfloat16", "int8", "stored"]
"""A type, or `stored`: int8 where a quantised folder has int8, and float32 elsewhere."""
Params = Mapping[str, Any]
Hidden = Float[Array, "b t d"]


def pack(encoder: Params, config: ModelConfig, dtype: Width = "float32", exact_routing: bool = False) -> dict[str, Any]:
    """Pack the parameters of an encoder (`params["encoder"]`) for this CPU.

    Linear layers, trees and hashed tables get weights of type `dtype`, int8 with one factor a column, a node or a row. With
    `exact_routing` the input weights of trees stay float32. Raises CannotBuild if there are no kernels, and UserError for
    queries, keys and values whose common input is rounded in several ways.
    """
    packed = {**encoder, "embeddings": dict(encoder["embeddings"])}
    if dtype == "stored":
        packed["embeddings"]["tokens"] = _narrow(encoder["embeddings"]["tokens"], dtype)
    if config.embedding_projection:
        packed["embeddings"]["projection"] = _pack_linear(encoder["embeddings"]["projection"], dtype)
    if config.ngram_rows:
        packed["ngrams"] = {
            name: _pack_linear(part, dtype) if name == "projection" else _narrow(part, dtype)
            for name, part in encoder["ngrams"].items()
        }
    for name in (f"layer_{i:02d}" for i in range(config.n_layers)):
        packed[name] = {
            part: PACKED_LAYERS[part].pack(params, dtype, exact_routing) if part in PACKED_LAYERS else params
            for part, params in encoder[name].items()
        }
    return jax.tree.map(jnp.asarray, packed)


def pack_decoder(params: Params, config: ModelConfig) -> native.Packed | None:
    """Pack the decoder of a masked-LM head as a quantised folder stores it. Return None if its decoder is float32."""
    table = params["encoder"]["embeddings"]["tokens"] if config.tie_head else params["masked_lm"]["decoder"]
    if not isinstance(table, QuantizedTensor):
        return None
    return native.pack_rounded(table.integers().T, table.factor, table.input)


def decoder_logits(params: Params, config: ModelConfig, hidden: Float[Array, "n d"]) -> Float[Array, "n v"]:
    """Compute token logits from hidden states, given the head as `masked_lm` and its packed decoder as `decoder`."""
    rows, bias = nn.masked_lm_rows(params, config, hidden)
    return native.linear(rows, params["decoder"], bias, config.vocab_size)


def forward(
    encoder: Params,
    config: ModelConfig,
    ids: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    position_ids: Int[Array, "#b t"],
    type_ids: Int[Array, "b t"],
) -> tuple[Hidden, dict[str, Hidden], list[Hidden]]:
    """Compute the hidden states of the last layer, the input of each layer's feedforward, and all hidden states.

    Arguments as in `ufbert.nn.encode`. The inputs go by the layer's name. The hidden states are those of the embeddings, and
    of each layer before the last norm. Both cost nothing if they are not used.
    """
    # Only modules without a packed function read this mask; attention here goes by the segments.
    mask = attention_mask(segment_ids)
    real = segment_ids != 0
    context = Context(mask, segment_ids, real, position_ids, training=False, progress=1.0, statistics=False, ids=ids)
    embeddings, inputs = encoder["embeddings"], {}
    x = _rows(embeddings["tokens"], ids)
    if config.positions == "learned":
        x = x + embeddings["positions"][position_ids]
    elif config.positions == "scaled_sinusoid":
        x = x + embeddings["position_scale"][0] * sinusoid(config.max_len, config.d_model)[position_ids]
    if config.n_token_types:
        x = x + embeddings["types"][type_ids]
    near = _ngrams(encoder["ngrams"], config, ids, segment_ids) if config.ngram_rows else None
    if near is not None and config.ngram_layer == 0:
        x = x + near
    if config.embedding_norm:
        x = _layer_norm(embeddings["norm"], config, x)
    if config.embedding_projection:
        x = _linear(embeddings["projection"], x, config.d_model)
    values, outputs = [None] * config.n_layers, [x]
    if config.value_embeddings:
        values = token_values(config, **encoder["value_embeddings"], ids=ids)
    for i, (mixer, feedforward) in enumerate(config.layers):
        layer, cfg = encoder[name := f"layer_{i:02d}"], config.of_layer(i)
        if near is not None and 0 < i == config.ngram_layer:
            x = native.add(x, near)
        context = context._replace(values=values[i])
        if (lower := config.skips[i]) is not None:
            x = x + encoder["skip_scales"][lower] * outputs[1 + lower]
        if config.norm == "pre":
            normed = _layer_norm(layer["mixer_norm"], config, x) if "mixer_norm" in layer else x
            x = native.add(x, _compute(mixer, layer, cfg, normed, context))
            if feedforward != "none":
                inputs[name] = _layer_norm(layer["feedforward_norm"], config, x)
                x = native.add(x, _compute(feedforward, layer, cfg, inputs[name], context))
        else:
            x = native.add(x, _compute(mixer, layer, cfg, x, context))
            inputs[name] = x = _layer_norm(layer["mixer_norm"], config, x)
            if feedforward != "none":
                x = native.add(x, _compute(feedforward, layer, cfg, x, context))
                x = _layer_norm(layer["feedforward_norm"], config, x)
        outputs.append(x)
    return _layer_norm(encoder["final_norm"], config, x) if config.final_norm else x, inputs, outputs


class TreeRouting(NamedTuple):
    """Routing decisions of a tree layer on a batch."""

    visits: Float[Array, "m n"]
    """Tokens that visit each node, without padding."""
    margins: Float[Array, " tokens"]
    """The absolute logit of each token's closest decision, over all trees; infinite if nothing is decided."""
    changed: Float[Array, ""]
    """Share of tokens that rounding sends along another path through any tree, from the same hidden state."""


def tree_routing(
    tree: Params, x: Hidden, exact_w_in: Float[Array, "m n d"], segment_ids: Int[Array, "b t"]
) -> TreeRouting:
    """Report the routing decisions of a packed tree layer on its input, given its unrounded `w_in`."""
    rows, real = x.reshape(-1, x.shape[-1]), segment_ids.reshape(-1) != 0
    nodes, z = fff.path_nodes(rows, native.restore(tree["w_in"]), tree["bias"])
    exact_nodes, _ = fff.path_nodes(rows, exact_w_in, tree["bias"])
    margins = jnp.min(jnp.abs(z[..., :-1]), axis=(1, 2), initial=jnp.inf)  # the last level decides nothing
    changed = jnp.mean(jnp.any(exact_nodes != nodes, axis=(1, 2)), where=real)
    return TreeRouting(fff.node_visits(nodes, exact_w_in.shape[1], real), margins, changed)


def _compute(kind: str, layer: Params, config: ModelConfig, x: Hidden, context: Context) -> Hidden:
    """Compute a layer's mixer or feedforward."""
    if kind in PACKED_LAYERS:
        return PACKED_LAYERS[kind].forward(layer[kind], config, x, context)
    module: Any = (MIXERS | FEEDFORWARDS)[kind].module(config)
    output = module.apply({"params": layer.get(kind, {})}, x, context, None)
    return output if kind in MIXERS else output[0]


def _layer_norm(params: Params, config: ModelConfig, x: Hidden) -> Hidden:
    rows = x.reshape(-1, x.shape[-1])
    return native.layer_norm(rows, params["scale"], params.get("bias"), config.norm_eps).reshape(x.shape)


def _ngrams(params: Params, config: ModelConfig, ids: Int[Array, "b t"], segment_ids: Int[Array, "b t"]) -> Hidden:
    """Compute the vectors of hashed tables; only the rows that are read are made float32."""
    rows = [_rows(params[key], at) for key, at in table_rows(config, ids, segment_ids).items()]
    if not config.ngram_width:
        return sum(rows[1:], rows[0])
    return _linear(params["projection"], jnp.concatenate(rows, axis=-1), config.d_model)


def _rows(table: native.Weights, at: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Return some rows of a table as float32."""
    return native.restore(jax.tree.map(lambda part: part[at], table))


def _pack_linear(params: Params, dtype: Width) -> dict[str, Any]:
    kernel = params["kernel"]
    if dtype == "stored" and isinstance(kernel, QuantizedTensor):
        return {**params, "kernel": native.pack_rounded(kernel.integers(), kernel.factor, kernel.input)}
    return {**params, "kernel": native.pack(np.asarray(kernel), "float32" if dtype == "stored" else dtype)}


def _linear(params: Params, x: Float[Array, "b t d"], width: int) -> Float[Array, "b t f"]:
    rows = x.reshape(-1, x.shape[-1])
    return native.linear(rows, params["kernel"], params.get("bias"), width).reshape(*x.shape[:-1], width)


def _pack_attention(params: Params, dtype: Width, exact_routing: bool) -> dict[str, Any]:
    """Join the three projections, so that one product computes them."""
    three = [params[name] for name in ("query", "key", "value")]
    qkv = {name: _joined([part[name] for part in three]) for name in three[0]}
    norms = {name: params[name] for name in ("query_norm", "key_norm") if name in params}
    return {"qkv": _pack_linear(qkv, dtype), "out": _pack_linear(params["out"], dtype), **norms}


def _joined(parts: list[Any]) -> Any:
    """Put arrays side by side. Rounded ones stay so, if their inputs are rounded alike; else raises UserError."""
    quantized = [part for part in parts if isinstance(part, QuantizedTensor)]
    if len(quantized) < len(parts):
        return np.concatenate([np.asarray(part) for part in parts], axis=-1)
    if any(not np.array_equal(part.input, parts[0].input) for part in parts):
        raise UserError("A quantised folder rounds the input of queries, keys and values of a layer in several ways.")
    whole, factor = (
        np.concatenate(each, axis=-1) for each in zip(*((p.integers(), p.factor) for p in parts), strict=True)
    )
    return QuantizedTensor(whole, factor, "columns", parts[0].input)


def _attention(params: Params, config: ModelConfig, x: Hidden, context: Context) -> Hidden:
    (b, t, d), h, width = x.shape, config.n_heads, config.width_of_head
    qkv = _linear(params["qkv"], x, 3 * h * width).reshape(b, t, 3, h, width)
    if context.values is not None:
        qkv = qkv.at[:, :, 2].add(context.values.reshape(b, t, h, width))
    if config.qk_norm or config.positions == "rotary":
        query, key = qkv[:, :, 0], qkv[:, :, 1]
        if config.qk_norm:
            query, key = _rms_norm(params["query_norm"], query), _rms_norm(params["key_norm"], key)
        if config.positions == "rotary":
            query, key = (rotate(part, context.position_ids, config.rotary_base) for part in (query, key))
        qkv = jnp.stack([query, key, qkv[:, :, 2]], axis=2)
    # Fourier mixers of other layers read padding too, so there it must hold what it holds in training.
    narrow = params["qkv"]["kernel"].weights.dtype != jnp.float32
    mixed = native.attention(qkv, context.segment_ids, padding_sees=config.only_len > 0, narrow=narrow)
    return _linear(params["out"], mixed.reshape(b, t, h * width), d)


def _rms_norm(params: Params, x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
    """Divide by the root of the mean square, as `flax.linen.RMSNorm` does."""
    scale = params["scale"].reshape(1, 1, 1, -1)
    return x * (jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6) * scale)


def _pack_linears(params: Params, dtype: Width, exact_routing: bool) -> dict[str, Any]:
    """Pack all linear layers of a feedforward. The leaves of a leaf tree are none, and stay as they are."""
    return {
        name: _pack_linear(part, dtype) if isinstance(part, Mapping) else _narrow(part, _kept(dtype))
        for name, part in params.items()
    }


def _dense(params: Params, config: ModelConfig, x: Hidden, context: Context) -> Hidden:
    return _two_layers(params["in"], params["out"], config, x, config.d_hidden)


def _two_layers(first: Params, second: Params, config: ModelConfig, x: Hidden, width: int) -> Hidden:
    """Compute a linear layer of `width` outputs, the activation, and a linear layer back."""
    weights = (first["kernel"], first.get("bias"), second["kernel"], second.get("bias"))
    rows, widths = x.reshape(-1, x.shape[-1]), (width, config.d_model)
    return native.feed_forward(rows, *weights, widths, activation=config.activation).reshape(x.shape)


def _glu(params: Params, config: ModelConfig, x: Hidden, context: Context) -> Hidden:
    gate = ACTIVATIONS[config.activation](_linear(params["gate"], x, config.d_hidden))
    return _linear(params["out"], gate * _linear(params["value"], x, config.d_hidden), config.d_model)


def _leaf_tree(params: Params, config: ModelConfig, x: Hidden, context: Context) -> Hidden:
    names = ("node", "node_bias", "leaf_in", "leaf_in_bias", "leaf_out", "leaf_out_bias")
    tree, activation = [params[name] for name in names], ACTIVATIONS[config.activation]
    y = native.leaf_forward(x.reshape(-1, config.d_model), *tree, activation=config.activation)[0].reshape(x.shape)
    if config.master_leaf:
        share, hidden = params["master_share"][0], activation(_linear(params["master_in"], x, config.master_leaf))
        y = (1 - share) * y + share * _linear(params["master_out"], hidden, config.d_model)
    return y


_quantize = jax.jit(native.quantize)


def _kept(dtype: Width) -> Width:
    """Return the type of weights that no narrower type is chosen for."""
    return "stored" if dtype == "stored" else "float32"


def _narrow(weights: Any, dtype: Width) -> Any:
    """Round rows. Those that a quantised folder has rounded are taken as they are; of columns too, each a row of the result's
    second but last axis."""
    if dtype == "stored" and isinstance(weights, QuantizedTensor):
        return native.Quantized(jnp.asarray(weights.integers()), jnp.asarray(weights.factor))
    dtype = "float32" if dtype == "stored" else dtype
    return _quantize(jnp.asarray(weights)) if dtype == "int8" else jnp.asarray(weights, dtype)


def _pack_routed_tree(params: Params, dtype: Width, exact_routing: bool) -> dict[str, Any]:
    """Add up the weights of leaves and of the nodes above them, a neuron a row. Decisions stay float32."""
    packed = {name: part for name, part in params.items() if name.startswith("node") or name.endswith("bias")}
    if "node" in packed:
        packed["node"] = routed_tree.directions(jnp.asarray(packed["node"]))
    for side in ("in", "out"):
        stored = _narrow(params[f"leaf_{side}"], "stored") if dtype == "stored" else None
        if isinstance(stored, native.Quantized):  # a quantised folder has no weights of nodes above the leaves
            packed[side] = stored._replace(rows=stored.rows.swapaxes(2, 3)) if side == "in" else stored
            continue
        leaves = routed_tree.folded(params, side)
        packed[side] = _narrow(leaves.swapaxes(2, 3) if side == "in" else leaves, dtype)
    return packed | {name: _pack_linear(part, dtype) for name, part in params.items() if name.startswith("shared")}


def _routed_tree(params: Params, config: ModelConfig, x: Hidden, context: Context) -> Hidden:
    rows, activation = x.reshape(-1, config.d_model), ACTIVATIONS[config.activation]
    bias = routed_tree.leaf_bias(params)
    if config.tree_router == "token":
        assert context.ids is not None
        w_in, w_out = native.restore(params["in"]).swapaxes(2, 3), native.restore(params["out"])
        leaf = routed_tree.hashed_leaves(context.ids.reshape(-1), *w_in.shape[:2])
        y = routed_tree.grouped(rows, leaf, jnp.ones(leaf.shape), w_in, w_out, activation, bias)
    else:
        weights = (params["node"], params["node_bias"], params["in"], params["out"])
        gated = config.tree_gate == "path"
        y = native.routed_forward(rows, *weights, *(bias or ()), gated=gated, activation=config.activation)
    y = y.reshape(x.shape)
    if config.master_leaf:
        hidden = activation(_linear(params["shared_in"], x, config.master_leaf))
        y = native.add(y, _linear(params["shared_out"], hidden, config.d_model))
    return y


def _pack_tree(params: Params, dtype: Width, exact_routing: bool) -> dict[str, Any]:
    w_in = _narrow(params["w_in"], "float32" if exact_routing else dtype)
    return {"w_in": w_in, "bias": params["bias"], "w_out": _narrow(params["w_out"], dtype)}


def _tree(params: Params, config: ModelConfig, x: Hidden, context: Context) -> Hidden:
    rows, activation = x.reshape(-1, config.d_model), config.tree_activation
    y = native.tree_forward(rows, params["w_in"], params["bias"], params["w_out"], activation=activation)
    return y.reshape(x.shape)


class PackedLayer(NamedTuple):
    """The functions of one kind of layer: how it is packed, and computed from packed weights."""

    pack: Callable[[Params, Width, bool], dict[str, Any]]
    """(parameters, type of the weights, exact routing) -> packed weights."""
    forward: Callable[[Params, ModelConfig, Hidden, Context], Hidden]
    """(packed weights, config, input, context) -> output."""


PACKED_LAYERS: dict[str, PackedLayer] = {
    "attention": PackedLayer(_pack_attention, _attention),
    "dense": PackedLayer(_pack_linears, _dense),
    "glu": PackedLayer(_pack_linears, _glu),
    "leaf_tree": PackedLayer(_pack_linears, _leaf_tree),
    "routed_tree": PackedLayer(_pack_routed_tree, _routed_tree),
    "tree": PackedLayer(_pack_tree, _tree),
}

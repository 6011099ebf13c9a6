"""A whole model: initialisation, the encoder, and its heads, as functions of a configuration and parameters."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ufbert.config import ModelConfig
from ufbert.nn.encoder import Encoder
from ufbert.nn.heads import ClassifierHead, MaskedLMHead, Pooler
from ufbert.nn.layers import Aux
from ufbert.ops import native

Params = Mapping[str, Any]


def init(config: ModelConfig, key: Key[Array, ""], heads: tuple[str, ...] = ("masked_lm",)) -> dict[str, Any]:
    """Fresh parameters for the encoder and the named heads (`masked_lm`, `pooler`).

    What draws them is compiled once for each kind of layer, not for each layer, which took a GPU a minute.
    """
    encoder_key, head_key = jax.random.split(key)
    params = _init_beside_layers(_of_layer(config, 0), encoder_key, head_key, heads)
    for i in range(config.n_layers):
        params["encoder"][f"layer_{i:02d}"] = _init_layer(_of_layer(config, i), jax.random.fold_in(encoder_key, i))
    return params


def _of_layer(config: ModelConfig, i: int) -> ModelConfig:
    """An encoder of one layer, like layer i."""
    mixer, feedforward = config.layers[i]
    # Flax traces a forward pass for the shapes: no kernels for that.
    return replace(
        config, n_layers=1, mixer=(mixer,), feedforward=(feedforward,), first_norm=config.first_norm or i > 0,
        tree_backend="gather",
    )  # fmt: skip


def _init_encoder(config: ModelConfig, key: Key[Array, ""]) -> dict[str, Any]:
    return Encoder(config).init(key, jnp.zeros((1, config.only_len or 2), jnp.int32))["params"]


@partial(jax.jit, static_argnames="config")
def _init_layer(config: ModelConfig, key: Key[Array, ""]) -> dict[str, Any]:
    return _init_encoder(config, key)["layer_00"]


@partial(jax.jit, static_argnames=("config", "heads"))
def _init_beside_layers(
    config: ModelConfig, encoder_key: Key[Array, ""], head_key: Key[Array, ""], heads: tuple[str, ...]
) -> dict[str, Any]:
    encoder = _init_encoder(config, encoder_key)
    params, hidden = {"encoder": encoder}, jnp.zeros((1, 2, config.d_model))
    del encoder["layer_00"]
    if "masked_lm" in heads:
        table = encoder["embeddings"]["tokens"]
        params["masked_lm"] = MaskedLMHead(config).init(head_key, hidden, table).get("params", {})
    if "pooler" in heads:
        params["pooler"] = Pooler(config).init(head_key, hidden)["params"]
    return params


def init_classifier(config: ModelConfig, key: Key[Array, ""], n_outputs: int) -> dict[str, Any]:
    """Fresh parameters of a classifier head, to put beside an encoder under `classifier`."""
    return ClassifierHead(config, n_outputs).init(key, jnp.zeros((1, 2, config.d_model)))["params"]


def encode(
    params: Params,
    config: ModelConfig,
    ids: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None = None,
    position_ids: Int[Array, "#b t"] | None = None,
    key: Key[Array, ""] | None = None,
    deterministic: bool = True,
    *,
    type_ids: Int[Array, "b t"] | None = None,
    progress: Float[Array, ""] | float = 1.0,
    statistics: bool = False,
) -> tuple[Float[Array, "b t d"], Aux]:
    """Hidden states of the last layer, and what layers report beside them. Arguments as in `Encoder`.

    Where `params` has a part `packed` (`pack`), the C++ kernels for inference compute with the weights in it, forward only.
    """
    apply: Any = Encoder(config).apply
    options = {"type_ids": type_ids, "progress": progress, "statistics": statistics}
    variables = {"params": params["encoder"]} | ({"packed": params["packed"]} if "packed" in params else {})
    return apply(variables, ids, segment_ids, position_ids, key, deterministic, **options)


def pack(
    params: Params, dtype: Literal["float32", "bfloat16", "int8"] = "float32", exact_routing: bool = False
) -> dict[str, Any]:
    """`params` for inference on this CPU: a part `packed` has what linear layers, LayerNorms and trees of the encoder compute
    with, which goes from `encoder`. Weights are of type `dtype`, int8 with one factor a column or node; with `exact_routing`
    the trees' input weights stay float32. Heads, leaf trees and experts stay as they are.

    Raises CannotBuild where there are no kernels.
    """

    def narrow(weights: Any) -> Any:
        return _quantize(jnp.asarray(weights)) if dtype == "int8" else jnp.asarray(weights, dtype)

    def without_empty(found: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in found.items() if not isinstance(value, dict) or value}

    def split(name: str, part: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """What stays, and what is packed."""
        if name == "tree":
            w_in = jnp.asarray(part["w_in"]) if exact_routing else narrow(part["w_in"])
            return {}, {"w_in": w_in, "bias": jnp.asarray(part["bias"]), "w_out": narrow(part["w_out"])}
        if "kernel" in part:
            biases = {key: jnp.asarray(value) for key, value in part.items() if key == "bias"}
            return {}, biases | {"kernel": native.pack(np.asarray(part["kernel"]), dtype)}
        if "scale" in part and name not in ("query_norm", "key_norm"):
            return {}, {key: jnp.asarray(value) for key, value in part.items()}
        stays, packed = {}, {}
        if "query" in part:  # one product for the three
            three = [part[inner] for inner in ("query", "key", "value")]
            part = {inner: value for inner, value in part.items() if inner not in ("query", "key", "value")}
            part["qkv"] = {key: np.concatenate([np.asarray(one[key]) for one in three], axis=-1) for key in three[0]}
        for inner, value in part.items():
            if isinstance(value, Mapping):
                stays[inner], packed[inner] = split(inner, value)
            else:
                stays[inner] = jnp.asarray(value)
        return without_empty(stays), without_empty(packed)

    stays, packed = split("encoder", params["encoder"])
    return jax.tree.map(jnp.asarray, {k: v for k, v in params.items() if k != "encoder"}) | {
        "encoder": stays,
        "packed": packed,
    }


_quantize = jax.jit(native.quantize)


def aux_loss(aux: Aux) -> Float[Array, ""]:
    """The sum of the weighted losses that layers reported; a mean per token, zero for dense models."""
    return sum((value for name, value in aux.items() if name.endswith("_loss")), jnp.zeros(()))


def masked_lm_logits(params: Params, config: ModelConfig, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
    """Token logits for hidden states, in float32."""
    apply: Any = MaskedLMHead(config).apply
    return apply({"params": params["masked_lm"]}, hidden, params["encoder"]["embeddings"]["tokens"])


def pool(
    params: Params, config: ModelConfig, hidden: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None = None
) -> Float[Array, "b p"]:
    """BERT's pooler, over what `config.pooling` says."""
    apply: Any = Pooler(config).apply
    return apply({"params": params["pooler"]}, hidden, segment_ids)


def classify(
    params: Params,
    config: ModelConfig,
    hidden: Float[Array, "b t d"],
    segment_ids: Int[Array, "b t"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b c"]:
    """Classifier scores from hidden states, 0 in `segment_ids` marking padding; dropout if `key` is given."""
    n_outputs = params["classifier"]["out"]["bias"].shape[-1]
    apply: Any = ClassifierHead(config, n_outputs).apply
    return apply({"params": params["classifier"]}, hidden, segment_ids, key)


def shapes(config: ModelConfig, heads: tuple[str, ...] = ("masked_lm",), n_outputs: int = 0) -> dict[str, Any]:
    """The parameter tree as shapes and dtypes, computing nothing; with a classifier if `n_outputs` is given."""
    tree = jax.eval_shape(lambda key: init(config, key, heads), jax.random.key(0))
    if n_outputs:
        tree["classifier"] = jax.eval_shape(lambda key: init_classifier(config, key, n_outputs), jax.random.key(0))
    return tree


def count_params(config: ModelConfig, heads: tuple[str, ...] = ("masked_lm",)) -> int:
    """Unique trainable numbers of the encoder and the named heads (a tied decoder counts once)."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(config, heads)))

"""A whole model as functions of a configuration and parameters: initialisation, the encoder, and its heads."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ufbert.config import ModelConfig
from ufbert.nn.encoder import Encoder
from ufbert.nn.heads import ClassifierHead, MaskedLMHead, Pooler
from ufbert.nn.layers import Aux, Linear
from ufbert.nn.ngrams import Rows
from ufbert.nn.registry import FEEDFORWARDS
from ufbert.ops.losses import Sums

Params = Mapping[str, Any]


def init(config: ModelConfig, key: Key[Array, ""], heads: tuple[str, ...] = ("masked_lm",)) -> dict[str, Any]:
    """Draw parameters for the encoder and the named heads (`masked_lm`, `pooler`)."""
    encoder_key, head_key = jax.random.split(key)
    params = _init_outside_layers(replace(config, tree_backend="gather"), encoder_key, head_key, heads)
    # One program for each kind of layer: a single program for all of them took a minute to compile on a GPU.
    for i in range(config.n_layers):
        params["encoder"][f"layer_{i:02d}"] = _init_layer(_of_layer(config, i), jax.random.fold_in(encoder_key, i))
    return params


def _of_layer(config: ModelConfig, i: int) -> ModelConfig:
    """Configure an encoder with one layer, like layer i."""
    mixer, feedforward = config.layers[i]
    # Flax traces a forward pass for the shapes; with gather that needs no kernels.
    return replace(
        config.of_layer(i), n_layers=1, mixer=(mixer,), feedforward=(feedforward,), first_norm=config.first_norm or i > 0,
        tree_backend="gather", unet_skips=False, value_embeddings=0, ngram_layer=0,
    )  # fmt: skip


def _init_encoder(config: ModelConfig, key: Key[Array, ""], has_blocks: bool = True) -> dict[str, Any]:
    return Encoder(config, has_blocks).init(key, jnp.zeros((1, config.only_len or 2), jnp.int32))["params"]


@partial(jax.jit, static_argnames="config")
def _init_layer(config: ModelConfig, key: Key[Array, ""]) -> dict[str, Any]:
    return _init_encoder(replace(config, ngram_rows=0), key)["layer_00"]


@partial(jax.jit, static_argnames=("config", "heads"))
def _init_outside_layers(
    config: ModelConfig, encoder_key: Key[Array, ""], head_key: Key[Array, ""], heads: tuple[str, ...]
) -> dict[str, Any]:
    encoder = _init_encoder(config, encoder_key, has_blocks=False)
    params, hidden = {"encoder": encoder}, jnp.zeros((1, config.d_model))
    if "masked_lm" in heads:
        table = encoder["embeddings"]["tokens"]
        params["masked_lm"] = MaskedLMHead(config).init(head_key, hidden, table).get("params", {})
    if "pooler" in heads:
        params["pooler"] = Pooler(config).init(head_key, hidden)["params"]
    return params


def init_classifier(config: ModelConfig, key: Key[Array, ""], n_outputs: int) -> dict[str, Any]:
    """Draw parameters for a classifier head, which belong into `params["classifier"]`."""
    return ClassifierHead(config, n_outputs).init(key, jnp.zeros((1, config.d_model)))["params"]


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
    causal: bool = False,
    ngrams: Rows | None = None,
    hidden_states: bool = False,
) -> tuple[Float[Array, "b t d"], dict[str, Aux]]:
    """Compute the hidden states of the last layer, and what each layer reports, by its name. Arguments as in `Encoder`."""
    apply: Any = Encoder(config).apply
    options = {"type_ids": type_ids, "progress": progress, "statistics": statistics, "causal": causal, "ngrams": ngrams}
    options["hidden_states"] = hidden_states
    return apply({"params": params["encoder"]}, ids, segment_ids, position_ids, key, deterministic, **options)


def feedforward_inputs(
    params: Params,
    config: ModelConfig,
    ids: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    type_ids: Int[Array, "b t"],
) -> list[Float[Array, "b t d"]]:
    """Compute what each layer's feedforward reads, bottom first."""
    inputs: list[Float[Array, "b t d"]] = []

    def recorded(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and context.module.name in FEEDFORWARDS:
            inputs.append(args[0])
        return call(*args, **kwargs)

    with flax.linen.intercept_methods(recorded):
        encode(params, config, ids, segment_ids, type_ids=type_ids)
    return inputs


def linear_inputs(
    params: Params,
    config: ModelConfig,
    ids: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    type_ids: Int[Array, "b t"],
) -> dict[str, Float[Array, "b t d"]]:
    """Compute the input of every linear layer of the encoder, by the layer's path. Some on a GPU, which joins layers, are left
    out."""
    inputs: dict[str, Array] = {}

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: flax.linen.module.InterceptorContext) -> Any:
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            x = args[0].astype(jnp.float32)
            inputs[".".join(("encoder", *context.module.path))] = x.reshape(*ids.shape, x.shape[-1])
        return call(*args, **kwargs)

    with flax.linen.intercept_methods(watch):
        encode(params, config, ids, segment_ids, type_ids=type_ids)
    return inputs


def aux_loss(aux: Mapping[str, Aux]) -> Float[Array, ""]:
    """Add up the weighted losses that layers reported: a mean per token, zero for dense models."""
    totals: dict[str, Float[Array, ""]] = {}
    for layer in aux.values():
        for name, loss in layer.losses.items():
            totals[name] = totals.get(name, jnp.zeros(())) + loss
    return sum(totals.values(), jnp.zeros(()))


def masked_lm_logits(params: Params, config: ModelConfig, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
    """Compute token logits from hidden states, in float32."""
    apply: Any = MaskedLMHead(config).apply
    return apply({"params": params["masked_lm"]}, hidden, params["encoder"]["embeddings"]["tokens"])


def masked_lm_rows(
    params: Params, config: ModelConfig, hidden: Float[Array, "*rows d"]
) -> tuple[Float[Array, "*rows d"], Float[Array, " v"] | None]:
    """Compute the rows that the decoder of a masked-LM head is multiplied by, and the bias of its logits."""
    apply: Any = MaskedLMHead(config).apply
    rows, _, bias = apply({"params": params["masked_lm"]}, hidden, None, method="transformed")
    return rows, bias


def masked_lm_sums(
    params: Params,
    config: ModelConfig,
    hidden: Float[Array, "*rows d"],
    labels: Int[Array, "*rows"],
    weights: Float[Array, "*rows"],
) -> Sums:
    """Sum the loss of labels under the token logits of hidden states, as `cross_entropy` does."""
    apply: Any = MaskedLMHead(config).apply
    table = params["encoder"]["embeddings"]["tokens"]
    return apply({"params": params["masked_lm"]}, hidden, table, labels, weights, method="sums")


def apply_pooler(params: Params, config: ModelConfig, pooled: Float[Array, "b d"]) -> Float[Array, "b p"]:
    """Apply BERT's (or ModernBERT's) pooler to pooled hidden states (`pool`)."""
    apply: Any = Pooler(config).apply
    return apply({"params": params["pooler"]}, pooled)


def classify(
    params: Params, config: ModelConfig, pooled: Float[Array, "b d"], key: Key[Array, ""] | None = None
) -> Float[Array, "b c"]:
    """Compute classifier scores from pooled hidden states (`pool`), with dropout if `key` is given."""
    n_outputs = params["classifier"]["out"]["bias"].shape[-1]
    apply: Any = ClassifierHead(config, n_outputs).apply
    return apply({"params": params["classifier"]}, pooled, key)


def shapes(config: ModelConfig, heads: tuple[str, ...] = ("masked_lm",), n_outputs: int = 0) -> dict[str, Any]:
    """Return the parameter tree as shapes and dtypes, with a classifier if `n_outputs` is given."""
    tree = jax.eval_shape(lambda key: init(config, key, heads), jax.random.key(0))
    if n_outputs:
        tree["classifier"] = jax.eval_shape(lambda key: init_classifier(config, key, n_outputs), jax.random.key(0))
    return tree


def count_params(config: ModelConfig, heads: tuple[str, ...] = ("masked_lm",)) -> int:
    """Count the parameters of the encoder and the named heads; a tied decoder counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(config, heads)))

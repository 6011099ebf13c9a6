"""The layout of Hugging Face's ModernBERT with every layer global.

`Wqkv` holds queries, keys and values one above the other, `Wi` the activated half above the other; the first layer has no
norm before its attention, for the embeddings are normalised; the decoder is tied.
"""

from typing import Any

from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.hub.bert import activation_name, foreign_activation
from ufbert.hub.layout import Layout, linear, norm, same, stacked_linears

WORDS = "model.embeddings.tok_embeddings.weight"


def model_config(values: dict[str, Any], heads: tuple[str, ...]) -> ModelConfig:
    """The `config.json` of a ModernBERT as our configuration. Raises UserError for what the encoder does not express."""
    fixed = {
        name: values[name]
        for name in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")
        if values.get(name, False)
    }
    if not values.get("decoder_bias", True):
        fixed["decoder_bias"] = False
    local = values.get("layer_types", ["full_attention"])
    if values.get("global_attn_every_n_layers", 1) != 1 or set(local) != {"full_attention"}:
        fixed["local attention in some layers"] = True
    if fixed:
        odd = ", ".join(f"{name}={value!r}" for name, value in fixed.items())
        raise UserError(f"This ModernBERT checkpoint uses what the encoder does not express: {odd}.")
    rope = values.get("rope_parameters") or {}
    base = values.get("global_rope_theta") or rope.get("full_attention", rope).get("rope_theta", 160000.0)
    activation = activation_name(values, "hidden_activation")
    d = values["hidden_size"]
    return ModelConfig(
        vocab_size=values["vocab_size"],
        max_len=values["max_position_embeddings"],
        d_model=d,
        n_layers=values["num_hidden_layers"],
        n_heads=values["num_attention_heads"],
        feedforward=("glu",),
        d_hidden=values["intermediate_size"],
        activation=activation,
        first_norm=False,
        norm_bias=False,
        positions="rotary",
        rotary_base=float(base),
        head_transform=True,
        head_bias=True,
        pooling="mean" if values.get("classifier_pooling") == "mean" else "first",
        pooler="transform",
        pooler_width=d,
        norm_eps=values["norm_eps"],
        init_std=values["initializer_range"],
        dropout=values.get("classifier_dropout", 0.0),
        pad_id=values["pad_token_id"],
    )


def foreign_config(config: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, Any]:
    """A `config.json` of ModernBERT for our configuration; `model_config` reads it back."""
    suffix = (
        "ForSequenceClassification" if "classifier" in heads else "ForMaskedLM" if "masked_lm" in heads else "Model"
    )
    return {
        "architectures": [f"ModernBert{suffix}"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "classifier_activation": foreign_activation(config),
        "classifier_bias": False,
        "classifier_dropout": config.dropout,
        "classifier_pooling": "mean" if config.pooling == "mean" else "cls",
        "decoder_bias": True,
        "embedding_dropout": 0.0,
        "global_attn_every_n_layers": 1,
        "global_rope_theta": config.rotary_base,
        "hidden_activation": foreign_activation(config),
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": config.d_hidden,
        "local_attention": 128,
        "local_rope_theta": config.rotary_base,
        "max_position_embeddings": config.max_len,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
        "norm_eps": config.norm_eps,
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "pad_token_id": config.pad_id,
        "vocab_size": config.vocab_size,
    }


def heads_of(names: set[str]) -> tuple[str, ...]:
    """The heads that a checkpoint of these tensors has."""
    if "classifier.weight" in names:
        return ("classifier",)
    return ("masked_lm",) if "head.dense.weight" in names else ()


def layout(config: ModelConfig, heads: tuple[str, ...]) -> Layout:
    """The tensors of a checkpoint of this configuration."""
    rules = [same(WORDS, "encoder.embeddings.tokens")]
    rules += norm("model.embeddings.norm", "encoder.embeddings.norm", bias=False)
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"encoder.layer_{i:02d}"
        if i > 0:
            rules += norm(f"{theirs}.attn_norm", f"{ours}.mixer_norm", bias=False)
        parts = tuple(f"{ours}.attention.{part}" for part in ("query", "key", "value"))
        rules += [stacked_linears(f"{theirs}.attn.Wqkv.weight", parts)]
        rules += linear(f"{theirs}.attn.Wo", f"{ours}.attention.out", bias=False)
        rules += norm(f"{theirs}.mlp_norm", f"{ours}.feedforward_norm", bias=False)
        rules += [stacked_linears(f"{theirs}.mlp.Wi.weight", (f"{ours}.glu.gate", f"{ours}.glu.value"))]
        rules += linear(f"{theirs}.mlp.Wo", f"{ours}.glu.out", bias=False)
    rules += norm("model.final_norm", "encoder.final_norm", bias=False)
    if "classifier" in heads:
        rules += linear("head.dense", "classifier.pooler.dense", bias=False)
        rules += norm("head.norm", "classifier.pooler.norm", bias=False)
        rules += linear("classifier", "classifier.out", bias=True)
    elif "masked_lm" in heads:
        rules += linear("head.dense", "masked_lm.transform", bias=False)
        rules += norm("head.norm", "masked_lm.norm", bias=False)
        rules += [same("decoder.bias", "masked_lm.bias")]
    return Layout(rules, {"decoder.weight": WORDS} if "masked_lm" in heads else {})

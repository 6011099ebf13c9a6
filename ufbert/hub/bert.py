"""The layout of Hugging Face's BERT and FNet, which share all but the mixer."""

from typing import Any

from ufbert.config import ActivationName, ModelConfig
from ufbert.errors import UserError
from ufbert.hub.layout import Layout, Rule, linear, norm, same

ACTIVATION_NAMES: dict[str, ActivationName] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Their names of nonlinearities."""


def activation_name(values: dict[str, Any], key: str) -> ActivationName:
    """Our name of the nonlinearity under `key` of a foreign config. Raises UserError for one there is not."""
    name = values.get(key, "gelu")
    if name not in ACTIVATION_NAMES:
        raise UserError(f"This checkpoint uses {key}={name!r}, which the encoder does not express.")
    return ACTIVATION_NAMES[name]


def foreign_activation(config: ModelConfig) -> str:
    """Their name of our nonlinearity; one they do not have keeps its own, and is caught by the round trip."""
    return next((theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == config.activation), config.activation)


def model_config(values: dict[str, Any], heads: tuple[str, ...]) -> ModelConfig:
    """The `config.json` of a BERT or FNet as our configuration. Raises UserError for what the encoder does not express."""
    is_fnet = values["model_type"] == "fnet"
    position_kind = values.get("position_embedding_type") or "absolute"
    if position_kind != "absolute":
        raise UserError(f"This checkpoint uses {position_kind} positions, which the encoder does not express for BERT.")
    d, max_len = values["hidden_size"], values["max_position_embeddings"]
    return ModelConfig(
        vocab_size=values["vocab_size"],
        max_len=max_len,
        fixed_len=min(values.get("tpu_short_seq_length") or max_len, max_len) if is_fnet else 0,
        d_model=d,
        n_layers=values["num_hidden_layers"],
        n_heads=1 if is_fnet else values["num_attention_heads"],
        mixer=("fourier",) if is_fnet else ("attention",),
        feedforward=("dense",),
        d_hidden=values["intermediate_size"],
        activation=activation_name(values, "hidden_act"),
        norm="post",
        positions="learned",
        n_token_types=values["type_vocab_size"],
        use_bias=True,
        embedding_projection=is_fnet,
        final_norm=False,
        head_transform=True,
        head_bias=True,
        pooler_width=d,
        norm_eps=values["layer_norm_eps"],
        init_std=values["initializer_range"],
        dropout=values["hidden_dropout_prob"],
        pad_id=values.get("pad_token_id") or 0,
    )


def foreign_config(config: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, Any]:
    """A `config.json` of BERT or FNet for our configuration; `model_config` reads it back."""
    is_fnet = config.only_len > 0
    family, kind = ("FNet", "fnet") if is_fnet else ("Bert", "bert")
    values = {
        "architectures": [family + _class_suffix(heads)],
        "hidden_act": foreign_activation(config),
        "hidden_dropout_prob": config.dropout,
        "hidden_size": config.d_model,
        "initializer_range": config.init_std,
        "intermediate_size": config.d_hidden,
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_len,
        "model_type": kind,
        "num_hidden_layers": config.n_layers,
        "pad_token_id": config.pad_id,
        "type_vocab_size": config.n_token_types,
        "vocab_size": config.vocab_size,
    }
    if is_fnet:
        return values | {"tpu_short_seq_length": config.only_len, "use_tpu_fourier_optimizations": False}
    return values | {
        "attention_probs_dropout_prob": config.dropout,
        "num_attention_heads": config.n_heads,
        "position_embedding_type": "absolute",
    }


def _class_suffix(heads: tuple[str, ...]) -> str:
    if "classifier" in heads:
        return "ForSequenceClassification"
    return "ForMaskedLM" if "masked_lm" in heads else "Model"


def heads_of(names: set[str]) -> tuple[str, ...]:
    """The heads that a checkpoint of these tensors has."""
    if "classifier.weight" in names:
        return ("classifier",)
    heads = ("masked_lm",) if "cls.predictions.bias" in names else ()
    return (*heads, "pooler") if any(name.endswith("pooler.dense.weight") for name in names) else heads


def layout(config: ModelConfig, heads: tuple[str, ...]) -> Layout:
    """The tensors of a checkpoint of this configuration."""
    root = "fnet" if config.only_len else "bert"
    theirs, ours = f"{root}.embeddings", "encoder.embeddings"
    words = f"{theirs}.word_embeddings.weight"
    rules = [same(words, f"{ours}.tokens"), same(f"{theirs}.position_embeddings.weight", f"{ours}.positions")]
    rules += [same(f"{theirs}.token_type_embeddings.weight", f"{ours}.types")]
    rules += norm(f"{theirs}.LayerNorm", f"{ours}.norm")
    if config.embedding_projection:
        rules += linear(f"{theirs}.projection", f"{ours}.projection", bias=True)
    for i in range(config.n_layers):
        rules += _layer(f"{root}.encoder.layer.{i}", f"encoder.layer_{i:02d}", is_fnet=root == "fnet")
    copies: dict[str, str] = {}
    if "masked_lm" in heads:
        rules += linear("cls.predictions.transform.dense", "masked_lm.transform", bias=True)
        rules += norm("cls.predictions.transform.LayerNorm", "masked_lm.norm")
        rules += [same("cls.predictions.bias", "masked_lm.bias")]
        copies = {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": "cls.predictions.bias"}
    if "classifier" in heads:
        rules += linear(f"{root}.pooler.dense", "classifier.pooler.dense", bias=True)
        rules += linear("classifier", "classifier.out", bias=True)
    elif "pooler" in heads:
        rules += linear(f"{root}.pooler.dense", "pooler.dense", bias=True)
    return Layout(rules, copies)


def _layer(theirs: str, ours: str, *, is_fnet: bool) -> list[Rule]:
    if is_fnet:
        rules = norm(f"{theirs}.fourier.output.LayerNorm", f"{ours}.mixer_norm")
    else:
        rules = []
        for part in ("query", "key", "value"):
            rules += linear(f"{theirs}.attention.self.{part}", f"{ours}.attention.{part}", bias=True)
        rules += linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out", bias=True)
        rules += norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer_norm")
    rules += linear(f"{theirs}.intermediate.dense", f"{ours}.dense.in", bias=True)
    rules += linear(f"{theirs}.output.dense", f"{ours}.dense.out", bias=True)
    return rules + norm(f"{theirs}.output.LayerNorm", f"{ours}.feedforward_norm")

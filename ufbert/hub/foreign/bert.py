"""The layout of Hugging Face's BERT and FNet, which share all but the mixer."""

from typing import Any

from ufbert.config import ActivationName, ModelConfig
from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.hub.fields import COMMON_FIXED, COMMON_IGNORED, COMMON_NAMES, COMMON_USED, Fields, class_suffix
from ufbert.hub.layout import Layout, Rule, linear, norm, same

NAMES = COMMON_NAMES | {
    "hidden_dropout_prob": "dropout", "layer_norm_eps": "norm_eps", "type_vocab_size": "n_token_types",
}  # fmt: skip
SHARED: dict[str, Any] = COMMON_USED | {
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_hidden_layers": 12,
}  # fmt: skip
BERT_FIELDS = Fields(
    names=NAMES,
    used=SHARED
    | {"hidden_act": "gelu", "num_attention_heads": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30522},
    fixed=COMMON_FIXED | {"position_embedding_type": ("absolute", None)},
    head_fixed={},
    ignored=COMMON_IGNORED
    | {"attention_probs_dropout_prob", "classifier_dropout"}
    | {  # of google-research/bert, for classes that nothing has used since
        "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
        "pooler_type",
    },
)  # fmt: skip
FNET_FIELDS = Fields(
    names=NAMES,
    used=SHARED
    | {
        "hidden_act": "gelu_new", "pad_token_id": 3, "tpu_short_seq_length": 512, "type_vocab_size": 4, "vocab_size": 32000,
    },
    fixed=COMMON_FIXED,
    head_fixed={},
    ignored=COMMON_IGNORED | {"use_tpu_fourier_optimizations"},  # the same transform by matrices
)  # fmt: skip

READ_CLASSES: dict[str, tuple[str, ...]] = {
    "Model": (), "ForMaskedLM": ("masked_lm",), "ForPreTraining": ("masked_lm",), "ForSequenceClassification": ("classifier",),
}  # fmt: skip
"""Heads of each class that is read, by the end of its name; a pooler besides, where the file has one."""
OTHER_CLASSES = {
    "ForTokenClassification": "which gives every token a label",
    "ForQuestionAnswering": "which marks the answer to a question in a text",
    "ForMultipleChoice": "which chooses among several texts",
    "ForNextSentencePrediction": "which says whether one text follows another",
    "LMHeadModel": "which writes a text from left to right",
}
"""Purposes of the classes that are not read."""
PARTS: dict[str, tuple[str, ...]] = {
    "cls.predictions.": ("masked_lm",), "cls.seq_relationship.": (), "classifier.": ("classifier",), "qa_outputs.": (),
}  # fmt: skip
"""The heads that tensors of such names belong to; in a checkpoint of none of them they are not used."""
SIGNS: dict[str, tuple[str, ...]] = {"classifier": ("classifier.weight",), "masked_lm": ("cls.predictions.",)}


def tied(root: str) -> dict[str, str]:
    """List the copies of tensors in a checkpoint whose encoder's names begin with `root`, and what they repeat."""
    return {
        "cls.predictions.decoder.weight": f"{root}embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


ACTIVATION_NAMES: dict[str, ActivationName] = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
"""Their names of nonlinearities."""


def activation_name(values: dict[str, Any], key: str) -> ActivationName:
    """Find our name of the nonlinearity under `key` of a foreign config. Raises UserError for one there is not."""
    name = values[key]
    if name not in ACTIVATION_NAMES:
        raise UserError(f"This checkpoint uses {key}={shown(name)}, which the encoder does not express.")
    return ACTIVATION_NAMES[name]


def foreign_activation(config: ModelConfig) -> str:
    """Find their name of our nonlinearity; one they do not have keeps its own, and is caught by the round trip."""
    return next((theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == config.activation), config.activation)


def model_config(values: dict[str, Any], heads: tuple[str, ...]) -> ModelConfig:
    """Make our configuration of a BERT's or FNet's used fields. Raises UserError for one that the encoder does not express."""
    is_fnet, max_len = "tpu_short_seq_length" in values, values["max_position_embeddings"]
    return ModelConfig(
        **BERT_FIELDS.ours(values),
        fixed_len=min(values["tpu_short_seq_length"] or max_len, max_len) if is_fnet else 0,
        n_heads=1 if is_fnet else values["num_attention_heads"],
        mixer=("fourier",) if is_fnet else ("attention",),
        feedforward=("dense",),
        activation=activation_name(values, "hidden_act"),
        norm="post",
        positions="learned",
        use_bias=True,
        embedding_projection=is_fnet,
        final_norm=False,
        head_transform=True,
        head_bias=True,
        pooler_width=values["hidden_size"],
    )


def foreign_config(config: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, Any]:
    """Write our configuration as BERT's or FNet's `config.json`; `model_config` reads it back."""
    is_fnet = config.only_len > 0
    family, kind = ("FNet", "fnet") if is_fnet else ("Bert", "bert")
    values = BERT_FIELDS.theirs(config) | {
        "architectures": [family + class_suffix(READ_CLASSES, heads)],
        "hidden_act": foreign_activation(config),
        "model_type": kind,
    }
    if is_fnet:
        return values | {"tpu_short_seq_length": config.only_len, "use_tpu_fourier_optimizations": False}
    return values | {
        "attention_probs_dropout_prob": config.dropout,
        "num_attention_heads": config.n_heads,
        "position_embedding_type": "absolute",
    }


def layout(config: ModelConfig, heads: tuple[str, ...]) -> Layout:
    """Lay out the tensors of a checkpoint of this configuration."""
    root = "fnet" if config.only_len else "bert"
    theirs, ours = f"{root}.embeddings", "encoder.embeddings"
    rules = [same(f"{theirs}.word_embeddings.weight", f"{ours}.tokens")]
    rules += [same(f"{theirs}.position_embeddings.weight", f"{ours}.positions")]
    rules += [same(f"{theirs}.token_type_embeddings.weight", f"{ours}.types")]
    rules += norm(f"{theirs}.LayerNorm", f"{ours}.norm")
    if config.embedding_projection:
        rules += linear(f"{theirs}.projection", f"{ours}.projection", bias=True)
    for i in range(config.n_layers):
        rules += _layer(f"{root}.encoder.layer.{i}", f"encoder.layer_{i:02d}", is_fnet=root == "fnet")
    if "masked_lm" in heads:
        rules += linear("cls.predictions.transform.dense", "masked_lm.transform", bias=True)
        rules += norm("cls.predictions.transform.LayerNorm", "masked_lm.norm")
        rules += [same("cls.predictions.bias", "masked_lm.bias")]
    if "classifier" in heads:
        rules += linear(f"{root}.pooler.dense", "classifier.pooler.dense", bias=True)
        rules += linear("classifier", "classifier.out", bias=True)
    elif "pooler" in heads:
        rules += linear(f"{root}.pooler.dense", "pooler.dense", bias=True)
    return Layout(rules, tied(f"{root}."))


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

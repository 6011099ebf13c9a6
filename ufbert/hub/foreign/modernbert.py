"""The layout of Hugging Face's ModernBERT with every layer global.

`Wqkv` holds queries, keys and values one above the other, `Wi` the activated half above the other; the first layer has no
norm before its attention, for the embeddings are normalised; the decoder is tied.
"""

from typing import Any

from ufbert.config import ModelConfig
from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.hub.fields import COMMON_FIXED, COMMON_IGNORED, COMMON_NAMES, COMMON_USED, Fields, class_suffix
from ufbert.hub.foreign.bert import READ_CLASSES, activation_name, foreign_activation
from ufbert.hub.layout import Layout, linear, norm, same, stacked_linears

WORDS = "model.embeddings.tok_embeddings.weight"
TIED = {"decoder.weight": WORDS}
FIELDS = Fields(
    names=COMMON_NAMES | {"classifier_dropout": "dropout", "norm_eps": "norm_eps", "num_attention_heads": "n_heads"},
    used=COMMON_USED
    | {
        "classifier_activation": "gelu", "classifier_dropout": 0.0, "classifier_pooling": "cls",
        "global_attn_every_n_layers": 3, "global_rope_theta": None, "hidden_activation": "gelu", "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 1152, "layer_types": None, "max_position_embeddings": 8192,
        "norm_eps": 1e-5, "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283,
        "rope_parameters": None, "rope_theta": None, "vocab_size": 50368,
    },
    fixed=COMMON_FIXED
    | {"attention_bias": (False,), "mlp_bias": (False,), "norm_bias": (False,), "rope_scaling": (None,)},
    head_fixed={
        "masked_lm": {"classifier_bias": (False,), "decoder_bias": (True,)}, "classifier": {"classifier_bias": (False,)},
    },
    ignored=COMMON_IGNORED
    | {
        "attention_dropout", "deterministic_flash_attn", "embedding_dropout", "initializer_cutoff_factor", "mlp_dropout",
        "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction",
    }
    | {"local_attention", "local_rope_theta"},  # of layers that are refused
)  # fmt: skip
PARTS: dict[str, tuple[str, ...]] = {
    "head.": ("masked_lm", "classifier"), "decoder.": ("masked_lm",), "classifier.": ("classifier",), "qa_outputs.": (),
}  # fmt: skip
"""The heads that tensors of such names belong to; in a checkpoint of none of them they are not used."""
SIGNS = {"classifier": ("classifier.weight",), "masked_lm": ("head.dense.weight", "decoder.bias")}


def model_config(values: dict[str, Any], heads: tuple[str, ...]) -> ModelConfig:
    """Make our configuration of a ModernBERT's used fields. Raises UserError for one that the encoder does not express."""
    activation, odd = activation_name(values, "hidden_activation"), []
    if not _all_global(values):
        odd.append("local attention in some layers (layer_types, global_attn_every_n_layers)")
    if heads and activation_name(values, "classifier_activation") != activation:
        odd.append(f"classifier_activation={shown(values['classifier_activation'])}, unlike hidden_activation")
    if "classifier" in heads and values["classifier_pooling"] not in ("cls", "mean"):
        odd.append(f"classifier_pooling={shown(values['classifier_pooling'])}")
    if odd:
        raise UserError(f"This ModernBERT checkpoint uses what the encoder does not express: {', '.join(odd)}.")
    return ModelConfig(
        **FIELDS.ours(values),
        feedforward=("glu",),
        activation=activation,
        first_norm=False,
        norm_bias=False,
        positions="rotary",
        rotary_base=_rotary_base(values),
        head_transform=True,
        head_bias=True,
        pooling="mean" if values["classifier_pooling"] == "mean" else "first",
        pooler="transform",
        pooler_width=values["hidden_size"],
    )


def _all_global(values: dict[str, Any]) -> bool:
    """True if every token sees every token in every layer: by `layer_types`, or else by every n-th layer."""
    layers, types = values["num_hidden_layers"], values["layer_types"]
    if types is None:
        return values["global_attn_every_n_layers"] == 1 or layers == 1
    return isinstance(types, list) and len(types) == layers and set(map(str, types)) == {"full_attention"}


def _rotary_base(values: dict[str, Any]) -> float:
    """Read the base of the rotary wavelengths in global layers: of `rope_parameters` (transformers 5), or `global_rope_theta`
    or its other name `rope_theta` (4). Raises UserError for scaled positions, and if two of them disagree."""
    rope = values["rope_parameters"]
    rope = {} if rope is None else rope
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else rope
    if not isinstance(rope, dict) or not isinstance(rope.get("sliding_attention", {}), dict):
        raise UserError(f"This ModernBERT says rope_parameters={shown(rope)}, where an object belongs; mend it.")
    odd = [
        f"rope_parameters.{name}={value!r}"
        for name, value in rope.items()
        if name not in ("rope_theta", "sliding_attention")
        and (name, value) not in (("rope_type", "default"), ("type", "default"))
    ]
    if odd:
        raise UserError(f"This ModernBERT checkpoint uses what the encoder does not express: {', '.join(odd)}.")
    given = {"rope_parameters.rope_theta": rope.get("rope_theta")}
    given |= {name: values[name] for name in ("global_rope_theta", "rope_theta")}
    bases = {name: base for name, base in given.items() if base is not None}
    for name, base in bases.items():
        if type(base) not in (int, float) or not 0 < base < 1e30:
            raise UserError(f"This ModernBERT says {name}={shown(base)}, where a positive number belongs; mend it.")
    if len(set(bases.values())) > 1:
        both = ", ".join(f"{name}={base!r}" for name, base in bases.items())
        raise UserError(f"This ModernBERT's config.json contradicts itself: {both}; take out the wrong one.")
    return float(next(iter(bases.values()), 160000.0))


def foreign_config(config: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, Any]:
    """Write our configuration as ModernBERT's `config.json`; `model_config` reads it back."""
    return FIELDS.theirs(config) | {
        "architectures": [f"ModernBert{class_suffix(READ_CLASSES, heads)}"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "classifier_activation": foreign_activation(config),
        "classifier_bias": False,
        "classifier_pooling": "mean" if config.pooling == "mean" else "cls",
        "decoder_bias": True,
        "embedding_dropout": 0.0,
        "global_attn_every_n_layers": 1,
        "global_rope_theta": config.rotary_base,
        "hidden_activation": foreign_activation(config),
        "local_attention": 128,
        "local_rope_theta": config.rotary_base,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
    }


def layout(config: ModelConfig, heads: tuple[str, ...]) -> Layout:
    """Lay out the tensors of a checkpoint of this configuration."""
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
    return Layout(rules, TIED)

"""The layout of the crammedBERT and UltraFastBERT checkpoints.

`encoder.layers.{i}.attn.self_attention.query_key_value.weight` holds rows grouped per head as (head, {q, k, v}, head
width); a tree layer's `linear_in` is (trees * nodes, d) and `linear_out` (d, trees * nodes), tree-major; the decoder
repeats the word embedding; `norm_factor` is 1/sqrt(head width) and carries no information; a GLU's `dense_in` holds the
value half above the gate half.
"""

from typing import Any

import numpy as np

from ufbert.config import ActivationName, ModelConfig
from ufbert.config.checks import shown
from ufbert.errors import UserError
from ufbert.hub.fields import COMMON_FIXED, COMMON_IGNORED, COMMON_USED, Fields, class_suffix
from ufbert.hub.folder import unflatten
from ufbert.hub.layout import Layout, Rule, linear, norm, reshaped, same, stacked_linears
from ufbert.hub.tensors import first_few

WORDS = "encoder.embedding.word_embedding.weight"
TIED = {"decoder.weight": WORDS}
FIELDS = Fields(
    names={
        "arch.attention.num_attention_heads": "n_heads", "arch.classification_head.head_dim": "pooler_width",
        "arch.embedding.max_seq_length": "max_len", "arch.embedding.normalization": "embedding_norm",
        "arch.embedding.pad_token_id": "pad_id", "arch.embedding.vocab_size": "vocab_size",
        "arch.final_norm": "final_norm", "arch.hidden_dropout_prob": "dropout", "arch.hidden_size": "d_model",
        "arch.init.std": "init_std", "arch.norm_eps": "norm_eps", "arch.num_transformer_layers": "n_layers",
    },
    used=COMMON_USED
    | {
        "arch.attention.num_attention_heads": 12, "arch.classification_head.head_dim": 1024,
        "arch.embedding.embedding_dim": 0, "arch.embedding.max_seq_length": 128,
        "arch.embedding.normalization": False, "arch.embedding.pad_token_id": 0,
        "arch.embedding.vocab_size": 32768, "arch.final_norm": False, "arch.hidden_dropout_prob": 0.1,
        "arch.hidden_size": 768, "arch.init.std": 0.02, "arch.intermed_depth": 0, "arch.intermed_size": 3072,
        "arch.intermed_type": "ff", "arch.nonlin": "GELU", "arch.norm_eps": 1e-12,
        "arch.num_transformer_layers": 16,
    },
    fixed={name: same for name, same in COMMON_FIXED.items() if name != "auto_map"}  # this class is in no library
    | {
        "arch.architectures": (["ScriptableCrammedBERT"], None), "arch.attention.causal_attention": (False, None),
        "arch.attention.qkv_bias": (False, None), "arch.attention.rotary_embedding": (False, None),
        "arch.attention.sequence_op": ("torch-softmax",), "arch.attention.skip_output_projection": (False, None),
        "arch.attention.type": ("self-attention",), "arch.deepnorm_scaling": (False, None),
        "arch.embedding.pos_embedding": ("scaled-sinusoidal",), "arch.ffn_layer_frequency": (1, None),
        "arch.layer_macro_type": ("transformer", None), "arch.maximal_recurrence": (None,), "arch.norm": ("LayerNorm",),
        "arch.norm_scheme": ("pre", None), "arch.recurrent_layers": (None,), "arch.setup": (None,),
        "arch.use_bias": (False, None),
    },
    head_fixed={
        "masked_lm": {
            "arch.decoder_bias": (False, None), "arch.objective_layout": ("MLM", None),
            "arch.skip_head_transform": (True,), "arch.tie_weights": (True, None),
        },
        "classifier": {
            "arch.classification_head.include_ff_layer": (True,), "arch.classification_head.nonlin": ("Tanh",),
            "arch.classification_head.pooler": ("zero_index",),  # an average here counts padding, too
        },
    },
    ignored=COMMON_IGNORED
    | {
        "auto_map",
        "arch.attention.dropout_prob", "arch.attention.high_level_fusion", "arch.attention.hybrid_layers",
        "arch.attention.low_level_fusion", "arch.attention.seq_op_in_fp32",
        "arch.classification_head.classifier_dropout", "arch.embedding.dropout_prob",
        "arch.embedding.stable_low_precision", "arch.gradient_checkpointing", "arch.init.type",
        "arch.layer_drop_theta", "arch.layer_fusion", "arch.loss", "arch.num_labels", "arch.sparse_prediction",
        "arch.training_scheme", "arch.z_loss_factor",
    },
)  # fmt: skip
"""Settings lie under `arch`, and are named by their path."""
REQUIRED = (
    "arch.attention.num_attention_heads", "arch.embedding.max_seq_length", "arch.embedding.vocab_size",
    "arch.hidden_size", "arch.intermed_size", "arch.nonlin", "arch.norm_eps", "arch.num_transformer_layers",
)  # fmt: skip
READ_CLASSES: dict[str, tuple[str, ...]] = {
    "": (), "ForPreTraining": ("masked_lm",), "ForSequenceClassification": ("classifier",),
}  # fmt: skip
OTHER_CLASSES = {
    "ForTokenClassification": "which gives every token a label",
    "ForSCRIPTTraining": "which learns to tell replaced tokens",
}
PARTS: dict[str, tuple[str, ...]] = {
    "decoder.": ("masked_lm",), "prediction_head.": ("masked_lm",), "pooler.": ("classifier",), "head.": ("classifier",),
}  # fmt: skip
"""The heads that tensors of such names belong to; in a checkpoint of none of them they are not used."""
SIGNS = {"classifier": ("head.weight",), "masked_lm": ("",)}  # the masked-LM head may be the tied embedding alone
NONLINEARITIES: dict[str, ActivationName] = {"GELU": "gelu", "ReLU": "relu"}


def by_path(values: dict[str, Any]) -> dict[str, Any]:
    """Name the settings under `arch` of a `config.json` by their path (`arch.attention.type`).

    One that must stand at one value and is absent is None, as for its class. Raises UserError if there is no `arch`, or if it
    lacks what the class cannot do without.
    """
    arch = values.get("arch")
    if not isinstance(arch, dict):
        raise UserError(f"This crammedBERT's config.json says arch={shown(arch)}, where an object of settings belongs.")
    flat = {name: value for name, value in values.items() if name != "arch"}
    flat |= dict.fromkeys((name for name in FIELDS.all_fixed(FIELDS.head_fixed) if name.startswith("arch.")), None)
    for name, value in arch.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"arch.{name}.{last}".removesuffix("."): x for last, x in inner}
    lacking = [name for name in REQUIRED if flat.get(name) is None]
    if lacking:
        raise UserError(f"This crammedBERT's config.json lacks {first_few(lacking)}; name another with --config.")
    return flat


def model_config(values: dict[str, Any], heads: tuple[str, ...]) -> ModelConfig:
    """Make our configuration of a crammedBERT's used fields. Raises UserError for one that the encoder does not express."""
    kind, nonlinearity = values["arch.intermed_type"], values["arch.nonlin"]
    is_tree, is_glu = kind == "fff", nonlinearity.endswith("glu")
    activation = NONLINEARITIES.get(nonlinearity.removesuffix("glu"))
    odd = []
    if kind not in ("ff", "fff"):
        odd.append(f"arch.intermed_type={shown(kind)}")
    if activation is None or (is_tree and is_glu):
        odd.append(f"arch.nonlin={shown(nonlinearity)}")
    if values["arch.embedding.embedding_dim"] not in (0, values["arch.hidden_size"]):
        odd.append(f"arch.embedding.embedding_dim={values['arch.embedding.embedding_dim']!r}, unlike hidden_size")
    if odd or activation is None:
        raise UserError(f"This crammedBERT checkpoint uses what the encoder does not express: {', '.join(odd)}.")
    return ModelConfig(
        **FIELDS.ours(values),
        feedforward=("tree",) if is_tree else ("glu",) if is_glu else ("dense",),
        d_hidden=max(1, values["arch.intermed_size"] // (2 if is_glu else 1)),
        activation="gelu" if is_tree else activation,
        n_trees=values["arch.intermed_size"] if is_tree else 1,
        tree_depth=values["arch.intermed_depth"] if is_tree else 0,
        tree_activation=activation if is_tree else "gelu",
    )


def foreign_config(config: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, Any]:
    """Write our configuration as a crammedBERT's `config.json`; `model_config` reads it back."""
    kind = config.layers[0][1]
    activation = config.tree_activation if kind == "tree" else config.activation
    nonlinearity = next((theirs for theirs, ours in NONLINEARITIES.items() if ours == activation), "GELU")
    fixed = {name: same[0] for name, same in FIELDS.all_fixed(FIELDS.head_fixed).items() if name.startswith("arch.")}
    flat = {name: value for name, value in fixed.items() if value is not None}
    flat |= FIELDS.theirs(config) | {
        "arch.attention.dropout_prob": config.dropout,
        "arch.attention.seq_op_in_fp32": False,
        "arch.classification_head.classifier_dropout": config.dropout,
        "arch.embedding.dropout_prob": config.dropout,
        "arch.embedding.embedding_dim": config.d_model,
        "arch.embedding.stable_low_precision": False,
        "arch.init.type": "normal",
        "arch.intermed_depth": config.tree_depth if kind == "tree" else 0,
        "arch.intermed_size": config.n_trees if kind == "tree" else config.d_hidden * (2 if kind == "glu" else 1),
        "arch.intermed_type": "fff" if kind == "tree" else "ff",
        "arch.loss": "cross-entropy",
        "arch.nonlin": nonlinearity + ("glu" if kind == "glu" else ""),
        "arch.num_labels": n_outputs or None,
        "arch.sparse_prediction": 0.25,
        "architectures": ["ScriptableLM" + class_suffix(READ_CLASSES, heads)],
        "model_type": "crammedBERT",
    }
    return unflatten(flat)


def layout(config: ModelConfig, heads: tuple[str, ...]) -> Layout:
    """Lay out the tensors of a checkpoint of this configuration."""
    d = config.d_model
    rules = [same(WORDS, "encoder.embeddings.tokens")]
    rules += [same("encoder.embedding.pos_embedding.scale_factor", "encoder.embeddings.position_scale")]
    if config.embedding_norm:
        rules += norm("encoder.embedding.norm", "encoder.embeddings.norm")
    constants: dict[str, np.ndarray] = {}
    for i, (_, feedforward) in enumerate(config.layers):
        theirs, ours = f"encoder.layers.{i}", f"encoder.layer_{i:02d}"
        rules += norm(f"{theirs}.norm1", f"{ours}.mixer_norm") + norm(f"{theirs}.norm2", f"{ours}.feedforward_norm")
        rules += [_grouped_qkv(f"{theirs}.attn.self_attention.query_key_value.weight", f"{ours}.attention", config)]
        rules += linear(f"{theirs}.attn.dense", f"{ours}.attention.out", bias=False)
        constants[f"{theirs}.attn.self_attention.norm_factor"] = np.array((d // config.n_heads) ** -0.5, np.float32)
        if feedforward == "tree":
            rules += _tree(f"{theirs}.ffn", f"{ours}.tree", config)
        elif feedforward == "glu":
            rules += [stacked_linears(f"{theirs}.ffn.dense_in.weight", (f"{ours}.glu.value", f"{ours}.glu.gate"))]
            rules += linear(f"{theirs}.ffn.dense_out", f"{ours}.glu.out", bias=False)
        else:
            rules += linear(f"{theirs}.ffn.dense_in", f"{ours}.dense.in", bias=False)
            rules += linear(f"{theirs}.ffn.dense_out", f"{ours}.dense.out", bias=False)
    if config.final_norm:
        rules += norm("encoder.final_norm", "encoder.final_norm")
    if "classifier" in heads:
        rules += linear("pooler.dense", "classifier.pooler.dense", bias=True)
        rules += linear("head", "classifier.out", bias=True)
    return Layout(rules, TIED, constants, writes_copies="masked_lm" in heads)


def _grouped_qkv(name: str, path: str, config: ModelConfig) -> Rule:
    d, h = config.d_model, config.n_heads

    def split(a: np.ndarray) -> tuple[np.ndarray, ...]:
        grouped = a.reshape(h, 3, d // h, d)
        return tuple(grouped[:, part].reshape(d, d).T for part in range(3))

    def join(*kernels: np.ndarray) -> np.ndarray:
        return np.stack([kernel.T.reshape(h, d // h, d) for kernel in kernels], axis=1).reshape(3 * d, d)

    return Rule(name, tuple(f"{path}.{part}.kernel" for part in ("query", "key", "value")), split, join)


def _tree(theirs: str, ours: str, config: ModelConfig) -> list[Rule]:
    m, n, d = config.n_trees, config.nodes_per_tree, config.d_model
    return [
        reshaped(f"{theirs}.linear_in.weight", f"{ours}.w_in", (m * n, d), (m, n, d)),
        reshaped(f"{theirs}.linear_in.bias", f"{ours}.bias", (m * n,), (m, n)),
        Rule(
            f"{theirs}.linear_out.weight",
            (f"{ours}.w_out",),
            lambda a: (a.T.reshape(m, n, d),),
            lambda a: a.reshape(m * n, d).T,
        ),
    ]

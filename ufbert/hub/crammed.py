"""The layout of the crammedBERT and UltraFastBERT checkpoints.

`encoder.layers.{i}.attn.self_attention.query_key_value.weight` holds rows grouped per head as (head, {q, k, v}, head
width); a tree layer's `linear_in` is (trees * nodes, d) and `linear_out` (d, trees * nodes), tree-major; the decoder
repeats the word embedding; `norm_factor` is 1/sqrt(head width) and carries no information; a GLU's `dense_in` holds the
value half above the gate half.
"""

from typing import Any

import numpy as np

from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.hub.layout import Layout, Rule, linear, norm, reshaped, same, stacked_linears

WORDS = "encoder.embedding.word_embedding.weight"


def model_config(values: dict[str, Any], heads: tuple[str, ...]) -> ModelConfig:
    """The `config.json` of such a checkpoint, which has these heads, as our configuration.

    Raises UserError for an architecture this package does not express.
    """
    arch = values["arch"]
    embedding, attention = arch["embedding"], arch["attention"]
    fixed = {
        "norm_scheme": (arch["norm_scheme"], "pre"),
        "norm": (arch["norm"], "LayerNorm"),
        "pos_embedding": (embedding["pos_embedding"], "scaled-sinusoidal"),
        "rotary_embedding": (attention["rotary_embedding"], False),
        "qkv_bias": (attention["qkv_bias"], arch["use_bias"]),
        "use_bias": (arch["use_bias"], False),
        "decoder_bias": (arch["decoder_bias"], False),
        "skip_head_transform": (arch["skip_head_transform"], True),
        "tie_weights": (arch["tie_weights"], True),
    }
    odd = [f"{name}={have!r}" for name, (have, want) in fixed.items() if have != want]
    is_tree, is_glu = arch["intermed_type"] == "fff", arch["nonlin"] == "GELUglu"
    if not is_tree and arch["nonlin"] not in ("GELU", "GELUglu"):
        odd.append(f"nonlin={arch['nonlin']!r}")
    pooler = arch["classification_head"]["pooler"]
    if "classifier" in heads and pooler != "zero_index":  # its average counts padding too
        odd.append(f"pooler={pooler!r}")
    if odd:
        raise UserError(f"This crammedBERT checkpoint uses what the encoder does not express: {', '.join(odd)}.")
    return ModelConfig(
        vocab_size=embedding["vocab_size"],
        max_len=embedding["max_seq_length"],
        d_model=arch["hidden_size"],
        n_layers=arch["num_transformer_layers"],
        n_heads=attention["num_attention_heads"],
        feedforward=("tree",) if is_tree else ("glu",) if is_glu else ("dense",),
        d_hidden=max(1, arch["intermed_size"] // (2 if is_glu else 1)),
        n_trees=arch["intermed_size"] if is_tree else 1,
        tree_depth=arch["intermed_depth"] if is_tree else 0,
        embedding_norm=embedding["normalization"],
        final_norm=arch["final_norm"],
        pooler_width=arch["classification_head"]["head_dim"],
        norm_eps=arch["norm_eps"],
        init_std=arch["init"]["std"],
        dropout=arch["hidden_dropout_prob"],
        pad_id=embedding["pad_token_id"],
    )


def foreign_config(config: ModelConfig, heads: tuple[str, ...], n_outputs: int) -> dict[str, Any]:
    """A `config.json` of that layout for our configuration; `model_config` reads it back."""
    kind = config.layers[0][1]
    arch = {
        "architectures": ["ScriptableCrammedBERT"],
        "attention": {
            "causal_attention": False,
            "dropout_prob": config.dropout,
            "num_attention_heads": config.n_heads,
            "qkv_bias": False,
            "rotary_embedding": False,
            "seq_op_in_fp32": False,
            "sequence_op": "torch-softmax",
            "skip_output_projection": False,
            "type": "self-attention",
        },
        "classification_head": {
            "classifier_dropout": config.dropout,
            "head_dim": config.pooler_width,
            "include_ff_layer": True,
            "nonlin": "Tanh",
            "pooler": "zero_index",
        },
        "decoder_bias": False,
        "embedding": {
            "dropout_prob": config.dropout,
            "embedding_dim": config.d_model,
            "max_seq_length": config.max_len,
            "normalization": config.embedding_norm,
            "pad_token_id": config.pad_id,
            "pos_embedding": "scaled-sinusoidal",
            "stable_low_precision": False,
            "vocab_size": config.vocab_size,
        },
        "ffn_layer_frequency": 1,
        "final_norm": config.final_norm,
        "hidden_dropout_prob": config.dropout,
        "hidden_size": config.d_model,
        "init": {"std": config.init_std, "type": "normal"},
        "intermed_depth": config.tree_depth if kind == "tree" else 0,
        "intermed_size": config.n_trees if kind == "tree" else config.d_hidden * (2 if kind == "glu" else 1),
        "intermed_type": "fff" if kind == "tree" else "ff",
        "loss": "cross-entropy",
        "nonlin": "GELUglu" if kind == "glu" else "GELU",
        "norm": "LayerNorm",
        "norm_eps": config.norm_eps,
        "norm_scheme": "pre",
        "num_labels": n_outputs or None,
        "num_transformer_layers": config.n_layers,
        "objective_layout": "MLM" if "masked_lm" in heads else "",
        "skip_head_transform": True,
        "sparse_prediction": 0.25,
        "tie_weights": True,
        "use_bias": False,
    }
    return {"arch": arch, "model_type": "crammedBERT"}


def heads_of(names: set[str]) -> tuple[str, ...]:
    """The heads that a checkpoint of these tensors has."""
    return ("classifier",) if "head.weight" in names else ("masked_lm",)


def layout(config: ModelConfig, heads: tuple[str, ...]) -> Layout:
    """The tensors of a checkpoint of this configuration."""
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
        rules += linear("pooler.dense", "classifier.pooler.dense", bias=True) + linear(
            "head", "classifier.out", bias=True
        )
    copies = {"decoder.weight": WORDS} if "masked_lm" in heads else {}
    return Layout(rules, copies, constants, writes_copies=True)


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

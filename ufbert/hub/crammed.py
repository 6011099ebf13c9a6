"""Weights in the layout of the crammedBERT and UltraFastBERT checkpoints, to and from our parameter tree.

The layout: `encoder.layers.{i}.attn.self_attention.query_key_value.weight` holds rows grouped per head as
(head, {q, k, v}, head width); torch linears are (out, in); a tree layer's `linear_in` is (trees * nodes, d) and
`linear_out` (d, trees * nodes), tree-major; the decoder repeats the word embedding; `norm_factor` is 1/sqrt(head width)
and carries no information; a GLU's `dense_in` holds the value half above the gate half.
"""

from typing import Any

import numpy as np

from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.hub.folder import check_tensors

Tensors = dict[str, np.ndarray]


def model_config(arch: dict[str, Any]) -> ModelConfig:
    """The `arch` section of such a checkpoint's `config.json` as our configuration.

    Raises UserError for an architecture this package does not express.
    """
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
    if odd:
        raise UserError(f"This crammedBERT checkpoint uses what the encoder does not express: {', '.join(odd)}.")
    is_tree, is_glu = arch["intermed_type"] == "fff", arch["nonlin"] == "GELUglu"
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
    )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration holds."""
    d, shapes = config.d_model, {}
    shapes["encoder.embedding.word_embedding.weight"] = (config.vocab_size, d)
    shapes["encoder.embedding.pos_embedding.scale_factor"] = (1,)
    norms = ["encoder.embedding.norm"] if config.embedding_norm else []
    for i, (_, feedforward) in enumerate(config.layers):
        layer = f"encoder.layers.{i}"
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
        shapes[f"{layer}.attn.self_attention.norm_factor"] = ()
        shapes[f"{layer}.attn.self_attention.query_key_value.weight"] = (3 * d, d)
        shapes[f"{layer}.attn.dense.weight"] = (d, d)
        if feedforward == "tree":
            nodes = config.n_trees * config.nodes_per_tree
            shapes[f"{layer}.ffn.linear_in.weight"] = (nodes, d)
            shapes[f"{layer}.ffn.linear_in.bias"] = (nodes,)
            shapes[f"{layer}.ffn.linear_out.weight"] = (d, nodes)
        else:
            shapes[f"{layer}.ffn.dense_in.weight"] = (config.d_hidden * (2 if feedforward == "glu" else 1), d)
            shapes[f"{layer}.ffn.dense_out.weight"] = (d, config.d_hidden)
    for name in norms + (["encoder.final_norm"] if config.final_norm else []):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (d,)
    shapes["decoder.weight"] = (config.vocab_size, d)
    return shapes


def to_params(tensors: Tensors, config: ModelConfig, *, gradients: bool = False) -> dict[str, Any]:
    """The parameter tree of a checkpoint's tensors.

    With `gradients`, the tensors are gradients by parameter name, where the tied decoder and the fixed `norm_factor`
    have no entry. Raises UserError naming each missing, unexpected or misshapen tensor.
    """
    expected = expected_shapes(config)
    if gradients:
        expected = {k: v for k, v in expected.items() if not k.endswith("norm_factor") and k != "decoder.weight"}
    elif "decoder.weight" not in tensors and "encoder.embedding.word_embedding.weight" in tensors:
        tensors = {**tensors, "decoder.weight": tensors["encoder.embedding.word_embedding.weight"]}
    check_tensors({name: tuple(array.shape) for name, array in tensors.items()}, expected, "The checkpoint")
    words = tensors["encoder.embedding.word_embedding.weight"]
    if not gradients and not np.array_equal(words, tensors["decoder.weight"]):
        raise UserError("The checkpoint's decoder is not tied to its word embedding.")
    embeddings = {"tokens": words, "position_scale": tensors["encoder.embedding.pos_embedding.scale_factor"]}
    if config.embedding_norm:
        embeddings["norm"] = _norm(tensors, "encoder.embedding.norm")
    encoder: dict[str, Any] = {"embeddings": embeddings}
    for i in range(config.n_layers):
        encoder[f"layer_{i:02d}"] = _layer(tensors, config, i)
    if config.final_norm:
        encoder["final_norm"] = _norm(tensors, "encoder.final_norm")
    return {"encoder": encoder, "masked_lm": {}}


def _norm(tensors: Tensors, name: str) -> dict[str, np.ndarray]:
    return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}


def _layer(tensors: Tensors, config: ModelConfig, i: int) -> dict[str, Any]:
    name, (mixer, feedforward) = f"encoder.layers.{i}", config.layers[i]
    d, heads = config.d_model, config.n_heads
    qkv = tensors[f"{name}.attn.self_attention.query_key_value.weight"].reshape(heads, 3, d // heads, d)
    attention = {
        part: {"kernel": qkv[:, index].reshape(d, d).T} for index, part in enumerate(("query", "key", "value"))
    }
    attention["out"] = {"kernel": tensors[f"{name}.attn.dense.weight"].T}
    if feedforward == "tree":
        shape = (config.n_trees, config.nodes_per_tree, d)
        feed: dict[str, Any] = {
            "w_in": tensors[f"{name}.ffn.linear_in.weight"].reshape(shape),
            "bias": tensors[f"{name}.ffn.linear_in.bias"].reshape(shape[:2]),
            "w_out": tensors[f"{name}.ffn.linear_out.weight"].T.reshape(shape),
        }
    else:
        dense_in, out = tensors[f"{name}.ffn.dense_in.weight"], tensors[f"{name}.ffn.dense_out.weight"]
        feed = {"out": {"kernel": out.T}}
        if feedforward == "glu":
            feed["value"] = {"kernel": dense_in[: config.d_hidden].T}
            feed["gate"] = {"kernel": dense_in[config.d_hidden :].T}
        else:
            feed["in"] = {"kernel": dense_in.T}
    return {
        "mixer_norm": _norm(tensors, f"{name}.norm1"),
        mixer: attention,
        "feedforward_norm": _norm(tensors, f"{name}.norm2"),
        feedforward: feed,
    }

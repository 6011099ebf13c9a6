"""What the contestants of `ufbert bench encoder` compute: a dense BERT and encoders with trees, of random weights.

The job folder has our model folders `dense`, `tree` and `fourier`; `dense-hf`, the same dense BERT for transformers;
`dense-onnx/model.onnx`, for ONNX Runtime; and `BATCHxTOKENS.npy`, ids (r, b, t) int32 of r different batches for each shape.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer, models, processors

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.config.presets import load_preset
from ufbert.data.tokenizer import SPECIAL_TOKENS
from ufbert.hub.convert import export_model
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.hub.onnx_export import export_onnx

BATCHES = 8
"""Different batches of a shape: a call has others than the one before."""


class Shape(NamedTuple):
    """What a call computes."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


def parse_shape(text: str) -> Shape:
    """BATCHxTOKENS. Raises ValueError."""
    batch, tokens = map(int, text.split("x"))
    if batch < 1 or tokens < 1:
        raise ValueError(text)
    return Shape(batch, tokens)


def configs(
    layers: int, width: int, vocab_size: int, depth: int, longest: int, fourier_len: int
) -> dict[str, ModelConfig]:
    """The encoders by name. `tree` is BERT with UltraFastBERT's layers for its feedforwards, `fourier` that with Fourier mixing
    for its attention, `dense` BERT itself."""
    dense = replace(
        load_preset("bert_base").model,
        n_layers=layers,
        d_model=width,
        n_heads=max(1, width // 64),
        d_hidden=4 * width,
        vocab_size=vocab_size,
        max_len=longest,
        pooler_width=width,
    )
    tree = replace(dense, feedforward=("tree",), tree_depth=depth)
    return {"dense": dense, "tree": tree, "fourier": replace(tree, mixer=("fourier",), fixed_len=fourier_len)}


def write_job(folder: Path, models_: dict[str, ModelConfig], shapes: tuple[Shape, ...], seed: int) -> None:
    """Draw weights and ids, and write the folder."""
    vocab_size = models_["dense"].vocab_size
    tokenizer = numbered_words(vocab_size)
    for number, (name, config) in enumerate(models_.items()):
        model = ModelFolder(config, nn.init(config, jax.random.key(seed + number), ()), tokenizer)
        save_model(folder / name, model)
        if name == "dense":
            export_model(model, folder / "dense-hf", "hf")
            export_onnx(model, folder / "dense-onnx")
    rng = np.random.default_rng(seed)
    for shape in shapes:
        ids = rng.integers(len(SPECIAL_TOKENS), vocab_size, (BATCHES, *shape))
        np.save(folder / f"{shape}.npy", ids.astype(np.int32))


def numbered_words(vocab_size: int) -> Tokenizer:
    """A tokenizer of so many words; nothing is tokenised, but a model folder has one."""
    words = [*SPECIAL_TOKENS, *(f"word{i}" for i in range(vocab_size - len(SPECIAL_TOKENS)))]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.add_special_tokens(list(SPECIAL_TOKENS))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made

"""The job of `ufbert bench encoder`: a dense BERT and encoders with trees, of random weights.

The job folder has our model folders `dense`, `tree` and `fourier`; `dense-hf`, the same dense BERT for transformers;
`dense-onnx/model.onnx`, for ONNX Runtime and OpenVINO; `static`, the dense BERT quantised with static activations, if it is
timed; `BATCHxTOKENS.npy` for each shape, int32 ids (r * b, t) of r batches.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer, models, processors

from ufbert import nn
from ufbert.bench.report import BYTES, Work, distinct_nodes
from ufbert.config import ModelConfig
from ufbert.config.presets import load_preset
from ufbert.cost.flops import forward_flops_per_token
from ufbert.data.encode import Encoded
from ufbert.data.tokenizer import SPECIAL_TOKENS
from ufbert.hub.convert import export_model
from ufbert.hub.folder import ModelFolder, save_model
from ufbert.hub.onnx_export import export_onnx
from ufbert.hub.quantized import Quantization
from ufbert.inference.calibrate import quantized
from ufbert.options.bench import BenchEncoderOptions

TOLERANCE = 1e-4
"""Largest absolute difference of our float32 answers from the training graph's, for tokens with clear routing decisions."""
UNCLEAR = 0.01
"""Largest share of other tokens."""
RELATIVE = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.4}
"""Largest relative error by type, a median over tokens. Twelve layers of random weights add up rounding more than trained ones
do; it is printed."""
BATCHES = 8
"""Different batches of a shape: a call has others than the one before."""


class Shape(NamedTuple):
    """The size of a call."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


def parse_shape(text: str) -> Shape:
    """Read BATCHxTOKENS, which the options have checked."""
    return Shape(*map(int, text.split("x")))


def relative_error(y: np.ndarray, wanted: np.ndarray) -> float:
    """Return the median over tokens (..., d) of the length of the difference over that of the right answer."""
    return float(np.median(np.linalg.norm(y - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)))


def work(config: ModelConfig, kind: str, shape: Shape) -> Work:
    """Count the bytes and operations that a call needs: the weights of `kind` of all layers are read once."""
    tokens, d = shape.batch * shape.tokens, config.d_model
    operations = tokens * forward_flops_per_token(config, shape.tokens, masked_trees=False, training=False)
    weights = 0.0
    for mixer, feedforward in config.layers:
        weights += 4 * d * d if mixer == "attention" else 0
        nodes = config.n_trees * distinct_nodes(tokens, config.tree_depth)
        weights += 2 * d * (nodes if feedforward == "tree" else config.d_hidden)
    return Work(weights * BYTES[kind], operations, kind)


def configs(options: BenchEncoderOptions) -> dict[str, ModelConfig]:
    """Return the encoders by name: `dense` is BERT, `tree` has UltraFastBERT's layers, `fourier` also Fourier mixing."""
    width = options.d_model
    longest = max(options.fourier_len, *(parse_shape(shape).tokens for shape in options.shapes))
    dense = replace(
        load_preset("bert_base").model, n_layers=options.layers, d_model=width, n_heads=max(1, width // 64),
        d_hidden=4 * width, vocab_size=options.vocab_size, max_len=longest, pooler_width=width,
    )  # fmt: skip
    tree = replace(dense, feedforward=("tree",), tree_depth=options.tree_depth)
    static = {"static": dense} if "static-int8" in options.ours else {}
    return static | {
        "dense": dense,
        "tree": tree,
        "fourier": replace(tree, mixer=("fourier",), fixed_len=options.fourier_len),
    }


def write_job(folder: Path, encoders: dict[str, ModelConfig], shapes: list[Shape], seed: int) -> None:
    """Draw weights and ids, and write the folder."""
    vocab_size = encoders["dense"].vocab_size
    tokenizer = numbered_words(vocab_size)
    write_ids(folder, vocab_size, shapes, seed)
    for number, (name, config) in enumerate((name, config) for name, config in encoders.items() if name != "static"):
        model = ModelFolder(config, nn.init(config, jax.random.key(seed + number), ()), tokenizer)
        save_model(folder / name, model)
        if name == "dense":
            export_model(model, folder / "dense-hf", "hf")
            export_onnx(model, folder / "dense-onnx")
        if name == "dense" and "static" in encoders:
            ids = np.load(folder / f"{shapes[0]}.npy")[:16].tolist()
            rows = Encoded(ids, [[0] * len(row) for row in ids], config.max_len, config.only_len, config.pad_id, 0)
            save_model(folder / "static", quantized(model, Quantization("static"), rows))


def write_ids(folder: Path, vocab_size: int, shapes: list[Shape], seed: int) -> None:
    """Draw ids of each shape, other than special ones, and write them."""
    rng = np.random.default_rng(seed)
    for shape in shapes:
        ids = rng.integers(len(SPECIAL_TOKENS), vocab_size, (BATCHES * shape.batch, shape.tokens))
        np.save(folder / f"{shape}.npy", ids.astype(np.int32))


def numbered_words(vocab_size: int) -> Tokenizer:
    """Return a tokenizer of so many words; nothing is tokenised, but a model folder has one."""
    words = [*SPECIAL_TOKENS, *(f"word{i}" for i in range(vocab_size - len(SPECIAL_TOKENS)))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer

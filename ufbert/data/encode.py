"""Encode texts as padded arrays of ids, the same way for fine-tuning and inference."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ufbert.config import ModelConfig
from ufbert.data.tokenizer import library_errors
from ufbert.errors import UserError

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Row lengths that batches are padded to, so that few shapes are compiled."""


class Batch(NamedTuple):
    """Padded rows. `segment_ids` is 1 on tokens and 0 on padding; `type_ids` is 1 on a second text."""

    ids: np.ndarray
    segment_ids: np.ndarray
    type_ids: np.ndarray


class Encoded(NamedTuple):
    """Texts as lists of ids, `[CLS] text [SEP]` or `[CLS] a [SEP] b [SEP]`, and how to pad them for a model."""

    ids: list[list[int]]
    type_ids: list[list[int]]
    max_len: int
    """The most tokens in a row."""
    only_len: int
    """The length that all rows are padded to, or 0 for the smallest bucket that holds them."""
    pad_id: int
    truncated: int
    """Rows that were cut to `max_len`."""

    def pad(self, picks: Sequence[int] | np.ndarray, length: int = 0) -> Batch:
        """Pad the picked rows to `length` tokens; 0 takes the shortest length that holds them."""
        length = length or self.only_len or bucket(max(len(self.ids[i]) for i in picks), self.max_len)
        ids = np.full((len(picks), length), self.pad_id, np.int32)
        segments, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, i in enumerate(picks):
            n = len(self.ids[i])
            ids[row, :n], segments[row, :n], types[row, :n] = self.ids[i], 1, self.type_ids[i]
        return Batch(ids, segments, types)


def bucket(length: int, max_len: int) -> int:
    """Return the row length that a text of `length` tokens is padded to."""
    return next((size for size in BUCKETS if size >= length and size <= max_len), max_len)


_tokenizer_lock = threading.Lock()
"""Truncation is a state of the tokenizer, which several predictors may share among threads."""


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, config: ModelConfig, max_len: int = 0
) -> Encoded:
    """Tokenise texts, or pairs of texts, for a model. A row longer than `max_len` (or the model's) is cut, longer text first.

    Any number of threads may share a tokenizer. Raises UserError if a row has no room for text.
    """
    limit = config.only_len or min(max_len or config.max_len, config.max_len)
    rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    marks, texts_of_row = tokenizer.num_special_tokens_to_add(pairs is not None), 1 if pairs is None else 2
    if limit < marks + texts_of_row:
        raise UserError(
            f"A row of at most {limit} tokens has no room for {marks} special tokens and a piece of "
            f"{'a text' if pairs is None else 'each of two texts'}; it must have at least {marks + texts_of_row} "
            "(--tune.max-len, or the model's max_len)."
        )
    with _tokenizer_lock:
        tokenizer.no_padding()
        tokenizer.enable_truncation(limit)
        try:
            with library_errors("A text"):
                encodings = tokenizer.encode_batch(rows)
        finally:
            tokenizer.no_truncation()
    ids, types = [row.ids for row in encodings], [row.type_ids for row in encodings]
    return Encoded(ids, types, limit, config.only_len, config.pad_id, sum(bool(row.overflowing) for row in encodings))


def uncut_ids(tokenizer: Tokenizer, text: str, pair: str | None = None) -> list[int]:
    """Tokenise a text or a pair without cutting it."""
    with _tokenizer_lock, library_errors("A text"):
        return tokenizer.encode(text, pair).ids

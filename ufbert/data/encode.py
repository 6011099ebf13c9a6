"""Texts to padded id arrays, the same way for fine-tuning and inference."""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ufbert.config import ModelConfig

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Row lengths that batches are padded to, so that few shapes are compiled."""


class Batch(NamedTuple):
    """Padded rows. `segment_ids` are 1 on tokens and 0 on padding; `type_ids` are 1 on a second text."""

    ids: np.ndarray
    segment_ids: np.ndarray
    type_ids: np.ndarray


class Encoded(NamedTuple):
    """Texts as lists of ids, `[CLS] text [SEP]` or `[CLS] a [SEP] b [SEP]`, and how a model wants them padded."""

    ids: list[list[int]]
    type_ids: list[list[int]]
    max_len: int
    """Longest row."""
    only_len: int
    """The one length that rows are padded to, or 0 for the smallest bucket that holds them."""
    pad_id: int
    truncated: int
    """Rows that were cut to `max_len`."""

    def pad(self, picks: Sequence[int] | np.ndarray, length: int = 0) -> Batch:
        """The picked rows, padded to `length` tokens, or where it is 0 to the shortest length that holds them."""
        length = length or self.only_len or bucket(max(len(self.ids[i]) for i in picks), self.max_len)
        ids = np.full((len(picks), length), self.pad_id, np.int32)
        segments, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, i in enumerate(picks):
            n = len(self.ids[i])
            ids[row, :n], segments[row, :n], types[row, :n] = self.ids[i], 1, self.type_ids[i]
        return Batch(ids, segments, types)


def bucket(length: int, max_len: int) -> int:
    """The row length that a text of `length` tokens is padded to."""
    return next((size for size in BUCKETS if size >= length and size <= max_len), max_len)


_cutting = threading.Lock()


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, config: ModelConfig, max_len: int = 0
) -> Encoded:
    """Tokenise for a model, cutting the longer text first where a row would pass `max_len` (or the model's) tokens. Any number
    of threads may share a tokenizer here."""
    limit = config.only_len or min(max_len or config.max_len, config.max_len)
    rows = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    with _cutting:  # where to cut is a state of the tokenizer, which several predictors may have in common
        tokenizer.no_padding()
        tokenizer.enable_truncation(limit)
        found = tokenizer.encode_batch(rows)
        tokenizer.no_truncation()
    ids, types = [row.ids for row in found], [row.type_ids for row in found]
    return Encoded(ids, types, limit, config.only_len, config.pad_id, sum(bool(row.overflowing) for row in found))


def uncut_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's ids, however many they are."""
    with _cutting:
        return tokenizer.encode(text).ids

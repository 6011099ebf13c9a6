"""Texts arranged in rows of few sizes, since XLA compiles a program for each size."""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from ufbert.data.encode import Encoded, bucket


class Batch(NamedTuple):
    """Texts in rows."""

    ids: Int[np.ndarray, "b t"]
    segment_ids: Int[np.ndarray, "b t"]
    """The number of each token's text in its row, from 1; 0 on padding."""
    position_ids: Int[np.ndarray, "b t"]
    type_ids: Int[np.ndarray, "b t"]
    starts: Int[np.ndarray, " n"]
    """Index of each text's first token, counted through all rows."""


def size_for(count: int) -> int:
    """Return the smallest of 4, 8, ..., 32, 40, ..., 64, 80, ..., 128, 160, ... that is at least `count`.

    Three tokens are padding at most, or less than a fifth of the row.
    """
    step = max(4, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step


def sizes_to(most: int) -> Iterator[int]:
    """Yield the sizes that `size_for` gives for 1 to `most`."""
    size = 0
    while size < most:
        size = size_for(size + 1)
        yield size


def fill(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Group the indices of texts, at most `most` tokens a group; a longer text, or any if `most` is 0, is a group by itself.

    A group takes the longest text left that still fits, again and again, so that few tokens are missing to `most`.
    """
    if not most:
        return [[i] for i in range(len(lengths))]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes, groups = [lengths[i] for i in order], []
    while order:
        group, room = [order.pop()], most - sizes.pop()
        while (at := bisect.bisect_right(sizes, room)) > 0:
            room -= sizes.pop(at - 1)
            group.append(order.pop(at - 1))
        groups.append(group)
    return groups


def fill_rows(lengths: Sequence[int], most: int, max_len: int) -> list[list[int]]:
    """Group the indices of texts that get a row each: texts of similar lengths, 1, 2, 4, 8, ... of them.

    All rows of a group are as long as the bucket of its longest text. Together they have at most `most` tokens, or there is
    one row.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = []
    while order:
        rows = min(len(order), max(1, most // bucket(lengths[order[-1]], max_len)))
        rows = 1 << (rows.bit_length() - 1)
        groups.append(order[: -rows - 1 : -1])
        del order[-rows:]
    return groups


def one_row(rows: Encoded, picks: Sequence[int]) -> Batch:
    """Put the picked texts one after the other into a single row."""
    lengths = np.array([len(rows.ids[i]) for i in picks])
    size, starts = size_for(int(lengths.sum())), (np.cumsum(lengths) - lengths).astype(np.int32)
    ids, segments, types = (np.full((1, size), value, np.int32) for value in (rows.pad_id, 0, 0))
    positions = np.zeros((1, size), np.int32)
    for number, i in enumerate(picks):
        tokens = slice(starts[number], starts[number] + lengths[number])
        ids[0, tokens], types[0, tokens] = rows.ids[i], rows.type_ids[i]
        positions[0, tokens], segments[0, tokens] = np.arange(lengths[number]), number + 1
    return Batch(ids, segments, positions, types, starts)


def row_each(rows: Encoded, picks: Sequence[int]) -> Batch:
    """Put each of the picked texts into a row of its own."""
    padded = rows.pad(picks)
    n, t = padded.ids.shape
    positions = np.broadcast_to(np.arange(t, dtype=np.int32), padded.ids.shape)
    return Batch(padded.ids, padded.segment_ids, positions, padded.type_ids, np.arange(n, dtype=np.int32) * t)

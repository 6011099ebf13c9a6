"""The inference engine: on a CPU weights are packed once (`packed.py`), and hardly any padding is computed.

Texts lie one after the other in a single row, and attention keeps to each (`ufbert.ops.native.attention`), so that none is
padded to the length of another. The row itself is padded to one of a few sizes, since XLA compiles a program for each.
Models with Fourier mixers, which read one length only, and machines without the kernels get one text a row instead.
"""

import bisect
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ufbert import nn
from ufbert.data.encode import Encoded
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder
from ufbert.inference import packed
from ufbert.inference.packed import Dtype
from ufbert.ops import native
from ufbert.runtime.memory import give_back_freed_memory

AT_ONCE = 2048
"""Tokens that the throughput mode computes together."""


def size_for(count: int) -> int:
    """Return the smallest of 1, 2, ..., 16, 18, ..., 32, 36, ... that is at least `count`: at most an eighth is padding."""
    step = max(1, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


class Batch(NamedTuple):
    """Texts in rows."""

    ids: Int[np.ndarray, "b t"]
    segment_ids: Int[np.ndarray, "b t"]
    """The number of each token's text in its row, from 1; 0 on padding."""
    position_ids: Int[np.ndarray, "b t"]
    type_ids: Int[np.ndarray, "b t"]
    starts: Int[np.ndarray, " n"]
    """Index of each text's first token, counted through all rows; n is padded."""


class Engine:
    """A model folder, ready for inference."""

    def __init__(
        self,
        model: ModelFolder,
        dtype: Dtype = "float32",
        exact_routing: bool = False,
        mode: Literal["throughput", "latency"] = "throughput",
    ) -> None:
        """Pack the weights; `dtype` is their type in linear layers and trees.

        Mode `latency` computes each text by itself, `throughput` many together. Raises UserError for a narrow type on a
        machine without the native kernels.
        """
        on_cpu = jax.default_backend() == "cpu"
        why = native.unavailable() if on_cpu else "they are for CPUs"
        if dtype != "float32" and why:
            raise UserError(f"{dtype} weights need the native kernels, and there are none: {why}.")
        self.config = replace(
            model.config,
            tree_backend="auto" if on_cpu else model.config.tree_backend,
            dtype="float32" if on_cpu else model.config.dtype,
        )
        self.is_packed = not why
        params = dict(model.params)
        if self.is_packed:
            params["encoder"] = packed.pack(model.params["encoder"], self.config, dtype, exact_routing)
        self.params = jax.block_until_ready(jax.tree.map(jnp.asarray, params))
        if self.is_packed:
            gc.collect(0)  # lets jax let go of the unpacked weights
            give_back_freed_memory()
        self.in_one_row = self.is_packed and not self.config.only_len
        self.at_once = AT_ONCE if mode == "throughput" else 0
        self._hidden = jax.jit(self._encode)
        self._scores = jax.jit(self._classify)
        self._logits = jax.jit(self._predict)
        self._routing = jax.jit(self._route)

    def hidden(self, rows: Encoded) -> list[Float[np.ndarray, "tokens d"]]:
        """Compute the hidden states of each text."""
        results: list[Any] = [None] * len(rows.ids)
        for picks, batch in self.batches(rows):
            hidden = np.asarray(self._hidden(self.params, batch)).reshape(-1, self.config.d_model)
            for i, start in zip(picks, batch.starts, strict=False):
                results[i] = hidden[start : start + len(rows.ids[i])].copy()
        return results

    def scores(self, rows: Encoded) -> Float[np.ndarray, "n c"]:
        """Compute the classifier scores of each text."""
        results: list[Any] = [None] * len(rows.ids)
        for picks, batch in self.batches(rows):
            for i, scores in zip(picks, np.asarray(self._scores(self.params, batch)), strict=False):
                results[i] = scores
        return np.stack(results)

    def logits(self, rows: Encoded, positions: Sequence[Sequence[int]]) -> list[Float[np.ndarray, "k v"]]:
        """Compute the masked-LM logits of each text at its positions."""
        results: list[Any] = [None] * len(rows.ids)
        for picks, batch in self.batches(rows):
            tokens = [batch.starts[n] + p for n, i in enumerate(picks) for p in positions[i]]
            padded = np.zeros(size_for(max(1, len(tokens))), np.int32)
            padded[: len(tokens)] = tokens
            logits = np.asarray(self._logits(self.params, batch, padded))
            ends = np.cumsum([0, *(len(positions[i]) for i in picks)])
            for n, i in enumerate(picks):
                results[i] = logits[ends[n] : ends[n + 1]]
        return results

    def warm_up(self, lengths: Sequence[int], ask: Callable[[Encoded], Any]) -> None:
        """Compile what a method (`hidden`, `scores`, `logits`) needs for texts of these lengths."""
        for length in lengths:
            ids = [[self.config.pad_id] * length]
            ask(Encoded(ids, [[0] * length], self.config.max_len, self.config.only_len, self.config.pad_id, 0))

    def routing(self, model: ModelFolder, batch: Batch) -> list[packed.TreeRouting]:
        """Report the routing decisions of each tree layer, given the model that was packed; nothing if none was."""
        trees = [
            f"layer_{i:02d}" for i, (_, kind) in enumerate(self.config.layers) if kind == "tree" and self.is_packed
        ]
        exact = {name: jnp.asarray(model.params["encoder"][name]["tree"]["w_in"]) for name in trees}
        return self._routing(self.params, exact, batch) if trees else []

    def batches(self, rows: Encoded) -> "list[tuple[list[int], Batch]]":
        """Arrange texts in batches, each with the indices of its texts."""
        lengths = [self.config.only_len or len(ids) for ids in rows.ids]
        groups = fill(lengths, self.at_once)
        if self.in_one_row:
            return [(picks, self.one_row(rows, picks)) for picks in groups]
        return [(picks, self.row_each(rows, picks)) for picks in groups]

    def one_row(self, rows: Encoded, picks: list[int]) -> Batch:
        """Put texts one after the other into a single row."""
        lengths = np.array([len(rows.ids[i]) for i in picks])
        # Room for a power of two texts: it costs next to nothing, and each number of texts would need a program of its own.
        size, n = size_for(int(lengths.sum())), 1 << (len(picks) - 1).bit_length()
        ids, segments, types = (np.full((1, size), value, np.int32) for value in (rows.pad_id, 0, 0))
        positions, starts = np.zeros((1, size), np.int32), np.zeros(n, np.int32)
        starts[: len(picks)] = np.cumsum(lengths) - lengths
        for number, i in enumerate(picks):
            tokens = slice(starts[number], starts[number] + lengths[number])
            ids[0, tokens], types[0, tokens] = rows.ids[i], rows.type_ids[i]
            positions[0, tokens], segments[0, tokens] = np.arange(lengths[number]), number + 1
        return Batch(ids, segments, positions, types, starts)

    def row_each(self, rows: Encoded, picks: list[int]) -> Batch:
        """Put each text into a row of its own, and repeat the first text to fill up the rows."""
        n = size_for(len(picks))
        padded = rows.pad([*picks, *[picks[0]] * (n - len(picks))])
        t = padded.ids.shape[1]
        positions = np.broadcast_to(np.arange(t, dtype=np.int32), padded.ids.shape)
        starts = np.arange(n, dtype=np.int32) * t
        return Batch(padded.ids, padded.segment_ids, positions, padded.type_ids, starts)

    def _encode(self, params: Any, batch: Any) -> Float[Array, "b t d"]:
        ids, segments, positions, types = batch[:4]
        if self.is_packed:
            return packed.forward(params["encoder"], self.config, ids, segments, positions, types)[0]
        return nn.encode(params, self.config, ids, segments, positions, type_ids=types)[0]

    def _classify(self, params: Any, batch: Any) -> Float[Array, "n c"]:
        hidden = self._encode(params, batch)
        if self.in_one_row:
            texts = jnp.arange(1, len(batch.starts) + 1)
            pooled = jax.vmap(lambda i: nn.pool(self.config, hidden, batch.segment_ids == i)[0])(texts)
        else:
            pooled = nn.pool(self.config, hidden, batch.segment_ids != 0)
        return nn.classify(params, self.config, pooled)

    def _route(self, params: Any, exact: dict[str, Array], batch: Any) -> list[packed.TreeRouting]:
        encoder, segments = params["encoder"], batch.segment_ids
        _, inputs = packed.forward(encoder, self.config, *batch[:4])
        return [
            packed.tree_routing(encoder[name]["tree"], inputs[name], w_in, segments) for name, w_in in exact.items()
        ]

    def _predict(self, params: Any, batch: Any, positions: Any) -> Float[Array, "k v"]:
        tokens = self._encode(params, batch).reshape(-1, self.config.d_model)
        return nn.masked_lm_logits(params, self.config, tokens[positions])


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

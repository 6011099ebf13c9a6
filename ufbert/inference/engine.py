"""Texts through an encoder, fast on a CPU: weights packed once, and only real tokens computed.

Texts lie one after the other in a single row, and attention keeps to each (`ufbert.ops.native.attention`), so that none is
padded to the length of another. A row is padded to one of a few sizes, since XLA compiles for each. Models with Fourier mixers,
which know one length, and machines without the kernels get one text a row instead.
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
    """The smallest of 1, 2, ..., 8, 9, ..., 16, 18, ..., 32, 36, ... that holds `count`: at most an eighth is padding."""
    step = max(1, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


class Batch(NamedTuple):
    """Texts in rows, and where they are."""

    ids: Int[np.ndarray, "b t"]
    segment_ids: Int[np.ndarray, "b t"]
    """1, 2, ... from text to text of a row; 0 on padding."""
    position_ids: Int[np.ndarray, "b t"]
    type_ids: Int[np.ndarray, "b t"]
    starts: Int[np.ndarray, " n"]
    """Where each text's first token is, counted through all rows; n is padded."""


class Engine:
    """A model folder, ready to compute."""

    def __init__(
        self,
        model: ModelFolder,
        dtype: Dtype = "float32",
        exact_routing: bool = False,
        mode: Literal["throughput", "latency"] = "throughput",
    ) -> None:
        """`dtype` is that of weights in linear layers and trees; mode `latency` computes each text by itself, `throughput`
        many together. Raises UserError if the weights cannot be had in that type here."""
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
        """Every text's hidden states."""
        found: list[Any] = [None] * len(rows.ids)
        for picks, batch in self.batches(rows):
            hidden = np.asarray(self._hidden(self.params, batch)).reshape(-1, self.config.d_model)
            for i, start in zip(picks, batch.starts, strict=False):
                found[i] = hidden[start : start + len(rows.ids[i])].copy()
        return found

    def scores(self, rows: Encoded) -> Float[np.ndarray, "n c"]:
        """Every text's classifier scores."""
        found: list[Any] = [None] * len(rows.ids)
        for picks, batch in self.batches(rows):
            for i, scores in zip(picks, np.asarray(self._scores(self.params, batch)), strict=False):
                found[i] = scores
        return np.stack(found)

    def logits(self, rows: Encoded, positions: Sequence[Sequence[int]]) -> list[Float[np.ndarray, "k v"]]:
        """Every text's logits of the word pieces at its positions."""
        found: list[Any] = [None] * len(rows.ids)
        for picks, batch in self.batches(rows):
            where = [batch.starts[n] + p for n, i in enumerate(picks) for p in positions[i]]
            padded = np.zeros(size_for(max(1, len(where))), np.int32)
            padded[: len(where)] = where
            logits = np.asarray(self._logits(self.params, batch, padded))
            ends = np.cumsum([0, *(len(positions[i]) for i in picks)])
            for n, i in enumerate(picks):
                found[i] = logits[ends[n] : ends[n + 1]]
        return found

    def warm_up(self, lengths: Sequence[int], ask: Callable[[Encoded], Any]) -> None:
        """Have everything compiled that `ask` (one of the questions above) needs for texts of these lengths."""
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
        """The texts' numbers and arrays, batch by batch."""
        lengths = [self.config.only_len or len(ids) for ids in rows.ids]
        groups = fill(lengths, self.at_once)
        if self.in_one_row:
            return [(picks, self.one_row(rows, picks)) for picks in groups]
        return [(picks, self.row_each(rows, picks)) for picks in groups]

    def one_row(self, rows: Encoded, picks: list[int]) -> Batch:
        """Texts one after the other."""
        lengths = np.array([len(rows.ids[i]) for i in picks])
        # Room for a power of two texts: it costs next to nothing, and every number would be another program to compile.
        size, n = size_for(int(lengths.sum())), 1 << (len(picks) - 1).bit_length()
        ids, segments, types = (np.full((1, size), value, np.int32) for value in (rows.pad_id, 0, 0))
        positions, starts = np.zeros((1, size), np.int32), np.zeros(n, np.int32)
        starts[: len(picks)] = np.cumsum(lengths) - lengths
        for number, i in enumerate(picks):
            here = slice(starts[number], starts[number] + lengths[number])
            ids[0, here], types[0, here] = rows.ids[i], rows.type_ids[i]
            positions[0, here], segments[0, here] = np.arange(lengths[number]), number + 1
        return Batch(ids, segments, positions, types, starts)

    def row_each(self, rows: Encoded, picks: list[int]) -> Batch:
        """One text a row."""
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
    """Numbers of the texts, in groups of at most `most` tokens (or of one text): the longest of those left that fits, again
    and again, so that few tokens are missing to `most`."""
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

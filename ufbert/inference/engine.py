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
from ufbert.ops import native
from ufbert.runtime.memory import give_back_freed_memory

Dtype = Literal["float32", "bfloat16", "int8"]

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
    """Where each text's first token is, all rows in one; n is padded."""
    owner: Int[np.ndarray, " tokens"]
    """Which text a token belongs to, all rows in one; n on padding."""


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
        if why:
            self.params = jax.tree.map(jnp.asarray, model.params)
        else:
            self.params = jax.block_until_ready(nn.pack(model.params, dtype, exact_routing))
            gc.collect(0)  # lets jax let go of the unpacked weights
            give_back_freed_memory()
        self.in_one_row = not why and not self.config.only_len
        self.at_once = AT_ONCE if mode == "throughput" else 0
        self._hidden = jax.jit(self._encode)
        self._scores = jax.jit(self._classify)
        self._logits = jax.jit(self._predict)
        self._used = jax.jit(self._report)

    def hidden(self, rows: Encoded) -> list[Float[np.ndarray, "tokens d"]]:
        """Every text's hidden states."""
        found: list[Any] = [None] * len(rows.ids)
        for picks, batch in self.batches(rows):
            hidden = np.asarray(self._hidden(self.params, batch))
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

    def statistics(self, model: ModelFolder, batch: Batch) -> dict[str, nn.Aux]:
        """What packed tree layers report of a batch (`ufbert.nn.feedforward`), given the model that was packed."""
        kept = dict(self.params["encoder"])
        for name, layer in model.params["encoder"].items():
            if "tree" in layer:
                kept[name] = {**kept.get(name, {}), "tree": {"w_in": jnp.asarray(layer["tree"]["w_in"])}}
        return self._used({**self.params, "encoder": kept}, batch)

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
        positions, owner = np.zeros((1, size), np.int32), np.full(size, n, np.int32)
        starts = np.zeros(n, np.int32)
        starts[: len(picks)] = np.cumsum(lengths) - lengths
        for number, i in enumerate(picks):
            here = slice(starts[number], starts[number] + lengths[number])
            ids[0, here], types[0, here] = rows.ids[i], rows.type_ids[i]
            positions[0, here], segments[0, here], owner[here] = np.arange(lengths[number]), number + 1, number
        return Batch(ids, segments, positions, types, starts, owner)

    def row_each(self, rows: Encoded, picks: list[int]) -> Batch:
        """One text a row."""
        n = size_for(len(picks))
        padded = rows.pad([*picks, *[picks[0]] * (n - len(picks))])
        t = padded.ids.shape[1]
        owner = np.where(padded.segment_ids > 0, np.arange(n)[:, None], n).astype(np.int32).reshape(-1)
        positions = np.broadcast_to(np.arange(t, dtype=np.int32), padded.ids.shape)
        starts = np.arange(n, dtype=np.int32) * t
        return Batch(padded.ids, padded.segment_ids, positions, padded.type_ids, starts, owner)

    def _encode(self, params: Any, batch: Any) -> Float[Array, "tokens d"]:
        ids, segments, positions, types = batch[:4]
        hidden = nn.encode(params, self.config, ids, segments, positions, type_ids=types)[0]
        return hidden.reshape(-1, self.config.d_model)

    def _report(self, params: Any, batch: Any) -> dict[str, nn.Aux]:
        return nn.encode(params, self.config, *batch[:3], type_ids=batch[3], statistics=True)[1]

    def _classify(self, params: Any, batch: Any) -> Float[Array, "n c"]:
        hidden, n = self._encode(params, batch), len(batch.starts)
        if self.config.pooling == "first":
            pooled = hidden[batch.starts]
        else:
            sums = jax.ops.segment_sum(hidden, batch.owner, n + 1)[:n]
            counts = jax.ops.segment_sum(jnp.ones_like(hidden[:, :1]), batch.owner, n + 1)[:n]
            pooled = sums / jnp.maximum(counts, 1.0)
        return nn.classify(params, self.config, pooled[:, None])

    def _predict(self, params: Any, batch: Any, positions: Any) -> Float[Array, "k v"]:
        return nn.masked_lm_logits(params, self.config, self._encode(params, batch)[positions])


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

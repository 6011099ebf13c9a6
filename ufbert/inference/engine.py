"""The inference engine: on a CPU weights are packed once (`packed.py`), and hardly any padding is computed.

Texts lie one after the other in a single row, and attention keeps to each (`ufbert.ops.native.attention`), so that none is
padded to the length of another. Models with Fourier mixers, which read one length only, and machines without the kernels get
one text a row instead.

XLA compiles a program for each shape, which takes as long as hundreds of answers. So the encoder is one program for each of a
few shapes of rows (`batches.py`), whatever is asked of its hidden states, and a head is another for each of `HEAD_ROWS`.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ufbert import nn
from ufbert.config import ModelConfig
from ufbert.data.encode import Encoded, bucket
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder
from ufbert.inference import packed
from ufbert.inference.batches import Batch, fill, fill_rows, one_row, row_each, sizes_to
from ufbert.inference.packed import Dtype
from ufbert.ops import native
from ufbert.runtime.console import phase
from ufbert.runtime.memory import give_back_freed_memory

AT_ONCE = 2048
"""Tokens that the throughput mode computes together."""
HEAD_ROWS = (1, 4, 16, 64)
"""Vectors that a head computes together, filled up with zeros."""

Pooling = Literal["first", "mean"]


class Engine:
    """A model folder, ready for inference."""

    def __init__(
        self,
        model: ModelFolder,
        dtype: Dtype | Literal["auto"] = "auto",
        exact_routing: bool = False,
        mode: Literal["throughput", "latency"] = "throughput",
    ) -> None:
        """Pack the weights; `dtype` is their type in linear layers and trees.

        `auto` is int8 for a quantised folder where there are native kernels, and else float32. int8 takes the weights of a
        quantised folder as they are stored, those that are float32 there as such. Mode `latency` computes each text by itself,
        `throughput` many together. Raises UserError for a narrow type on a machine without the native kernels, and for
        `exact_routing` with a folder whose deciding weights were rounded.
        """
        on_cpu = jax.default_backend() == "cpu"
        why = native.unavailable() if on_cpu else "they are for CPUs"
        how = model.quantized
        if dtype == "auto":
            dtype = "float32" if why or how is None else "int8"
        if dtype != "float32" and why:
            raise UserError(f"{dtype} weights need the native kernels, and there are none: {why}.")
        if exact_routing and how is not None and not how.exact_routing and "tree" in model.config.feedforward:
            raise UserError(
                "This folder's deciding weights are rounded, and the unrounded ones are not in it; quantise the model again "
                "with --exact-routing, or leave it out."
            )
        self.dtype: Dtype = dtype
        width: packed.Width = "stored" if dtype == "int8" and how is not None else dtype
        self.config = replace(
            model.config,
            tree_backend="auto" if on_cpu else model.config.tree_backend,
            dtype="float32" if on_cpu else model.config.dtype,
        )
        self.is_packed = not why
        params, decoder = dict(model.params), None
        if width == "stored" and "masked_lm" in params:
            decoder = packed.pack_decoder(model.params, self.config)
            if decoder is not None:
                params["masked_lm"] = {k: part for k, part in params["masked_lm"].items() if k != "decoder"}
        if self.is_packed:
            params["encoder"] = packed.pack(model.params["encoder"], self.config, width, exact_routing)
        self.params = jax.block_until_ready(jax.tree.map(jnp.asarray, params))
        if self.is_packed:
            gc.collect(0)  # lets jax let go of the unpacked weights
            give_back_freed_memory()
        self.in_one_row = self.is_packed and not self.config.only_len
        self.at_once = AT_ONCE if mode == "throughput" else 0
        self._hidden = jax.jit(self._encode)
        self._pool = jax.jit(self._pool_rows, static_argnames="pooling")
        self._routing = jax.jit(self._route)
        self._heads = _heads(self.params, self.config, decoder)

    def hidden(self, rows: Encoded) -> list[Float[np.ndarray, "tokens d"]]:
        """Compute the hidden states of each text."""
        results: list[Any] = [None] * len(rows.ids)
        for i, hidden in self._each(rows):
            results[i] = hidden.copy()
        return results

    def pooled(self, rows: Encoded, pooling: Pooling) -> Float[np.ndarray, "n d"]:
        """Compute a vector of each text: the first token's hidden state, or the mean over all its tokens."""
        results: Any = np.zeros((len(rows.ids), self.config.d_model), np.float32)
        if self.in_one_row:
            for i, hidden in self._each(rows):
                results[i] = hidden[0] if pooling == "first" else hidden.mean(axis=0)
            return results
        for picks, batch in self.batches(rows):
            hidden = self._hidden(self.params, batch[:4])  # stays on the device
            results[picks] = self._pool(hidden, batch.segment_ids != 0, pooling=pooling)
        return results

    def scores(self, rows: Encoded) -> Float[np.ndarray, "n c"]:
        """Compute the classifier scores of each text."""
        return self.head("classifier", self.pooled(rows, self.config.pooling))

    def logits(self, rows: Encoded, positions: Sequence[Sequence[int]]) -> list[Float[np.ndarray, "k v"]]:
        """Compute the masked-LM logits of each text at its positions."""
        results: list[Any] = [None] * len(rows.ids)
        for i, hidden in self._each(rows):
            results[i] = hidden[list(positions[i])]
        logits = self.head("masked_lm", np.concatenate(results))
        return np.split(logits, np.cumsum([len(of_text) for of_text in positions])[:-1])

    def head(self, name: str, vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Compute a head (`classifier`, `pooler` or `masked_lm`) on vectors."""
        most, outputs = HEAD_ROWS[-1], []
        for part in (vectors[at : at + most] for at in range(0, len(vectors), most)):
            filled = np.zeros((next(n for n in HEAD_ROWS if n >= len(part)), vectors.shape[1]), np.float32)
            filled[: len(part)] = part
            outputs.append(np.asarray(self._heads[name](filled))[: len(part)])
        return np.concatenate(outputs)

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that it can compute."""
        return tuple(self._heads)

    @phase("compiling the programs")
    def warm_up(self, most: int = 0) -> None:
        """Compile the programs that texts of at most `most` tokens together ask for; 0 takes all that any texts ask for."""
        for batch in self._shapes(most):
            hidden = self._hidden(self.params, batch[:4])
            for pooling in () if self.in_one_row else ("first", "mean"):
                self._pool(hidden, batch.segment_ids != 0, pooling=pooling)
            jax.block_until_ready(hidden)
        for name in self._heads:
            for n in HEAD_ROWS:
                self.head(name, np.zeros((n, self.config.d_model), np.float32))

    def _shapes(self, most: int) -> Iterator[Batch]:
        """Yield a batch of each shape that texts of at most `most` tokens together can have; 0 for any texts."""
        cfg = self.config
        limit = max(self.at_once, cfg.max_len)
        most = min(most, limit) or limit
        if self.in_one_row:
            for size in sizes_to(most):
                lengths = [min(cfg.max_len, size - at) for at in range(0, size, cfg.max_len)]
                yield one_row(self._dummies(lengths), range(len(lengths)))
            return
        longest = cfg.only_len or min(most, cfg.max_len)
        for t in sorted({cfg.only_len or bucket(length, cfg.max_len) for length in range(1, longest + 1)}):
            n = 1
            while n == 1 or n * t <= min(most, self.at_once):
                yield row_each(self._dummies([t] * n), range(n))
                n *= 2

    def _dummies(self, lengths: Sequence[int]) -> Encoded:
        cfg = self.config
        ids, types = [[cfg.pad_id] * n for n in lengths], [[0] * n for n in lengths]
        return Encoded(ids, types, cfg.max_len, cfg.only_len, cfg.pad_id, 0)

    def _each(self, rows: Encoded) -> "Iterator[tuple[int, Float[np.ndarray, 'tokens d']]]":
        """Compute the hidden states of the texts, and yield them with the text's index, in any order.

        What it yields is a view of a whole batch.
        """
        for picks, batch in self.batches(rows):
            tokens = np.asarray(self._hidden(self.params, batch[:4])).reshape(-1, self.config.d_model)
            for i, start in zip(picks, batch.starts, strict=True):
                yield i, tokens[start : start + len(rows.ids[i])]

    def routing(self, model: ModelFolder, batch: Batch) -> list[packed.TreeRouting]:
        """Report the routing decisions of each tree layer, given the model that was packed; nothing if none was."""
        trees = [
            f"layer_{i:02d}" for i, (_, kind) in enumerate(self.config.layers) if kind == "tree" and self.is_packed
        ]
        exact = {name: jnp.asarray(model.params["encoder"][name]["tree"]["w_in"]) for name in trees}
        return self._routing(self.params, exact, batch[:4]) if trees else []

    def batches(self, rows: Encoded) -> "list[tuple[list[int], Batch]]":
        """Arrange texts in batches, each with the indices of its texts."""
        lengths = [self.config.only_len or len(ids) for ids in rows.ids]
        if self.in_one_row:
            return [(picks, one_row(rows, picks)) for picks in fill(lengths, self.at_once)]
        return [(picks, row_each(rows, picks)) for picks in fill_rows(lengths, self.at_once, rows.max_len)]

    def _encode(self, params: Any, batch: Any) -> Float[Array, "b t d"]:
        ids, segments, positions, types = batch
        if self.is_packed:
            return packed.forward(params["encoder"], self.config, ids, segments, positions, types)[0]
        return nn.encode(params, self.config, ids, segments, positions, type_ids=types)[0]

    def _pool_rows(
        self, hidden: Float[Array, "b t d"], real: Bool[Array, "b t"], pooling: Pooling
    ) -> Float[Array, "b d"]:
        return nn.pool(replace(self.config, pooling=pooling), hidden, real)

    def _route(self, params: Any, exact: dict[str, Array], batch: Any) -> list[packed.TreeRouting]:
        encoder, segments = params["encoder"], batch[1]
        _, inputs, _ = packed.forward(encoder, self.config, *batch)
        return [
            packed.tree_routing(encoder[name]["tree"], inputs[name], w_in, segments) for name, w_in in exact.items()
        ]


def _heads(
    params: nn.Params, config: ModelConfig, decoder: native.Packed | None
) -> dict[str, Callable[[Float[np.ndarray, "n d"]], Array]]:
    """Return the function of each head that the parameters have, from vectors to its outputs.

    `decoder` is that of the masked-LM head, if it is packed.
    """
    functions: dict[str, Callable[..., Array]]
    functions = {"masked_lm": nn.masked_lm_logits, "classifier": nn.classify, "pooler": nn.apply_pooler}
    parts: dict[str, dict[str, Any]] = {name: {name: params[name]} for name in functions if name in params}
    if decoder is not None:
        parts["masked_lm"]["decoder"], functions["masked_lm"] = decoder, packed.decoder_logits
    elif "masked_lm" in parts:
        parts["masked_lm"]["encoder"] = {"embeddings": {"tokens": params["encoder"]["embeddings"]["tokens"]}}
    if "classifier" in parts:
        parts.setdefault("pooler", {"pooler": params["classifier"]["pooler"]})
    return {name: partial(jax.jit(functions[name], static_argnums=1), part, config) for name, part in parts.items()}

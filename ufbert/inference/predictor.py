"""Ask a model folder: fill masks, classify. On a CPU its trees read only the weights on each token's path."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from ufbert import nn
from ufbert.data.encode import encode_texts
from ufbert.data.tokenizer import special_ids, special_names
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, load_model

MASK = "[MASK]"
Dtype = Literal["float32", "bfloat16", "int8"]


class Guess(NamedTuple):
    """A word piece and its probability."""

    token: str
    probability: float


class Answer(NamedTuple):
    """A class and its probability; for regression the predicted value, and no probability."""

    label: str
    probability: float | None


class Predictor:
    """A loaded model. Raises UserError for a question its heads cannot answer."""

    def __init__(self, model: ModelFolder, dtype: Dtype = "float32", exact_routing: bool = False) -> None:
        """`dtype` is that of the trees' weights; a token's turns are float32 arithmetic on them as they are stored, or on
        the unrounded ones with `exact_routing`. Raises UserError if it is narrow and the model has no trees."""
        on_cpu = jax.default_backend() == "cpu"
        self.config = replace(
            model.config,
            tree_backend="auto" if on_cpu else model.config.tree_backend,
            dtype="float32" if on_cpu else model.config.dtype,
        )
        self.model, self.params = model, model.params
        if dtype != "float32":
            narrow = nn.narrow_trees(model.params, dtype, exact_routing)
            if not narrow:
                raise UserError(f"{dtype} weights are for trees, and this model has none.")
            self.params = {**model.params, "narrow": narrow}
        self._encode = jax.jit(self._hidden)
        self._logits = jax.jit(self._masked_logits)
        self._scores = jax.jit(self._class_scores)

        self._counts = jax.jit(self._used)

    @classmethod
    def load(cls, folder: str | Path, dtype: Dtype = "float32", exact_routing: bool = False) -> "Predictor":
        """Read a model folder."""
        return cls(load_model(folder), dtype, exact_routing)

    def changed_routes(self, texts: Sequence[str]) -> float:
        """The share of tokens, mean over tree layers, that narrow weights send down another path than float32 ones would
        from the same hidden state; 0 without narrow weights."""
        rows, shares = encode_texts(self.model.tokenizer, list(texts), None, self.config), []
        for i, ids in enumerate(rows.ids):
            used = self._counts(self.params, rows.pad([i]))
            found = [float(value) for name, value in used.items() if name.endswith(".changed_routes")]
            shares.append((sum(found) / max(1, len(found)), len(ids)))
        return sum(share * count for share, count in shares) / max(1, sum(count for _, count in shares))

    def _used(self, params: Any, batch: Any) -> Any:
        ids, segments, types = batch
        return nn.encode(params, self.config, ids, segments, type_ids=types, statistics=True)[1]

    def _hidden(self, params: Any, batch: Any) -> Any:
        return nn.encode(params, self.config, batch.ids, batch.segment_ids, type_ids=batch.type_ids)[0]

    def _masked_logits(self, params: Any, batch: Any, position: Any) -> Any:
        return nn.masked_lm_logits(params, self.config, self._hidden(params, batch)[0, position])

    def _class_scores(self, params: Any, batch: Any) -> Any:
        return nn.classify(params, self.config, self._hidden(params, batch), batch.segment_ids)

    def fill_mask(self, text: str, top: int = 5) -> list[list[Guess]]:
        """For each [MASK] in the text, the `top` likeliest word pieces, best first."""
        if "masked_lm" not in self.model.heads:
            raise UserError(
                "This model folder has no masked-LM head; use the pretrained folder it was fine-tuned from."
            )
        if MASK not in text:
            raise UserError(f"The text has no {MASK} to fill.")
        tokenizer, config = self.model.tokenizer, self.config
        rows = encode_texts(tokenizer, [text.replace(MASK, special_names(tokenizer)[MASK])], None, config)
        mask = special_ids(tokenizer).mask
        positions = [i for i, token in enumerate(rows.ids[0]) if token == mask]
        if len(positions) < text.count(MASK):
            raise UserError(f"The text is longer than the model's {rows.max_len} tokens, and a {MASK} was cut off.")
        batch = rows.pad([0])
        answers = []
        for position in positions:
            logits = np.asarray(self._logits(self.params, batch, position), np.float64)
            odds = np.exp(logits - logits.max())
            odds /= odds.sum()
            best = np.argsort(-odds, kind="stable")[:top]
            answers.append([Guess(tokenizer.id_to_token(int(i)) or "[UNK]", float(odds[i])) for i in best])
        return answers

    def predict(self, text: str, pair: str | None = None) -> Answer:
        """The class of a text or a pair of texts, with its probability; the value for a regression model."""
        task = self.model.task
        if task is None or "classifier" not in self.model.heads:
            raise UserError("This model folder has no classifier; fine-tune it first (finetune.py).")
        rows = encode_texts(self.model.tokenizer, [text], None if pair is None else [pair], self.config)
        scores = np.asarray(self._scores(self.params, rows.pad([0])), np.float64)[0]
        if not task.labels:
            return Answer(f"{scores[0]:.2f}", None)
        odds = np.exp(scores - scores.max())
        odds /= odds.sum()
        best = int(odds.argmax())
        return Answer(task.labels[best], float(odds[best]))

    def encode(self, text: str) -> np.ndarray:
        """Hidden states of a text's tokens, (tokens, d_model) float32."""
        rows = encode_texts(self.model.tokenizer, [text], None, self.config)
        hidden = self._encode(self.params, rows.pad([0]))
        return np.asarray(hidden[0, : len(rows.ids[0])], np.float32)

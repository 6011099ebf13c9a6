"""Inference on texts: fill masks, classify, encode. Texts come in lists of any length."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ufbert.config import Device
from ufbert.data.encode import Encoded, encode_texts, uncut_ids
from ufbert.data.tokenizer import special_ids, special_names
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, TaskInfo, load_model
from ufbert.inference.engine import Dtype, Engine
from ufbert.runtime.device import use_device

MASK = "[MASK]"


class Guess(NamedTuple):
    """A token, as text, and its probability."""

    token: str
    probability: float


class Answer(NamedTuple):
    """A class and its probability; for regression the predicted value, without a probability."""

    label: str
    probability: float | None


class Predictor:
    """A loaded model; any number of threads may ask it at once.

    Its methods raise UserError for a question that the model's heads cannot answer, and for a text that is empty, not valid
    Unicode, or longer than the model reads (unless `truncate`).
    """

    def __init__(
        self,
        model: ModelFolder,
        dtype: Dtype = "float32",
        exact_routing: bool = False,
        mode: Literal["throughput", "latency"] = "throughput",
        truncate: bool = False,
    ) -> None:
        """Make a predictor of a loaded model folder.

        `dtype` is the type of the encoder's weights; bfloat16 and int8 need the native kernels. Trees route tokens by the
        rounded weights, or with `exact_routing` by the unrounded ones. Mode `throughput` computes many texts together,
        `latency` each by itself. With `truncate`, texts that are too long are cut.
        """
        self.engine = Engine(model, dtype, exact_routing, mode)
        self.config, self.tokenizer, self.task, self.heads = model.config, model.tokenizer, model.task, model.heads
        self.truncate = truncate
        self.mask_name, self.mask = special_names(model.tokenizer)[MASK], special_ids(model.tokenizer).mask

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: Dtype = "float32",
        threads: int = 0,
        exact_routing: bool = False,
        mode: Literal["throughput", "latency"] = "throughput",
        truncate: bool = False,
        device: Device = "auto",
    ) -> "Predictor":
        """Read a model folder, or `hf:OWNER/NAME` of the Hugging Face hub, one array at a time.

        `threads` limits the threads on a CPU. It and `device` count once in a process, before anything else uses jax.
        Compiled programs are kept in the user's cache. Raises UserError.
        """
        use_device(device, threads=threads)
        return cls(load_model(folder, lazily=True), dtype, exact_routing, mode, truncate)

    def fill_mask(self, texts: Sequence[str], top: int = 5) -> list[list[list[Guess]]]:
        """Return the `top` likeliest tokens, best first, for each [MASK] of each text."""
        if "masked_lm" not in self.heads:
            raise UserError(
                "This model folder has no masked-LM head; use the pretrained folder it was fine-tuned from."
            )
        for text in texts:
            if MASK not in text:
                raise UserError(f"The text {shown(text)} has no {MASK} to fill.")
        named = [text.replace(MASK, self.mask_name) for text in texts]
        rows = self.rows(named)
        positions = [[i for i, token in enumerate(ids) if token == self.mask] for ids in rows.ids]
        for text, as_named, masks in zip(texts, named, positions, strict=True):
            wanted = text.count(MASK)
            if len(masks) < wanted and uncut_ids(self.tokenizer, as_named).count(self.mask) < wanted:
                raise UserError(
                    f"The model's tokenizer does not find the {MASK} of {shown(text)} as a token; write blanks around it."
                )
            if len(masks) < wanted:
                raise UserError(f"The text {shown(text)} is too long, and a {MASK} of it was cut off. Shorten it.")
        logits = _finite(texts, self.engine.logits(rows, positions))
        return [[self._guesses(row, top) for row in of_text] for of_text in logits]

    def _guesses(self, logits: Float[np.ndarray, " v"], top: int) -> list[Guess]:
        probabilities = softmax(logits)
        best = np.argsort(-probabilities, kind="stable")[:top]
        return [Guess(self._written(int(i)), float(probabilities[i])) for i in best]

    def _written(self, number: int) -> str:
        """Return a token as text: decoded, or as the vocabulary has it if it decodes to a part of a character."""
        text = self.tokenizer.decode([number], skip_special_tokens=False).strip()
        return text if text and "\ufffd" not in text else self.tokenizer.id_to_token(number) or f"<id {number}>"

    def classify(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Answer]:
        """Classify each text, or each text together with the one at its place in `pairs`.

        A regression model answers with a value; one with a single independent score, with that score between 0 and 1.
        Raises UserError for labels that do not exclude each other (`label_probabilities` answers those).
        """
        task = self._task()
        if self.has_independent_labels:
            raise UserError("This model's labels do not exclude each other; ask for the probability of each of them.")
        if not task.labels:
            scores = self._scores(texts, pairs)
            values = [sigmoid(score) if task.independent else score for score in scores]
            return [Answer(f"{value[0]:.2f}", None) for value in values]
        probabilities = [softmax(score) for score in self._scores(texts, pairs)]
        return [Answer(task.labels[int(row.argmax())], float(row.max())) for row in probabilities]

    def label_probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict[str, float]]:
        """Return the probability of every label for each text, or each text together with the one at its place in `pairs`.

        They add up to 1, unless labels do not exclude each other.
        """
        task = self._task()
        if not task.labels:
            raise UserError("This model answers with a value, and has no labels.")
        link = sigmoid if task.independent else softmax
        probabilities = [link(score) for score in self._scores(texts, pairs)]
        return [dict(zip(task.labels, map(float, row), strict=True)) for row in probabilities]

    @property
    def has_independent_labels(self) -> bool:
        """True if several labels may hold for one text."""
        return self.task is not None and self.task.independent and bool(self.task.labels)

    def _task(self) -> TaskInfo:
        if self.task is None or "classifier" not in self.heads:
            raise UserError("This model folder has no classifier; fine-tune it first (finetune.py).")
        return self.task

    def _scores(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Float[np.ndarray, " c"]]:
        return _finite(texts, self.engine.scores(self.rows(texts, pairs))) if texts else []

    def encode(self, texts: Sequence[str]) -> list[Float[np.ndarray, "tokens d"]]:
        """Compute the hidden states of each text's tokens, from [CLS] to [SEP]."""
        return _finite(texts, self.engine.hidden(self.rows(texts)))

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Encoded:
        """Tokenize texts. Raises UserError for a text that is empty, too long or not valid Unicode."""
        for number, text in enumerate([*texts, *(pairs or ())], start=1):
            if not text.strip():
                raise UserError(f"Text {number} is empty.")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UserError(f"Text {number}, {shown(text)}, is not valid Unicode (was its file UTF-8?).") from None
        if pairs is not None and len(pairs) != len(texts):
            raise UserError(f"There are {len(texts)} texts and {len(pairs)} second texts.")
        rows = encode_texts(self.tokenizer, list(texts), None if pairs is None else list(pairs), self.config)
        if rows.truncated and not self.truncate:
            where = next(i for i, ids in enumerate(rows.ids) if len(ids) == rows.max_len)
            raise UserError(
                f"{rows.truncated} of {len(texts)} texts have more than the {rows.max_len} word pieces that this model reads; "
                f"the first may be {shown(texts[where])}. Shorten them, or have them cut (--truncate)."
            )
        return rows


def changed_routes(engine: Engine, model: ModelFolder, texts: Sequence[str]) -> float:
    """Measure the share of tokens, averaged over tree layers, whose path an engine's rounded weights change.

    Both paths start from the same hidden state. A model without trees has a share of 0.
    """
    rows, shares = encode_texts(model.tokenizer, list(texts), None, model.config), []
    for picks, batch in engine.batches(rows):
        changed = [float(layer.changed) for layer in engine.routing(model, batch)]
        shares.append((sum(changed) / max(1, len(changed)), sum(len(rows.ids[i]) for i in picks)))
    return sum(share * count for share, count in shares) / max(1, sum(count for _, count in shares))


def _finite(texts: Sequence[str], results: Iterable[Float[np.ndarray, "..."]]) -> list[Float[np.ndarray, "..."]]:
    """Return the results for each text. Raises UserError if any of them is not finite."""
    for text, numbers in zip(texts, results, strict=True):
        if not np.isfinite(numbers).all():
            raise UserError(
                f"What this model computes of the text {shown(text)} is no finite number: its weights have diverged "
                "in training or are damaged; use another model folder."
            )
    return list(results)


def softmax(logits: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """Probabilities from logits, in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def sigmoid(logits: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """1 / (1 + exp(-logit)), in float64."""
    return 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))


def shown(text: str) -> str:
    """Quote the beginning of a text, for a message."""
    return repr(text if len(text) <= 40 else text[:37] + "...")

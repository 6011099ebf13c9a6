"""Inference on texts: fill masks, classify, encode. One text gets an answer, a list of any length a list of answers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
from jaxtyping import Float

from ufbert.config import Device
from ufbert.data.encode import Encoded, encode_texts, uncut_ids
from ufbert.data.tokenizer import special_ids, special_names
from ufbert.errors import UserError
from ufbert.hub.folder import ModelFolder, TaskInfo, load_model
from ufbert.inference.engine import Dtype, Engine
from ufbert.inference.questions import Answers, OnError, Questions, picked, questions, text_fault
from ufbert.runtime.device import use_device

MASK = "[MASK]"
Pooled = Literal["mean", "cls", "pooler"]
NOT_FINITE = (
    "is given no finite number by this model, whose weights have diverged in training or are damaged; use another model "
    "folder"
)


class Guess(NamedTuple):
    """A token, as text, and its probability."""

    token: str
    probability: float


class Answer(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


Vectors = Float[np.ndarray, "tokens d"] | Float[np.ndarray, " d"]
Guesses = list[list[Guess]]
Raise = Literal["raise"]


class Predictor:
    """A loaded model; any number of threads may ask it at once.

    Its methods take a text or a list of texts. A text gets its answer, and a list gets a list of answers, in its order. A text
    has no answer if it is empty, not valid Unicode, or longer than the model reads (unless `truncate`), or if the model
    computes no finite numbers of it. With `on_error="raise"` the first such text raises BadText, a UserError. With
    `on_error="return"` the others are answered, and a Failure stands in the place of each such text.

    They raise UserError for a question that the model's heads cannot answer.
    """

    def __init__(
        self,
        model: ModelFolder,
        dtype: Dtype | Literal["auto"] = "auto",
        exact_routing: bool = False,
        mode: Literal["throughput", "latency"] = "throughput",
        truncate: bool = False,
    ) -> None:
        """Make a predictor of a loaded model folder.

        `dtype` is the type of the encoder's weights; bfloat16 and int8 need the native kernels. `auto` is int8 for a quantised
        folder where there are such kernels, and else float32. Trees route tokens by the
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
        dtype: Dtype | Literal["auto"] = "auto",
        threads: int = 0,
        exact_routing: bool = False,
        mode: Literal["throughput", "latency"] = "throughput",
        truncate: bool = False,
        device: Device = "auto",
        warm_up: bool | int = False,
    ) -> "Predictor":
        """Read a model folder, or `hf:OWNER/NAME` of the Hugging Face hub, one array at a time.

        `threads` limits the threads on a CPU. It and `device` count once in a process, before anything else uses jax.
        Compiled programs are kept in the user's cache. `warm_up` compiles ahead (`Predictor.warm_up`): True for all texts, a
        number for so many tokens. Raises UserError.
        """
        use_device(device, threads=threads)
        predictor = cls(load_model(folder, lazily=True), dtype, exact_routing, mode, truncate)
        if warm_up:
            predictor.warm_up(0 if warm_up is True else warm_up)
        return predictor

    def warm_up(self, most: int = 0) -> None:
        """Compile ahead, so that no later question waits for a compiler, whatever its length and number of texts.

        With `most`, only what at most so many tokens ask for is compiled: those of a text in mode `latency`, those of all texts
        of a question in mode `throughput`. A token is a word piece, [CLS] or [SEP]. Raises UserError for a negative number.
        """
        if most < 0:
            raise UserError(f"warm_up is {most}; it must be True, False or a number of tokens.")
        self.engine.warm_up(most)

    @overload
    def fill_mask(self, texts: str, top: int = 5, *, on_error: Raise = "raise") -> Guesses: ...
    @overload
    def fill_mask(self, texts: Sequence[str], top: int = 5, *, on_error: Raise = "raise") -> list[Guesses]: ...
    @overload
    def fill_mask(self, texts: str | Sequence[str], top: int = 5, *, on_error: OnError) -> Any: ...

    def fill_mask(self, texts: str | Sequence[str], top: int = 5, *, on_error: OnError = "raise") -> Any:
        """Return the `top` likeliest tokens, best first, for each [MASK] of a text."""
        if "masked_lm" not in self.heads:
            raise UserError(
                "This model folder has no masked-LM head; use the pretrained folder it was fine-tuned from."
            )
        asked = questions(texts)

        def compute(rows: Encoded) -> Any:
            return self.engine.logits(rows, [self._masks(ids) for ids in rows.ids])

        def guesses(logits: Float[np.ndarray, "k v"]) -> Guesses:
            return [self._guesses(row, top) for row in logits]

        named = asked._replace(texts=[text.replace(MASK, self.mask_name) for text in asked.texts])
        return self._ask(asked, on_error, compute, guesses, named, self._mask_fault)

    def _masks(self, ids: Sequence[int]) -> list[int]:
        return [i for i, token in enumerate(ids) if token == self.mask]

    def _mask_fault(self, text: str, ids: Sequence[int]) -> str:
        """Return why the masks of a text, tokenised to `ids`, cannot be filled, or an empty string."""
        wanted = text.count(MASK)
        if not wanted:
            return f"has no {MASK} to fill"
        if len(self._masks(ids)) >= wanted:
            return ""
        if uncut_ids(self.tokenizer, text.replace(MASK, self.mask_name)).count(self.mask) < wanted:
            return f"has a {MASK} that the model's tokenizer does not find as a token; write blanks around it"
        return f"is too long, and a {MASK} of it was cut off; shorten it"

    def _guesses(self, logits: Float[np.ndarray, " v"], top: int) -> list[Guess]:
        probabilities = softmax(logits)
        best = np.argsort(-probabilities, kind="stable")[:top]
        return [Guess(self._written(int(i)), float(probabilities[i])) for i in best]

    def _written(self, number: int) -> str:
        """Return a token as text: decoded, or as the vocabulary has it if it decodes to a part of a character."""
        text = self.tokenizer.decode([number], skip_special_tokens=False).strip()
        return text if text and "\ufffd" not in text else self.tokenizer.id_to_token(number) or f"<id {number}>"

    @overload
    def classify(
        self, texts: str, pairs: str | None = None, *, top: Literal[0] = 0, on_error: Raise = "raise"
    ) -> Answer | float: ...
    @overload
    def classify(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        top: Literal[0] = 0,
        on_error: Raise = "raise",
    ) -> list[Answer] | list[float]: ...
    @overload
    def classify(
        self, texts: str, pairs: str | None = None, *, top: int | None, on_error: Raise = "raise"
    ) -> list[Answer]: ...
    @overload
    def classify(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, top: int | None, on_error: Raise = "raise"
    ) -> list[list[Answer]]: ...
    @overload
    def classify(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        top: int | None = 0,
        on_error: OnError,
    ) -> Any: ...

    def classify(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        top: int | None = 0,
        on_error: OnError = "raise",
    ) -> Any:
        """Classify a text, or a text together with its second text, that at its place in `pairs`.

        The answer is the likeliest class. With `top` it is a list: the `top` likeliest, best first, or with None all of them. A
        regression model answers with a number; one with a single independent score, with that score between 0 and 1.

        Raises UserError for a model of pairs without `pairs`, or of single texts with them, and without `top` for labels that
        do not exclude each other.
        """
        task = self._task(pairs is not None)
        if top is not None and top < 0:
            raise UserError(f"top is {top}; it must be a number of classes, or None for all of them.")
        if not task.labels and top != 0:
            raise UserError("This model answers with a value, and has no classes for `top`.")
        if self.has_independent_labels and top == 0:
            raise UserError(
                "This model's labels do not exclude each other; ask for the probability of each of them (top=None, or "
                "label_probabilities)."
            )

        def answer(scores: Float[np.ndarray, " c"]) -> Any:
            if not task.labels:
                return float((sigmoid(scores) if task.independent else scores)[0])
            shares = self._shares(scores)
            ranked = [Answer(task.labels[i], float(shares[i])) for i in np.argsort(-shares, kind="stable")]
            return ranked[0] if top == 0 else ranked[:top]

        return self._ask(questions(texts, pairs), on_error, self.engine.scores, answer)

    @overload
    def label_probabilities(
        self, texts: str, pairs: str | None = None, *, on_error: Raise = "raise"
    ) -> dict[str, float]: ...
    @overload
    def label_probabilities(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, on_error: Raise = "raise"
    ) -> list[dict[str, float]]: ...
    @overload
    def label_probabilities(
        self, texts: str | Sequence[str], pairs: str | Sequence[str] | None = None, *, on_error: OnError
    ) -> Any: ...

    def label_probabilities(
        self, texts: str | Sequence[str], pairs: str | Sequence[str] | None = None, *, on_error: OnError = "raise"
    ) -> Any:
        """Return the probability of every label, in the order of the classes, for a text, or a text and its second text.

        They add up to 1, unless labels do not exclude each other. Raises UserError as `classify` does, and for a regression
        model.
        """
        task = self._task(pairs is not None)
        if not task.labels:
            raise UserError("This model answers with a value, and has no labels.")

        def answer(scores: Float[np.ndarray, " c"]) -> dict[str, float]:
            return dict(zip(task.labels, map(float, self._shares(scores)), strict=True))

        return self._ask(questions(texts, pairs), on_error, self.engine.scores, answer)

    def _shares(self, scores: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
        return sigmoid(scores) if self.has_independent_labels else softmax(scores)

    @property
    def has_independent_labels(self) -> bool:
        """True if several labels may hold for one text."""
        return self.task is not None and self.task.independent and bool(self.task.labels)

    def _task(self, is_on_pairs: bool) -> TaskInfo:
        """Return the model's task. Raises UserError if there is none, or if it is known not to be on such texts."""
        task = self.task
        if task is None or "classifier" not in self.heads:
            raise UserError("This model folder has no classifier; fine-tune it first (finetune.py).")
        if task.pairs is True and not is_on_pairs:
            raise UserError(
                f"This model's task ({task.name}) is on pairs of texts; give each text its second text, too."
            )
        if task.pairs is False and is_on_pairs:
            raise UserError(f"This model's task ({task.name}) is on single texts; give no second texts.")
        return task

    @overload
    def encode(self, texts: str, pooled: Pooled | None = None, *, on_error: Raise = "raise") -> Vectors: ...
    @overload
    def encode(
        self, texts: Sequence[str], pooled: Pooled | None = None, *, on_error: Raise = "raise"
    ) -> list[Vectors]: ...
    @overload
    def encode(self, texts: str | Sequence[str], pooled: Pooled | None = None, *, on_error: OnError) -> Any: ...

    def encode(self, texts: str | Sequence[str], pooled: Pooled | None = None, *, on_error: OnError = "raise") -> Any:
        """Compute the hidden states of a text's tokens, from [CLS] to [SEP], or with `pooled` a vector of the text.

        `mean` is the mean over all its tokens, [CLS] and [SEP] among them. `cls` is the hidden state of its first token.
        `pooler` is the output of the model's pooler, the layer below its classifier. Raises UserError if there is none.
        """
        if pooled not in (None, *get_args(Pooled)):
            raise UserError(f"pooled is {pooled!r}; it must be None, {' or '.join(map(repr, get_args(Pooled)))}.")
        if pooled == "pooler" and "pooler" not in self.engine.heads:
            raise UserError("This model folder has no pooler; ask for pooled='mean' or 'cls'.")

        def compute(rows: Encoded) -> Any:
            if pooled is None:
                return self.engine.hidden(rows)
            pooling = {"mean": "mean", "cls": "first", "pooler": self.config.pooling}[pooled]
            vectors = self.engine.pooled(rows, pooling)
            return list(self.engine.head("pooler", vectors) if pooled == "pooler" else vectors)

        return self._ask(questions(texts), on_error, compute, lambda vectors: vectors)

    def _ask(
        self,
        asked: Questions,
        on_error: OnError,
        compute: Callable[[Encoded], Any],
        answer: Callable[[Any], Any],
        named: Questions | None = None,
        check: Callable[[str, Sequence[int]], str] = lambda text, ids: "",
    ) -> Any:
        """Answer the texts that can be answered: tokenise them, compute an array of each, and make its answer.

        `named` are the texts as the tokenizer reads them, if it reads others. `check` says what is wrong with a text, given its
        ids, or nothing.
        """
        answers, named = Answers(asked, on_error), named or asked
        answers.refuse(lambda _, i: text_fault(asked.texts[i], asked.pair(i)))
        if not answers.open:
            return answers.close([])
        pairs = None if named.pairs is None else [named.pairs[i] for i in answers.open]
        rows = encode_texts(self.tokenizer, [named.texts[i] for i in answers.open], pairs, self.config)
        if rows.truncated and not self.truncate:
            kept = answers.refuse(lambda n, i: self._length_fault(named, i) if len(rows.ids[n]) == rows.max_len else "")
            rows = picked(rows, kept)
        rows = picked(rows, answers.refuse(lambda n, i: check(asked.texts[i], rows.ids[n])))
        arrays = compute(rows) if answers.open else []
        finite = answers.refuse(lambda n, _: "" if np.isfinite(arrays[n]).all() else NOT_FINITE)
        return answers.close([answer(arrays[n]) for n in finite])

    def _length_fault(self, named: Questions, i: int) -> str:
        """Return why a text or pair that fills a row is too long, or an empty string if it just fits."""
        limit = self.config.only_len or self.config.max_len
        n = len(uncut_ids(self.tokenizer, named.texts[i], named.pair(i)))
        if n <= limit:
            return ""
        way_out = "shorten it, or have it cut (--truncate; truncate=True in Python)"
        return f"has more than the {limit} word pieces that this model reads ({n}); {way_out}"


def changed_routes(engine: Engine, model: ModelFolder, texts: Sequence[str]) -> float:
    """Measure the share of tokens, averaged over tree layers, whose path an engine's rounded weights change.

    Both paths start from the same hidden state. A model without trees has a share of 0.
    """
    return changed_shares(engine, model, encode_texts(model.tokenizer, list(texts), None, model.config))


def changed_shares(engine: Engine, model: ModelFolder, rows: Encoded) -> float:
    """Measure what `changed_routes` does on encoded texts."""
    shares = []
    for picks, batch in engine.batches(rows):
        changed = [float(layer.changed) for layer in engine.routing(model, batch)]
        shares.append((sum(changed) / max(1, len(changed)), sum(len(rows.ids[i]) for i in picks)))
    return sum(share * count for share, count in shares) / max(1, sum(count for _, count in shares))


def softmax(logits: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """Probabilities from logits, in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def sigmoid(logits: Float[np.ndarray, " c"]) -> Float[np.ndarray, " c"]:
    """1 / (1 + exp(-logit)), in float64."""
    return 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))

"""Sample answers of a finished run: what its model takes for likely at a masked word of held-out text."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from ufbert import nn
from ufbert.config import RunConfig
from ufbert.data.prepared import PreparedData
from ufbert.data.tokenizer import SpecialIds, special_ids
from ufbert.errors import UserError, first_line
from ufbert.hub.folder import load_model
from ufbert.pretrain.step import document_segments
from ufbert.runtime.console import say
from ufbert.runtime.run_folder import Guess, Sample, write_samples

ROWS = 5
"""Held-out rows that are asked about, a word of each."""
GUESSES = 3
"""Word pieces that are kept of a word."""
WINDOW = 12
"""Tokens that are shown on either side of the word. The model sees all of the row."""


def write_guesses(folder: Path, run: RunConfig, data: PreparedData) -> None:
    """Ask the model of a finished run, and write samples.json into its folder. What fails is said, and costs nothing else."""
    try:
        write_samples(folder, guesses(run, load_model(folder / "model").params, data))
    except (UserError, RuntimeError, MemoryError) as error:
        say(f"no sample answers: {first_line(error)}")


def guesses(run: RunConfig, params: nn.Params, data: PreparedData) -> list[Sample]:
    """Mask a word of each of the first held-out rows, and return the likeliest word pieces for it."""
    special, words = special_ids(data.tokenizer), data.tokenizer
    rows = np.array(data.heldout_sample(run.data.eval_rows)[:ROWS], np.int32)
    places = np.array([_word_at(words, special, row) for row in rows], np.int32)
    masked = rows.copy()
    masked[np.arange(len(rows)), places] = special.mask
    shares, pieces = jax.jit(partial(_likeliest, run, special))(params, masked, places)
    samples = []
    for i, place in enumerate(places):
        likely = zip(np.asarray(pieces[i]), np.asarray(shares[i]), strict=True)
        best = [Guess(words.decode([int(piece)]), round(float(share), 4)) for piece, share in likely]
        samples.append(
            Sample(_around(words, special, masked[i], int(place)), words.decode([int(rows[i, place])]), best)
        )
    return samples


def _likeliest(
    run: RunConfig, special: SpecialIds, params: Any, ids: Int[Array, "b t"], places: Int[Array, " b"]
) -> tuple[Float[Array, "b g"], Int[Array, "b g"]]:
    """Return the largest probabilities at a place of each row, and their word pieces."""
    hidden, _ = nn.encode(params, run.model, ids, document_segments(run, special, ids))
    picked = jnp.take_along_axis(hidden, places[:, None, None], axis=1)[:, 0]
    logits = nn.masked_lm_logits(params, run.model, picked).astype(jnp.float32)
    shares, pieces = jax.lax.top_k(jax.nn.softmax(logits), GUESSES)
    return shares, pieces


def _word_at(words: Tokenizer, special: SpecialIds, row: Int[np.ndarray, " t"]) -> int:
    """Return the place of the first long word after the middle of a row; the middle itself if there is none."""
    middle = len(row) // 2
    for place in [*range(middle, len(row)), *range(middle)]:
        piece, after = (words.id_to_token(int(token)) or "" for token in (row[place], row[(place + 1) % len(row)]))
        if row[place] not in special and piece.isalpha() and len(piece) > 3 and not after.startswith("##"):
            return place
    return middle


def _around(words: Tokenizer, special: SpecialIds, row: Int[np.ndarray, " t"], place: int) -> str:
    """Write the tokens around a place, as far as its document goes."""
    ends = [i for i, token in enumerate(row) if token in (special.cls, special.sep, special.pad) and i != place]
    start = max([i + 1 for i in ends if i < place], default=0)
    stop = min([i for i in ends if i > place], default=len(row))
    low, high = max(start, place - WINDOW), min(stop, place + WINDOW + 1)
    while low < place and (words.id_to_token(int(row[low])) or "").startswith("##"):  # the rest of a word
        low += 1
    text = words.decode([int(token) for token in row[low:high]], skip_special_tokens=False)
    return f"{'... ' if low > start else ''}{text}{' ...' if high < stop else ''}"

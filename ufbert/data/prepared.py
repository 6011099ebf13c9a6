"""A prepared folder: packed rows of ids, the tokenizer they were made with, and a manifest that says where all came from.

Every document is `[CLS] text [SEP]`; documents lie end to end, cut into rows of `seq_len` ids. Because each document begins
with [CLS], document boundaries can be recomputed from the ids, and nothing else is stored. The folder holds `tokenizer.json`,
shards `train-00000.bin`, ... and `heldout-00000.bin`, ... (see `shards.py`) and `manifest.json`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from tokenizers import Tokenizer

from ufbert.config import DataConfig
from ufbert.data.shards import Rows, Shard, verify
from ufbert.data.tokenizer import fingerprint
from ufbert.errors import UserError
from ufbert.runtime.typed import Count, convert, decode, read_whole

DATA_FORMAT = 3
"""Version of the prepared folder; one of another version is prepared anew."""
RUNS_ONLY = 2
"""The version before, of smaller alphabets: a run that has begun with such rows goes on with them, a new one does not."""


@dataclass(frozen=True)
class Recipe:
    """The options that shape the rows; with the corpus they determine every byte of a prepared folder."""

    seq_len: int
    max_tokens: int
    vocab_size: int
    """Of the tokenizer that is trained; 0 if one is given."""
    tokenizer_chars: int
    tokenizer_sha256: str
    """Of the tokenizer that is given, or empty."""
    filter_worst: float
    drop_exact: bool
    near_window: int
    """0 if near duplicates stay."""
    near_threshold: float
    order: str

    @staticmethod
    def of(data: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> "Recipe":
        """The recipe of a configuration. Options without effect are zeroed, so that they do not tell equal data apart."""
        return Recipe(
            seq_len=data.seq_len,
            max_tokens=data.max_tokens,
            vocab_size=0 if tokenizer else vocab_size,
            tokenizer_chars=0 if tokenizer else data.tokenizer_chars,
            tokenizer_sha256=fingerprint(tokenizer) if tokenizer else "",
            filter_worst=data.filter_worst,
            drop_exact=data.drop_exact,
            near_window=data.near_window if data.drop_near else 0,
            near_threshold=data.near_threshold if data.drop_near else 0.0,
            order=data.order,
        )


@dataclass(frozen=True)
class Manifest:
    """The origin of a prepared folder, and what it holds."""

    format_version: int
    corpus: str
    """The corpus as `--corpus` names it."""
    licence: str
    source: dict[str, Any]
    """The corpus's identity (`corpora.Source`) when it was read."""
    recipe: Recipe
    """The options that shaped the rows."""
    exhausted: bool
    """The corpus was read to its end, not only to `max_tokens`."""
    documents_read: Count
    characters_read: Count
    removed: dict[str, dict[str, int | float]]
    """By step of cleaning, in order: documents, characters and share_of_characters that it took away."""
    tokens_read: Count
    """Ids of what was left before the worst documents were taken out: what `max_tokens` bounds."""
    documents: Count
    """Documents kept, training and held-out."""
    tokens: Count
    """Ids of the documents kept, [CLS] and [SEP] included."""
    seq_len: Annotated[int, Meta(ge=1, le=2**20)]
    vocab_size: Annotated[int, Meta(ge=1, le=2**16)]
    """The tokenizer's largest id plus one."""
    unknown_share: Annotated[float, Meta(ge=0, le=1)]
    """Share of the text's characters that are lost to [UNK], by every 50th document read."""
    tokenizer_sha256: str
    train: list[Shard]
    heldout: list[Shard]

    def write(self, folder: Path) -> None:
        """Put it into a folder whose other files are complete."""
        (folder / "manifest.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @property
    def train_rows(self) -> int:
        return sum(shard.rows for shard in self.train)

    @property
    def heldout_rows(self) -> int:
        return sum(shard.rows for shard in self.heldout)

    @property
    def fingerprint(self) -> str:
        """A hash of the rows and the tokenizer: equal for equal bytes, wherever and whenever they were prepared."""
        shards = [[asdict(shard) for shard in part] for part in (self.train, self.heldout)]
        facts = [self.format_version, self.seq_len, self.tokenizer_sha256, *shards]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, opened; rows stay on disk until they are taken."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: Rows
    heldout: Rows

    def heldout_sample(self, n: int) -> np.ndarray:
        """At most `n` held-out rows, spread evenly, as int32 (rows, seq_len)."""
        count = min(n, len(self.heldout))
        return self.heldout.take(np.linspace(0, len(self.heldout) - 1, count).round().astype(int))

    def unigram_log_probs(self) -> np.ndarray:
        """log p(token), natural, with add-one training frequencies over the vocabulary: (vocab,) float64."""
        counts = np.zeros(self.manifest.vocab_size, np.int64)
        for block in self.train.blocks():
            counts += np.bincount(block.reshape(-1), minlength=len(counts))
        return np.log((counts + 1) / (counts.sum() + len(counts)))


@dataclass(frozen=True)
class _Stamp:
    format_version: int | None = None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder. Raises UserError if there is none of this version or the one before."""
    path = folder / "manifest.json"
    try:
        data = read_whole(path)
        version = decode(data, _Stamp, str(path)).format_version
        if version == DATA_FORMAT:
            return decode(data, Manifest, str(path), exact=True)
        if version == RUNS_ONLY:  # it did not say how much is lost to [UNK]
            values = decode(data, dict[str, Any], str(path)) | {"unknown_share": 0.0}
            return convert(values, Manifest, str(path), exact=True)
    except UserError as error:
        raise UserError(f"{folder} does not hold prepared data: {error}") from error
    raise UserError(f"{folder} holds prepared data of another version; delete it to prepare the data anew.")


def open_prepared(folder: Path) -> PreparedData:
    """Open a prepared folder after reading all of it once to compare the checksums, at about a gigabyte a second and core.

    Raises UserError if a file is missing, cut short or damaged.
    """
    manifest = read_manifest(folder)
    train, heldout = manifest.train, manifest.heldout
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder} does not hold prepared data: {error}.") from error
    if fingerprint(tokenizer) != manifest.tokenizer_sha256:
        raise UserError(f"{folder}/tokenizer.json is not the tokenizer these rows were made with; delete the folder.")
    rows = [Rows(folder, shards, manifest.seq_len) for shards in (train, heldout)]
    verify(folder, [*train, *heldout])
    return PreparedData(folder, manifest, tokenizer, *rows)

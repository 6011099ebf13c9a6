"""A prepared folder: packed rows of ids, the tokenizer they were made with, and a manifest that says where all came from.

Every document is `[CLS] text [SEP]`; documents lie end to end, cut into rows of `seq_len` ids. Because each document begins
with [CLS], document boundaries can be recomputed from the ids, and nothing else is stored. The folder holds `tokenizer.json`,
shards `train-00000.bin`, ... and `heldout-00000.bin`, ... (see `shards.py`) and `manifest.json`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

import numpy as np
from tokenizers import Tokenizer

from ufbert.data.shards import Rows, Shard, verify
from ufbert.data.tokenizer import fingerprint
from ufbert.errors import UserError

DATA_FORMAT = 3
"""Version of the prepared folder; one of another version is prepared anew."""
RUNS_ONLY = 2
"""The version before, of smaller alphabets: a run that has begun with such rows goes on with them, a new one does not."""


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder was made from, and what it holds."""

    format_version: int
    corpus: str
    """What was asked for, as `--corpus` names it."""
    licence: str
    source: dict[str, Any]
    """The corpus's identity (`corpora.Source`) when it was read."""
    recipe: dict[str, Any]
    """The options that shaped the rows (`prepare.Recipe`)."""
    exhausted: bool
    """The corpus was read to its end, not only to `max_tokens`."""
    documents_read: int
    characters_read: int
    removed: dict[str, dict[str, Any]]
    """By step of cleaning, in order: documents, characters and share_of_characters that it took away."""
    tokens_read: int
    """Ids of what was left before the worst documents were taken out: what `max_tokens` bounds."""
    documents: int
    """Documents kept, training and held-out."""
    tokens: int
    """Ids of the documents kept, [CLS] and [SEP] included."""
    seq_len: int
    vocab_size: int
    """The tokenizer's largest id plus one."""
    unknown_share: float
    """Share of the text's characters that are lost to [UNK], by every 50th document read."""
    tokenizer_sha256: str
    train: list[dict[str, Any]]
    """The shards (`shards.Shard`): name, rows, sha256."""
    heldout: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Put it into a folder whose other files are complete."""
        (folder / "manifest.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @property
    def train_rows(self) -> int:
        return sum(shard["rows"] for shard in self.train)

    @property
    def heldout_rows(self) -> int:
        return sum(shard["rows"] for shard in self.heldout)

    @property
    def fingerprint(self) -> str:
        """A hash of the rows and the tokenizer: equal for equal bytes, wherever and whenever they were prepared."""
        facts = [self.format_version, self.seq_len, self.tokenizer_sha256, self.train, self.heldout]
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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder. Raises UserError if there is none of this version or the one before."""
    try:
        values: Any = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if values.get("format_version") == RUNS_ONLY:  # it did not say how much is lost to [UNK]
            values.setdefault("unknown_share", 0.0)
        elif values.get("format_version") != DATA_FORMAT:
            raise UserError(f"{folder} holds prepared data of another version; delete it to prepare the data anew.")
        manifest = Manifest(**values)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} does not hold prepared data: {error}.") from error
    kinds = {field.name: get_origin(field.type) or field.type for field in fields(Manifest)}
    wrong = [name for name, kind in kinds.items() if not _is_a(kind, values[name])]
    wrong += [
        f"recipe.{name}"
        for name in ("max_tokens", "vocab_size")
        if not wrong and not _is_a(int, manifest.recipe.get(name))
    ]
    wrong += ["unknown_share"] if not wrong and not 0.0 <= manifest.unknown_share <= 1.0 else []
    wrong += ["a shard"] if not wrong and not all(map(_is_shard, manifest.train + manifest.heldout)) else []
    if wrong:
        raise UserError(f"{folder} does not hold prepared data: {', '.join(wrong)} in its manifest makes no sense.")
    return manifest


def _is_a(kind: Any, value: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_shard(value: Any) -> bool:
    """Whether a manifest's entry names a file of its own folder, its rows and its checksum."""
    kinds = {"name": str, "rows": int, "sha256": str}
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        return False
    return all(_is_a(kind, value[name]) for name, kind in kinds.items()) and Path(value["name"]).name == value["name"]


def open_prepared(folder: Path) -> PreparedData:
    """Open a prepared folder after reading all of it once to compare the checksums, at about a gigabyte a second and core.

    Raises UserError if a file is missing, cut short or damaged.
    """
    manifest = read_manifest(folder)
    train, heldout = ([Shard(**shard) for shard in part] for part in (manifest.train, manifest.heldout))
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder} does not hold prepared data: {error}.") from error
    if fingerprint(tokenizer) != manifest.tokenizer_sha256:
        raise UserError(f"{folder}/tokenizer.json is not the tokenizer these rows were made with; delete the folder.")
    rows = [Rows(folder, shards, manifest.seq_len) for shards in (train, heldout)]
    verify(folder, [*train, *heldout])
    return PreparedData(folder, manifest, tokenizer, *rows)

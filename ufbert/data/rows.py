"""Packed rows: every document as `[CLS] text [SEP]`, documents end to end, cut into rows of `seq_len` ids.

A prepared folder holds `tokenizer.json`, `train.bin` and `heldout.bin` (2-byte ids, row after row) and `manifest.json`.
Held out is every 50th document (up to a million tokens), or the last rows if the corpus has fewer documents. Because each
document begins with [CLS], document boundaries can be recomputed from the ids, and nothing else is stored.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ufbert.data.corpora import Corpus
from ufbert.data.tokenizer import fingerprint, special_ids, train_wordpiece
from ufbert.errors import UserError

HELDOUT_EVERY = 50
HELDOUT_TOKENS = 1_000_000
_BATCH = 512


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder was made from, and how much it holds."""

    corpus: str
    licence: str
    seq_len: int
    vocab_size: int
    """Tokens in the tokenizer."""
    documents: int
    train_rows: int
    heldout_rows: int
    tokenizer_sha256: str
    train_sha256: str
    heldout_sha256: str


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder, opened: rows are memory-mapped (rows, seq_len) arrays of ids."""

    manifest: Manifest
    tokenizer: Tokenizer
    train: np.ndarray
    heldout: np.ndarray

    def heldout_sample(self, n: int) -> np.ndarray:
        """At most `n` held-out rows, spread evenly, as int32 (rows, seq_len)."""
        count = min(n, len(self.heldout))
        picks = np.linspace(0, len(self.heldout) - 1, count).round().astype(int)
        return self.heldout[picks].astype(np.int32)

    def unigram_log_probs(self) -> np.ndarray:
        """log p(token), natural, with add-one training frequencies over the vocabulary: (vocab,) float64."""
        counts = np.zeros(self.manifest.vocab_size, np.int64)
        for start in range(0, len(self.train), 65536):
            counts += np.bincount(self.train[start : start + 65536].reshape(-1), minlength=len(counts))
        return np.log((counts + 1) / (counts.sum() + len(counts)))


class _RowFile:
    """Appends token lists to a file of whole rows; the tail that does not fill a row is dropped."""

    def __init__(self, path: Path, seq_len: int) -> None:
        self.path, self.seq_len, self.rows = path, seq_len, 0
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._left = np.zeros(0, np.uint16)

    def append(self, ids: list[int]) -> None:
        joined = np.concatenate([self._left, np.asarray(ids, np.uint16)])
        whole = len(joined) // self.seq_len
        block = joined[: whole * self.seq_len].tobytes()
        self._file.write(block)
        self._digest.update(block)
        self._left = joined[whole * self.seq_len :]
        self.rows += whole

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


def prepare(
    corpus: Corpus,
    folder: Path,
    *,
    vocab_size: int,
    seq_len: int,
    max_tokens: int,
    tokenizer_chars: int,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> PreparedData:
    """Train a tokenizer on the corpus (unless one is given) and write the packed rows, whole or not at all.

    `max_tokens` bounds the training tokens read (0: no bound). `progress` gets a line now and then. Raises UserError for
    an empty corpus, one too small for a single row, or a disk that refuses.
    """
    scratch = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        if tokenizer is None:
            progress(f"training a WordPiece tokenizer of {vocab_size} tokens")
            tokenizer = train_wordpiece(_first_chars(corpus.documents(), tokenizer_chars), vocab_size)
        tokenizer.save(str(scratch / "tokenizer.json"))
        manifest = _write_rows(corpus, tokenizer, scratch, seq_len, max_tokens, progress)
        (scratch / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(scratch, folder)
    except OSError as error:
        raise UserError(f"Cannot write prepared data at {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_prepared(folder)


def open_prepared(folder: Path) -> PreparedData:
    """Open a folder that `prepare` wrote. Raises UserError if it is incomplete or a file was cut short."""
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        train = _open_rows(folder / "train.bin", manifest.train_rows, manifest.seq_len)
        heldout = _open_rows(folder / "heldout.bin", manifest.heldout_rows, manifest.seq_len)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{folder} does not hold prepared data: {error}.") from error
    if fingerprint(tokenizer) != manifest.tokenizer_sha256:
        raise UserError(f"{folder}/tokenizer.json is not the tokenizer these rows were made with.")
    return PreparedData(manifest, tokenizer, train, heldout)


def _open_rows(path: Path, rows: int, seq_len: int) -> np.ndarray:
    if path.stat().st_size != rows * seq_len * 2:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes instead of {rows * seq_len * 2}; prepare the data anew."
        )
    return np.memmap(path, np.uint16, "r", shape=(rows, seq_len))


def _first_chars(documents: Iterator[str], limit: int) -> Iterator[str]:
    for document in documents:
        yield document
        limit -= len(document)
        if limit <= 0:
            return


def _write_rows(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    seq_len: int,
    max_tokens: int,
    progress: Callable[[str], None],
) -> Manifest:
    ids = special_ids(tokenizer)
    tokenizer.encode_special_tokens = True  # a "[MASK]" in the text is text
    train, heldout = (_RowFile(folder / name, seq_len) for name in ("train.bin", "heldout.bin"))
    documents = corpus.documents()
    count = 0
    while batch := list(itertools.islice(documents, _BATCH)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            count += 1
            held = count % HELDOUT_EVERY == 0 and heldout.tokens < HELDOUT_TOKENS
            (heldout if held else train).append([ids.cls, *encoding.ids, ids.sep])
        progress(f"packed {count:,} documents, {train.tokens / 1e6:,.1f} M tokens")
        if max_tokens and train.tokens >= max_tokens:
            break
    tokenizer.encode_special_tokens = False
    digests = [train.close(), heldout.close()]
    if train.rows + heldout.rows < 2:
        what = "is empty" if count == 0 else f"has too little text for two rows of {seq_len} tokens"
        raise UserError(f"The corpus {corpus.spec} {what}.")
    if heldout.rows == 0:
        digests = _split_tail(train, heldout)
    return Manifest(
        corpus=corpus.spec,
        licence=corpus.licence,
        seq_len=seq_len,
        vocab_size=tokenizer.get_vocab_size(),
        documents=count,
        train_rows=train.rows,
        heldout_rows=heldout.rows,
        tokenizer_sha256=fingerprint(tokenizer),
        train_sha256=digests[0],
        heldout_sha256=digests[1],
    )


def _split_tail(train: _RowFile, heldout: _RowFile) -> list[str]:
    """Move the last fiftieth of the training rows, at least one, to the held-out file."""
    n = max(1, train.rows // HELDOUT_EVERY)
    cut = (train.rows - n) * train.seq_len * 2
    tail = train.path.read_bytes()[cut:]
    heldout.path.write_bytes(tail)
    with train.path.open("r+b") as file:
        file.truncate(cut)
    train.rows, heldout.rows = train.rows - n, n
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (train.path, heldout.path)]

"""Prepare a corpus for training, in two passes and bounded memory.

Pass 1 reads the documents once. It drops exact duplicates, tokenises the rest on all cores while the next ones are read,
drops near duplicates, and appends what is left to a file of ids. Pass 2 knows every document's tokens per character. It
drops the worst share, holds out every 50th of the remaining documents (up to a million tokens; the last rows if they are too
few; none if the held-out text is one of its own), and packs the others into shards, in the order of the corpus or best first.

Resident memory, apart from Python and the tokenizer: 8 to 24 bytes for each document read (exact duplicates), 390 MB for a
window of a million documents (near duplicates), and up to 60 bytes for each document kept (order). Disk: twice the finished
rows.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from ufbert.data.clean import ExactFilter, NearFilter, Removal, Tally, tokens_per_character, worst
from ufbert.data.corpora import Corpus, source_of
from ufbert.data.prepared import DATA_FORMAT, Manifest, PreparedData, Recipe, open_prepared
from ufbert.data.shards import RowWriter, Shard
from ufbert.data.spool import DocumentStore, Spans
from ufbert.data.text_files import Progress
from ufbert.data.tokenizer import (
    SpecialIds,
    fingerprint,
    library_errors,
    special_ids,
    train_wordpiece,
    unknown_characters,
    vocabulary_size,
)
from ufbert.errors import UserError
from ufbert.runtime.console import phase
from ufbert.runtime.files import private_folder, publish

HELDOUT_EVERY = 50
HELDOUT_TOKENS = 1_000_000
SAMPLE_CHARS = 20_000
"""Characters of every 50th document in which [UNK] is counted."""
_BATCH_DOCUMENTS, _BATCH_CHARS = 1024, 4_000_000

EXACT, NEAR, EMPTY, WORST = "exact duplicates", "near duplicates", "documents without tokens", "worst quality"
"""Names of the steps of cleaning."""

Say = Callable[[str], None]


def prepare(
    corpus: Corpus,
    folder: Path,
    recipe: Recipe,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Say = lambda line: None,
    say: Say = lambda line: None,
) -> PreparedData:
    """Write a prepared folder, whole or not at all, and open it. If another process writes it first, that one is opened.

    Without a `tokenizer`, one is trained on the corpus. `progress` gets a line whenever there is news, `say` one for each
    step of cleaning. Raises UserError if the corpus is too small for two rows, if it fails or changes while it is read, or if
    the disk refuses.
    """
    try:
        with private_folder(folder.parent) as scratch:
            tokenizer = tokenizer or _train_tokenizer(corpus, recipe)
            tokenizer.no_truncation()  # a caller's may truncate or pad
            tokenizer.no_padding()
            (scratch / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            manifest = _write_rows(corpus, tokenizer, recipe, scratch, progress, say)
            _check_unchanged(corpus)
            manifest.write(scratch)
            publish(scratch, folder)
    except OSError as error:
        raise UserError(
            f"Cannot write prepared data at {folder}: {error.strerror or error}; name another place with --prepared FOLDER."
        ) from error
    return open_prepared(folder)


def _check_unchanged(corpus: Corpus) -> None:
    """Raise UserError if a file of the corpus differs from what it was. A file that has vanished does not matter."""
    now = source_of(corpus.spec)["files"] if corpus.source else None
    if now is not None and now != corpus.source["files"]:
        raise UserError(f"The corpus {corpus.spec} changed while it was being read; start again when it is complete.")
    if corpus.heldout is not None:
        _check_unchanged(corpus.heldout)


def _train_tokenizer(corpus: Corpus, recipe: Recipe) -> Tokenizer:
    def sample() -> Iterator[str]:
        left = recipe.tokenizer_chars
        for batch in _batches(corpus.documents(), ExactFilter() if recipe.drop_exact else None):
            for text in batch.texts:
                yield text
                left -= len(text)
                if left <= 0:
                    return

    with phase(f"training a tokenizer of {recipe.vocab_size:,} word pieces"):
        return train_wordpiece(sample(), recipe.vocab_size)


class _Batch(NamedTuple):
    """Documents that were read together."""

    texts: list[str]
    """Without exact duplicates."""
    documents: int
    characters: int
    """All that were read, duplicates included."""
    repeated: Removal


def _batches(documents: Iterator[str], exact: ExactFilter | None) -> Iterator[_Batch]:
    """Cut documents into batches of bounded number and size, and drop exact duplicates."""
    texts: list[str] = []
    size = 0
    for text in chain(documents, [None]):  # None flushes the last batch
        if texts and (text is None or len(texts) == _BATCH_DOCUMENTS or size + len(text) > _BATCH_CHARS):
            new = exact.new(texts) if exact else [True] * len(texts)
            fresh = [text for text, is_new in zip(texts, new, strict=True) if is_new]
            yield _Batch(fresh, len(texts), size, Removal(len(texts) - len(fresh), size - sum(map(len, fresh))))
            texts, size = [], 0
        if text is not None:
            texts.append(text)
            size += len(text)


def _encoded(batches: Iterator[_Batch], tokenizer: Tokenizer) -> Iterator[tuple[_Batch, list[Encoding]]]:
    """Tokenise every batch. The next one is tokenised while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool, library_errors("A document"):
        waiting: tuple[_Batch, Future[list[Encoding]]] | None = None
        for batch in batches:
            future = pool.submit(tokenizer.encode_batch_fast, batch.texts, add_special_tokens=False)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = batch, future
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _collect(
    corpus: Corpus,
    tokenizer: Tokenizer,
    store: DocumentStore,
    most: int,
    progress: Say,
    exact: ExactFilter | None,
    near: NearFilter | None,
) -> tuple[Tally, bool]:
    """Run pass 1, which fills the store with about `most` tokens (0: with all).

    Returns the counts, and true if the corpus was read to its end.
    """  # fmt: skip
    special = special_ids(tokenizer)
    tally, bar = Tally(), Progress(corpus.meter, most)
    tally.removed = {EXACT: Removal()} if exact else {}
    tally.removed |= {NEAR: Removal()} if near else {}
    for batch, encodings in _encoded(_batches(corpus.documents(), exact), tokenizer):
        tally.add(batch.documents, batch.characters)
        tally.remove(EXACT, batch.repeated)
        # Characters lost to [UNK] are counted in a sample: a tokenizer of the wrong script shows at once.
        sample = [text[:SAMPLE_CHARS] for text in batch.texts[::HELDOUT_EVERY]]
        unknown, sampled = unknown_characters(tokenizer, sample, special.unk)
        tally.unknown, tally.sampled = tally.unknown + unknown, tally.sampled + sampled
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.uint16, int(lengths.sum()))
        characters = np.fromiter(map(len, batch.texts), np.int64, len(batch.texts))
        kept = lengths > 0  # `ids` needs no mask: an empty document has none
        tally.remove(EMPTY, Removal.of(characters[~kept]))
        lengths, characters = lengths[kept], characters[kept]
        if near and len(lengths):
            kept = near.new(ids, lengths)
            tally.remove(NEAR, Removal.of(characters[~kept]))
            ids, lengths, characters = ids[np.repeat(kept, lengths)], lengths[kept], characters[kept]
        store.append(_wrapped(ids, lengths, special), lengths + 2, characters)
        progress(bar.line(tally.documents, store.tokens))
        if most and store.tokens >= most:
            return tally, False
    return tally, True


def _wrapped(ids: np.ndarray, lengths: np.ndarray, special: SpecialIds) -> np.ndarray:
    """Write every document as `[CLS] ids [SEP]`, end to end, (total,) uint16."""
    wrapped = np.empty(len(ids) + 2 * len(lengths), np.uint16)
    ends = np.cumsum(lengths + 2)
    text = np.ones(len(wrapped), bool)
    text[ends - 1] = text[ends - lengths - 2] = False
    wrapped[ends - 1], wrapped[ends - lengths - 2] = special.sep, special.cls
    wrapped[text] = ids
    return wrapped


def _write_rows(
    corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe, folder: Path, progress: Say, say: Say
) -> Manifest:
    """Run both passes. Writes the shards into `folder` and returns the manifest."""
    if vocabulary_size(tokenizer) > 65536:
        raise UserError(
            f"The tokenizer has ids up to {vocabulary_size(tokenizer) - 1:,}; they are stored in 2 bytes: up to 65,535. "
            "Take a smaller one."
        )
    path = folder / "documents.ids"
    store, held = DocumentStore(path), DocumentStore(folder / "heldout.ids")
    exact = ExactFilter() if recipe.drop_exact else None
    near = NearFilter(recipe.near_window, recipe.near_threshold) if recipe.near_window else None
    tokenizer.encode_special_tokens = True  # a "[MASK]" in the text is text
    try:
        if corpus.heldout is not None:
            # Read first, so that the filters know its documents and drop them from the corpus.
            _collect(corpus.heldout, tokenizer, held, 0, progress, exact, near)
        tally, exhausted = _collect(corpus, tokenizer, store, recipe.max_tokens, progress, exact, near)
        spans, characters = store.finish()
        bad = worst(spans.lengths - 2, characters, recipe.filter_worst)  # without [CLS] and [SEP]
        if recipe.filter_worst:
            tally.removed[WORST] = Removal.of(characters[bad])
        for line in tally.report():
            say(line)
        kept, characters = spans.pick(~bad), characters[~bad]
        documents, tokens = len(kept.lengths), kept.tokens
        if tokens < 2 * recipe.seq_len:
            fault = "has too little text" if tally.documents else "is empty, or has too little text"
            raise UserError(f"The corpus {corpus.spec} {fault} for two rows of {recipe.seq_len} tokens.")
        train, heldout = _split(kept, characters, recipe, held if corpus.heldout else None)
        parts = [_pack(store, train, folder, "train", recipe.seq_len, progress)]
        parts.append(_pack(held if corpus.heldout else store, heldout, folder, "heldout", recipe.seq_len, progress))
    finally:
        tokenizer.encode_special_tokens = False
        store.close()
        held.close()
    path.unlink()
    (folder / "heldout.ids").unlink()
    return Manifest(
        format_version=DATA_FORMAT,
        corpus=corpus.spec,
        licence=corpus.licence,
        source=dict(corpus.source),
        recipe=recipe,
        exhausted=exhausted,
        documents_read=tally.documents,
        characters_read=tally.characters,
        removed={step: tally.facts(step) for step in tally.removed},
        tokens_read=store.tokens,
        documents=documents,
        tokens=tokens,
        seq_len=recipe.seq_len,
        vocab_size=vocabulary_size(tokenizer),
        unknown_share=tally.unknown / max(1, tally.sampled),
        tokenizer_sha256=fingerprint(tokenizer),
        train=parts[0],
        heldout=parts[1],
    )


def _split(kept: Spans, characters: np.ndarray, recipe: Recipe, own: DocumentStore | None) -> tuple[Spans, Spans]:
    """Split the documents into training and held-out text, and order the training text.

    The held-out text is that of `own`, where it is one of its own. Raises UserError if that is too short for a row.
    """
    # The split comes before the order, so that the held-out text is neither the best nor the worst.
    quality = tokens_per_character(kept.lengths - 2, characters)
    if own is not None:
        spans, _ = own.finish()
        if spans.tokens < recipe.seq_len:
            raise UserError(f"The held-out text is too short for a row of {recipe.seq_len} tokens.")
        return _ordered(kept, quality, recipe), spans.cut(min(spans.tokens, HELDOUT_TOKENS))[0]
    held = np.arange(1, len(kept.lengths) + 1) % HELDOUT_EVERY == 0
    before = np.cumsum(np.where(held, kept.lengths, 0)) - kept.lengths  # held-out tokens before each held-out document
    held &= before < HELDOUT_TOKENS
    train, heldout = kept.pick(~held), kept.pick(held)
    quality = quality[~held]
    # Of few or long documents no 50th makes a row: then the last rows are held out, and a document may be divided.
    if heldout.tokens < recipe.seq_len or train.tokens < recipe.seq_len:
        rows = kept.tokens // recipe.seq_len
        train, heldout = kept.cut((rows - max(1, rows // HELDOUT_EVERY)) * recipe.seq_len)
        quality = tokens_per_character(kept.lengths - 2, characters)[: len(train.lengths)]
    return _ordered(train, quality, recipe), heldout


def _ordered(train: Spans, quality: np.ndarray, recipe: Recipe) -> Spans:
    """Put the training text into the order that the recipe asks for; `quality`: tokens per character of each document."""
    return train.pick(np.argsort(quality, kind="stable")) if recipe.order == "quality" else train


def _pack(store: DocumentStore, spans: Spans, folder: Path, name: str, seq_len: int, progress: Say) -> list[Shard]:
    """Cut the ids of the spans into rows, and write them as shards."""
    writer = RowWriter(folder, name, seq_len)
    done, total = 0, spans.tokens
    try:
        for ids in store.read(spans):
            writer.append(ids)
            done += len(ids)
            progress(f"packing the {name} rows: {done / max(total, 1):.0%} of {total / 1e6:,.1f} M tokens")
        return writer.close()
    finally:
        writer.abandon()

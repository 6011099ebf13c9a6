"""What cleaning removes: exact duplicates, near duplicates, and the worst documents by tokens per character."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt16, UInt64

SHINGLE = 5
"""Tokens in a shingle: two documents are as near as the sets of their runs of five tokens (Jaccard similarity)."""
HASHES = 128
"""Minima in a MinHash signature. The share that two signatures have in common is off by about 0.035 (one standard
deviation) at a similarity of 0.8."""


@dataclass
class Removal:
    """What one step of cleaning took away."""

    documents: int = 0
    characters: int = 0

    @staticmethod
    def of(characters: Integer[np.ndarray, " docs"]) -> "Removal":
        """Documents of these lengths."""
        return Removal(len(characters), int(characters.sum(dtype=np.int64)))


@dataclass
class Tally:
    """What was read, and what each step removed of it."""

    documents: int = 0
    characters: int = 0
    removed: dict[str, Removal] = field(default_factory=dict)
    """By step, in the order of the steps; a step that is switched off is absent."""
    unknown: int = 0
    """Characters lost to [UNK] in a sample of the documents."""
    sampled: int = 0
    """Characters of that sample that are not blanks."""

    def add(self, documents: int, characters: int) -> None:
        """Count documents that were read."""
        self.documents += documents
        self.characters += characters

    def remove(self, step: str, gone: Removal) -> None:
        """Count what a step removed; a step is named for the first time when it is switched on or has removed something."""
        if gone.documents:
            found = self.removed.setdefault(step, Removal())
            found.documents += gone.documents
            found.characters += gone.characters

    def facts(self, step: str) -> dict[str, int | float]:
        """What a step removed, for the manifest."""
        gone = self.removed[step]
        share = gone.characters / max(self.characters, 1)
        return {"documents": gone.documents, "characters": gone.characters, "share_of_characters": share}

    def report(self) -> list[str]:
        """A sentence a step."""
        return [
            f"cleaning, {step}: removed {gone.documents:,} of {self.documents:,} documents, "
            f"{gone.characters / max(self.characters, 1):.2%} of the characters"
            for step, gone in self.removed.items()
        ]


class ExactFilter:
    """Remembers documents by 64-bit hashes of their text, case and blanks aside: 8 bytes a document, at most 24 while hashes
    are merged. Among 10 million different documents two share a hash with a chance of 3 in a million."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def new(self, texts: Sequence[str]) -> list[bool]:
        """Which texts were not there before, earlier ones of the same call included."""
        digests = [hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest() for text in texts]
        hashes = np.frombuffer(b"".join(digests), np.uint64)
        if len(self._sorted):
            nearest = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
            old = (self._sorted[nearest] == hashes).tolist()
        else:
            old = [False] * len(hashes)
        fresh = []
        for value, known in zip(hashes.tolist(), old, strict=True):
            fresh.append(not known and value not in self._recent)
            if fresh[-1]:
                self._recent.add(value)
        if len(self._recent) > max(1 << 16, min(len(self._sorted) // 8, 1 << 20)):
            self._sorted = np.concatenate([self._sorted, np.fromiter(self._recent, np.uint64, len(self._recent))])
            self._sorted.sort()
            self._recent = set()
        return fresh


class NearFilter:
    """Finds documents that are nearly one of the last `window` kept ones, by MinHash with locality-sensitive hashing.

    A signature is cut into bands; documents that agree in a whole band are compared, and count as near duplicates if at
    least `threshold` of their minima agree. Memory is fixed: 256 bytes a document of the window for the low halves of the
    minima, and a table of 4-byte places for every band.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self._threshold, self._window = threshold, window
        self._band = _band_rows(threshold)
        self._bands = np.arange(HASHES // self._band)
        self._ring = np.zeros((window, HASHES), np.uint16)
        self._slot_bits = max(10, int(2 * window - 1).bit_length())
        self._tables = np.zeros((len(self._bands), 1 << self._slot_bits), np.int32)  # place in the ring plus one
        self._next = 0
        self._factors = np.random.default_rng(0).integers(0, 2**63, self._band, np.uint64) * np.uint64(2) + np.uint64(1)

    def new(self, ids: UInt16[np.ndarray, " total"], lengths: Int[np.ndarray, " docs"]) -> Bool[np.ndarray, " docs"]:
        """Which documents are no near duplicate; `ids` are the tokens of all of them, end to end."""
        signatures = _signatures(_shingles(ids, lengths), lengths)
        slots = self._slots(signatures)
        low = signatures.astype(np.uint16)
        keep = np.ones(len(lengths), bool)
        start = 0
        for suspect in np.flatnonzero(self._suspects(low, slots)):
            self._insert(low[start:suspect], slots[start:suspect])
            keep[suspect] = not self._near(low[suspect], slots[suspect])
            start = suspect + (not keep[suspect])  # a kept suspect is inserted with those that follow it
        self._insert(low[start:], slots[start:])
        return keep

    def _slots(self, signatures: np.ndarray) -> Int[np.ndarray, "docs bands"]:
        """Where each band of each signature belongs in its table."""
        bands = signatures.reshape(len(signatures), len(self._bands), self._band).astype(np.uint64)
        mixed = _mix((bands * self._factors).sum(-1, dtype=np.uint64))
        return (mixed >> np.uint64(64 - self._slot_bits)).astype(np.int64)

    def _suspects(self, low: np.ndarray, slots: np.ndarray) -> Bool[np.ndarray, " docs"]:
        """Documents that share a band with a kept one or with an earlier one of the same call."""
        places = self._tables[self._bands, slots]
        rows = low.reshape(len(low), len(self._bands), self._band)
        theirs = self._ring.reshape(self._window, len(self._bands), self._band)[places - 1, self._bands]
        suspects = ((places > 0) & (theirs == rows).all(-1)).any(-1)
        flat = (slots + (self._bands << self._slot_bits)).reshape(-1)
        first = np.zeros(flat.size, bool)
        first[np.unique(flat, return_index=True)[1]] = True
        return suspects | ~first.reshape(slots.shape).all(-1)

    def _near(self, low: np.ndarray, slots: np.ndarray) -> bool:
        places = np.unique(self._tables[self._bands, slots])
        places = places[places > 0] - 1
        return bool(((self._ring[places] == low).mean(-1) >= self._threshold).any())

    def _insert(self, low: np.ndarray, slots: np.ndarray) -> None:
        places = (self._next + np.arange(len(low))) % self._window
        self._ring[places] = low
        self._tables[self._bands, slots] = places[:, None] + 1
        self._next = (self._next + len(low)) % self._window


def _band_rows(threshold: float) -> int:
    """Minima in a band: as many as still find nine of ten pairs that are just as near as the threshold."""
    return next((r for r in (32, 16, 8, 4, 2) if 1 - (1 - threshold**r) ** (HASHES // r) >= 0.9), 1)


def _shingles(ids: np.ndarray, lengths: np.ndarray) -> UInt64[np.ndarray, " total"]:
    """Hashes of the runs of SHINGLE tokens that begin at each token, document after document. A run that passes the end of
    its document is filled up with end marks, so that the shortest document has shingles too."""
    real = np.arange(len(ids)) + np.repeat(np.arange(len(lengths)) * (SHINGLE - 1), lengths)
    padded = np.zeros(len(ids) + len(lengths) * (SHINGLE - 1), np.uint64)
    padded[real] = ids.astype(np.uint64) + np.uint64(1)
    size = len(padded) - SHINGLE + 1
    hashes = padded[:size].copy()
    for i in range(1, SHINGLE):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += padded[i : i + size]
    return _mix(hashes[real])


def _mix(values: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signatures(shingles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """MinHash signatures, (docs, HASHES) uint32, of documents of `counts` shingles each."""
    from rensa import RMinHash  # ty: ignore[missing-module-member]  (compiled, without stubs)

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, HASHES, 1)
    rows = b"".join(array("I", row).tobytes() for row in matrix.to_rows())  # twice as fast as np.asarray
    return np.frombuffer(rows, np.uint32).reshape(len(counts), HASHES)


def worst(tokens: Integer[np.ndarray, " docs"], characters: Integer[np.ndarray, " docs"], share: float) -> np.ndarray:
    """Which documents, (docs,) bool, have more tokens per character than all but the worst `share` of the corpus.

    Never more than that share; documents that tie at the edge stay. Text that the tokenizer falls apart on (other
    scripts, tables, noise) takes many tokens for its length, whatever the language.
    """
    ratio = tokens_per_character(tokens, characters)
    if not len(ratio) or share <= 0:
        return np.zeros(len(ratio), bool)
    edge = len(ratio) - 1 - int(share * len(ratio))
    return ratio > np.partition(ratio, edge)[edge]


def tokens_per_character(tokens: np.ndarray, characters: np.ndarray) -> Float[np.ndarray, " docs"]:
    """The measure of quality, (docs,) float32: less is better."""
    return (tokens / characters).astype(np.float32)

"""Cleaning: remove exact duplicates, near duplicates, and the worst documents by tokens per character."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt16, UInt64

SHINGLE = 5
"""Tokens in a shingle. The similarity of two documents is that of their sets of shingles (Jaccard)."""
HASHES = 128
"""Minima in a MinHash signature. The share that two signatures have in common estimates a similarity of 0.8 with a standard
deviation of 0.035."""


@dataclass
class Removal:
    """Documents that one step of cleaning removed."""

    documents: int = 0
    characters: int = 0

    @staticmethod
    def of(characters: Integer[np.ndarray, " docs"]) -> "Removal":
        """Count documents of these lengths."""
        return Removal(len(characters), int(characters.sum(dtype=np.int64)))


@dataclass
class Tally:
    """Counts of the documents read, and of those that each step removed."""

    documents: int = 0
    characters: int = 0
    removed: dict[str, Removal] = field(default_factory=dict)
    """By step, in order; a step that is switched off is absent."""
    unknown: int = 0
    """Characters lost to [UNK] in a sample of the documents."""
    sampled: int = 0
    """Characters of that sample that are not blanks."""

    def add(self, documents: int, characters: int) -> None:
        """Count documents that were read."""
        self.documents += documents
        self.characters += characters

    def remove(self, step: str, gone: Removal) -> None:
        """Count what a step removed. A step that is not switched on appears once it has removed something."""
        if gone.documents:
            total = self.removed.setdefault(step, Removal())
            total.documents += gone.documents
            total.characters += gone.characters

    def facts(self, step: str) -> dict[str, int | float]:
        """Return the manifest's entry of a step."""
        gone = self.removed[step]
        share = gone.characters / max(self.characters, 1)
        return {"documents": gone.documents, "characters": gone.characters, "share_of_characters": share}

    def report(self) -> list[str]:
        """Return a sentence for each step."""
        return [
            f"cleaning, {step}: removed {gone.documents:,} of {self.documents:,} documents, "
            f"{gone.characters / max(self.characters, 1):.2%} of the characters"
            for step, gone in self.removed.items()
        ]


class ExactFilter:
    """Recognises documents that were seen before, whatever their case and blanks.

    It keeps 64-bit hashes: 8 bytes a document, at most 24 while hashes are merged. The probability that two of 10 million
    different documents share a hash is 3 in a million.
    """

    def __init__(self) -> None:
        # Hashes lie in a sorted array, 8 bytes each. New ones gather in a set, which takes far more, until they are merged.
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def new(self, texts: Sequence[str]) -> list[bool]:
        """Return which texts have not been seen, neither in earlier calls nor earlier in this one."""
        digests = [hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest() for text in texts]
        hashes = np.frombuffer(b"".join(digests), np.uint64)
        if len(self._sorted):
            nearest = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
            merged = (self._sorted[nearest] == hashes).tolist()
        else:
            merged = [False] * len(hashes)
        fresh = []
        for value, known in zip(hashes.tolist(), merged, strict=True):
            fresh.append(not known and value not in self._recent)
            if fresh[-1]:
                self._recent.add(value)
        # A merge sorts the whole array, so it waits until the set is an eighth of it, or of a size that costs much memory.
        if len(self._recent) > max(1 << 16, min(len(self._sorted) // 8, 1 << 20)):
            self._sorted = np.concatenate([self._sorted, np.fromiter(self._recent, np.uint64, len(self._recent))])
            self._sorted.sort()
            self._recent = set()
        return fresh


class NearFilter:
    """Recognises near duplicates of the last `window` documents kept, by MinHash with locality-sensitive hashing.

    A signature is cut into bands. Documents that agree in a whole band are compared, and are near duplicates if at least
    `threshold` of their minima agree. Memory is fixed: 256 bytes a document of the window for the low halves of the minima,
    and a table of 4-byte places for every band.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self._threshold, self._window = threshold, window
        self._band = _band_rows(threshold)
        self._bands = np.arange(HASHES // self._band)
        self._ring = np.zeros((window, HASHES), np.uint16)
        self._slot_bits = max(10, int(2 * window - 1).bit_length())
        # A band's table holds the place in the ring, plus one, of the last document whose band hashes to a slot. Collisions
        # only overwrite places: a near duplicate may be missed, none is invented.
        self._tables = np.zeros((len(self._bands), 1 << self._slot_bits), np.int32)
        self._next = 0
        self._factors = np.random.default_rng(0).integers(0, 2**63, self._band, np.uint64) * np.uint64(2) + np.uint64(1)

    def new(self, ids: UInt16[np.ndarray, " total"], lengths: Int[np.ndarray, " docs"]) -> Bool[np.ndarray, " docs"]:
        """Return which documents are not near duplicates. `ids` are the tokens of all of them, end to end."""
        signatures = _signatures(_shingles(ids, lengths), lengths)
        slots = self._slots(signatures)
        low = signatures.astype(np.uint16)
        keep = np.ones(len(lengths), bool)
        start = 0
        # Few documents are suspects. All others are inserted in bulk between them, so that each suspect is compared with
        # exactly the documents kept before it.
        for suspect in np.flatnonzero(self._suspects(low, slots)):
            self._insert(low[start:suspect], slots[start:suspect])
            keep[suspect] = not self._near(low[suspect], slots[suspect])
            start = suspect + (not keep[suspect])  # a kept suspect is inserted with those that follow it
        self._insert(low[start:], slots[start:])
        return keep

    def _slots(self, signatures: np.ndarray) -> Int[np.ndarray, "docs bands"]:
        """Hash each band of each signature to a slot of its table."""
        bands = signatures.reshape(len(signatures), len(self._bands), self._band).astype(np.uint64)
        mixed = _mix((bands * self._factors).sum(-1, dtype=np.uint64))
        return (mixed >> np.uint64(64 - self._slot_bits)).astype(np.int64)

    def _suspects(self, low: np.ndarray, slots: np.ndarray) -> Bool[np.ndarray, " docs"]:
        """Return the documents that share a band with a kept one, or a slot with an earlier one of the same call."""
        places = self._tables[self._bands, slots]
        rows = low.reshape(len(low), len(self._bands), self._band)
        theirs = self._ring.reshape(self._window, len(self._bands), self._band)[places - 1, self._bands]
        suspects = ((places > 0) & (theirs == rows).all(-1)).any(-1)
        flat = (slots + (self._bands << self._slot_bits)).reshape(-1)
        first_use = np.zeros(flat.size, bool)
        first_use[np.unique(flat, return_index=True)[1]] = True
        return suspects | ~first_use.reshape(slots.shape).all(-1)

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
    """Return the minima in a band: the most that still find nine of ten pairs whose similarity is just the threshold."""
    # Two documents of similarity s agree in all r minima of a band with probability s^r.
    return next((r for r in (32, 16, 8, 4, 2) if 1 - (1 - threshold**r) ** (HASHES // r) >= 0.9), 1)


def _shingles(ids: np.ndarray, lengths: np.ndarray) -> UInt64[np.ndarray, " total"]:
    """Hash the SHINGLE tokens that begin at each token, document after document.

    A shingle that passes the end of its document is filled up with end marks, so that the shortest document has shingles too.
    """
    # `padded` has SHINGLE - 1 zeros after every document, and `real` is where its tokens lie. Ids count from 1 there.
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
    """Scramble 64-bit values by splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signatures(shingles: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute the MinHash signatures, (docs, HASHES) uint32, of documents of `counts` shingles each."""
    from rensa import RMinHash  # ty: ignore[missing-module-member]  (compiled, without stubs)

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, HASHES, 1)
    rows = b"".join(array("I", row).tobytes() for row in matrix.to_rows())  # twice as fast as np.asarray
    return np.frombuffer(rows, np.uint32).reshape(len(counts), HASHES)


def worst(tokens: Integer[np.ndarray, " docs"], characters: Integer[np.ndarray, " docs"], share: float) -> np.ndarray:
    """Return the worst `share` of the documents by tokens per character, (docs,) bool. Documents that tie at the edge stay.

    Text that the tokenizer breaks into small pieces (other scripts, tables, noise) takes many tokens for its length, whatever
    the language.
    """
    ratio = tokens_per_character(tokens, characters)
    if not len(ratio) or share <= 0:
        return np.zeros(len(ratio), bool)
    edge = len(ratio) - 1 - int(share * len(ratio))
    return ratio > np.partition(ratio, edge)[edge]


def tokens_per_character(tokens: np.ndarray, characters: np.ndarray) -> Float[np.ndarray, " docs"]:
    """Compute the measure of quality, (docs,) float32; less is better."""
    return (tokens / characters).astype(np.float32)

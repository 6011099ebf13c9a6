"""What cleaning takes away, and what it must not."""

import random

import numpy as np
import pytest

from ufbert.data import clean
from ufbert.data.clean import ExactFilter, NearFilter, worst


def test_exact_duplicates_are_found_across_merges_case_and_blanks_aside():
    exact = ExactFilter()
    rng = random.Random(0)
    texts = [f"Document  number {rng.randrange(120_000)}" for _ in range(200_000)]
    seen: set[str] = set()
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        wanted = []
        for text in batch:
            wanted.append(text not in seen)
            seen.add(text)
        assert exact.new(batch) == wanted
    assert len(exact._sorted) > 65_000  # the merge has taken place
    assert exact.new([" document\nNUMBER 119999999 ", "document number 119999999", "document number x"]) == [
        True,
        False,
        True,
    ]


def documents(rng, n, size=60):
    return [rng.integers(0, 5000, size).astype(np.uint16) for _ in range(n)]


def changed(rng, ids, n):
    """`ids` with n of its tokens replaced, apart from each other."""
    ids = ids.copy()
    ids[np.linspace(5, len(ids) - 6, n).astype(int)] = rng.integers(6000, 7000, n)
    return ids


def run(near, docs):
    return near.new(np.concatenate(docs), np.array([len(doc) for doc in docs])).tolist()


def jaccard(one, other):
    """The true similarity: shared runs of five tokens, filled up at the end."""

    def runs(ids):
        padded = [*ids.tolist(), *["end"] * 4]
        return {tuple(padded[i : i + 5]) for i in range(len(ids))}

    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


def test_signatures_agree_as_often_as_the_sets_overlap():
    rng = np.random.default_rng(0)
    for n in (1, 3, 8):
        found, wanted = [], []
        for one in documents(rng, 40, 100):
            other = changed(rng, one, n)
            pair = np.array([100, 100])
            signatures = clean._signatures(clean._shingles(np.concatenate([one, other]), pair), pair)
            found.append((signatures[0] == signatures[1]).mean())
            wanted.append(jaccard(one, other))
        assert np.mean(found) == pytest.approx(np.mean(wanted), abs=0.02)


def test_near_duplicates_go_and_the_first_stays():
    rng = np.random.default_rng(1)
    near = NearFilter(window=10_000, threshold=0.7)
    docs = documents(rng, 300)
    copies = [changed(rng, doc, 1) for doc in docs]  # similarity about 0.85
    assert all(jaccard(a, b) > 0.8 for a, b in zip(docs[:5], copies[:5], strict=True))
    strangers = [changed(rng, doc, 8) for doc in docs]  # below 0.3
    assert all(run(near, docs))
    kept = run(near, [*copies, *strangers])
    assert sum(kept[:300]) <= 3  # nine of ten at the threshold itself, more above
    assert all(kept[300:])


def test_near_duplicates_within_one_batch_and_across_batches_are_the_same():
    rng = np.random.default_rng(2)
    docs = documents(rng, 50)
    mixed = [part for doc in docs for part in (doc, changed(rng, doc, 1))]
    whole = run(NearFilter(1000, 0.7), mixed)
    piecewise, near = [], NearFilter(1000, 0.7)
    for start in range(0, len(mixed), 7):
        piecewise += run(near, mixed[start : start + 7])
    assert whole == piecewise
    assert all(whole[::2])
    assert sum(whole[1::2]) <= 1


def test_only_the_window_is_remembered():
    rng = np.random.default_rng(3)
    near = NearFilter(window=100, threshold=0.8)
    first, others = documents(rng, 1)[0], documents(rng, 99)
    assert run(near, [first]) == [True]
    assert all(run(near, others))
    assert run(near, [first]) == [False]
    assert all(run(near, documents(rng, 100)))
    assert run(near, [first]) == [True]


def test_short_documents_are_compared_too():
    near = NearFilter(window=100, threshold=0.8)
    one, two = np.array([7], np.uint16), np.array([7, 8], np.uint16)
    assert run(near, [one, two, one]) == [True, True, False]


def test_the_worst_by_tokens_per_character_go_and_ties_stay():
    tokens, characters = np.arange(1, 101), np.full(100, 100)
    assert np.flatnonzero(worst(tokens, characters, 0.05)).tolist() == [95, 96, 97, 98, 99]
    assert not worst(tokens, characters, 0.0).any()
    assert not worst(np.full(100, 3), characters, 0.05).any()
    assert worst(np.array([5, 5, 5, 9]), np.array([20, 10, 20, 10]), 0.25).tolist() == [False, False, False, True]

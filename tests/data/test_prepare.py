"""From documents to rows: what is kept, held out, ordered and written, and in which memory."""

import random
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import REPO

from ufbert.config import DataConfig
from ufbert.data import prepare as preparation
from ufbert.data import shards
from ufbert.data.corpora import Corpus, open_corpus
from ufbert.data.prepare import EXACT, NEAR, WORST, Recipe, prepare
from ufbert.data.prepared import open_prepared
from ufbert.data.shards import RowOrder
from ufbert.data.text_files import Meter, Progress
from ufbert.data.tokenizer import fingerprint, special_ids, train_wordpiece
from ufbert.errors import UserError

PLAIN = DataConfig(seq_len=32, tokenizer_chars=10**6, filter_worst=0.0, drop_exact=False, drop_near=False)
"""Rows of every document as it is."""
CLEAN = DataConfig(seq_len=32, tokenizer_chars=10**6, near_window=1000)


def made(corpus, folder, data=PLAIN, **kwargs):
    return prepare(corpus, folder, Recipe.of(data, 300, kwargs.get("tokenizer")), **kwargs)


def texts(*documents):
    return Corpus("x", "none", lambda: iter(documents))


def all_rows(rows):
    return rows.take(np.arange(len(rows)))


def stream(rows):
    return all_rows(rows).reshape(-1).tolist()


def ids_of(data, documents):
    ids = special_ids(data.tokenizer)
    return [
        number
        for text in documents
        for number in (ids.cls, *data.tokenizer.encode(text, add_special_tokens=False).ids, ids.sep)
    ]


def numbered(n):
    """n different documents of a like quality."""
    words = ("cat", "dog", "king", "river", "house", "bird", "garden", "castle")
    return [" ".join(f"{word} {i * 37 % 1009} {i}" for word in words) for i in range(n)]


def test_the_tokenizer_is_repeatable_and_wraps_texts(corpus_file):
    documents = list(open_corpus(f"text:{corpus_file}").documents())
    one, other = train_wordpiece(documents, 200), train_wordpiece(documents, 200)
    assert fingerprint(one) == fingerprint(other)
    assert special_ids(one) == (0, 1, 2, 3, 4)
    assert one.encode("The CAT", "a dog").tokens == ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]
    assert one.encode("the [MASK]").tokens == ["[CLS]", "the", "[MASK]", "[SEP]"]


def test_rows_hold_every_document_in_order(corpus_file, tmp_path):
    corpus = open_corpus(f"text:{corpus_file}")
    data = made(corpus, tmp_path / "data")
    documents = list(corpus.documents())
    wanted = ids_of(data, [text for number, text in enumerate(documents, start=1) if number % 50])
    found = stream(data.train)
    assert found == wanted[: len(found)]
    assert len(wanted) - len(found) < 32
    held = ids_of(data, documents[49::50])
    assert stream(data.heldout) == held[: len(data.heldout) * 32]
    assert data.manifest.documents == data.manifest.documents_read == 400
    assert data.manifest.tokens == len(wanted) + len(held)
    assert data.manifest.heldout_rows == len(data.heldout) > 0
    assert data.manifest.removed == {}
    np.testing.assert_array_equal(all_rows(open_prepared(tmp_path / "data").train), all_rows(data.train))


def test_every_step_reports_what_it_removed_and_works_across_the_held_out_text(tmp_path):
    kept = numbered(100)
    near = [f"{text} more" for text in kept[:10]]
    rng = random.Random(0)
    bad = [" ".join("".join(rng.choices("qzxjvkw", k=2)) for _ in range(40)) for _ in range(5)]
    documents = [*kept[:50], *near, *kept[:7], *kept[50:], kept[49].upper(), *bad]
    said = []
    data = made(texts(*documents), tmp_path / "data", replace(CLEAN, near_threshold=0.5), say=said.append)
    removed = data.manifest.removed
    assert removed[EXACT]["documents"] == 8
    assert removed[NEAR]["documents"] == 10
    assert removed[WORST]["documents"] == 5
    assert removed[EXACT]["characters"] == sum(map(len, [*kept[:7], kept[49]]))
    assert removed[WORST]["characters"] == sum(map(len, bad))
    assert removed[NEAR]["share_of_characters"] == pytest.approx(sum(map(len, near)) / sum(map(len, documents)))
    assert data.manifest.documents == 100
    wanted = ids_of(data, [text for i, text in enumerate(kept, start=1) if i % 50])
    assert stream(data.train) == wanted[: len(data.train) * 32]
    held = ids_of(data, kept[49::50])
    assert stream(data.heldout) == held[: len(data.heldout) * 32]
    assert [line.split(":")[0] for line in said] == [f"cleaning, {step}" for step in (EXACT, NEAR, WORST)]
    assert f"removed 8 of {len(documents)} documents" in said[0]


@pytest.mark.parametrize(
    ("switch", "step"), [({"drop_exact": True}, EXACT), ({"drop_near": True}, NEAR), ({"filter_worst": 0.1}, WORST)]
)
def test_each_step_is_a_switch_of_its_own(tmp_path, switch, step):
    documents = [text for text in numbered(60) for _ in range(2)] + ["qzx jvk wqy zzk qjx vvz kqj xzw"]
    data = made(texts(*documents), tmp_path / "data", replace(PLAIN, **switch))
    assert list(data.manifest.removed) == [step]
    assert data.manifest.removed[step]["documents"] > 0
    assert data.manifest.documents == len(documents) - data.manifest.removed[step]["documents"]


def test_quality_order_puts_the_best_documents_first(corpus_file, tmp_path):
    corpus = open_corpus(f"text:{corpus_file}")
    data = made(corpus, tmp_path / "data", replace(PLAIN, order="quality"))
    documents = list(corpus.documents())
    training = [text for number, text in enumerate(documents, start=1) if number % 50]
    count = {text: len(data.tokenizer.encode(text, add_special_tokens=False).ids) for text in training}
    best_first = sorted(training, key=lambda text: np.float32(count[text] / len(text)))
    assert best_first != training
    assert stream(data.train) == ids_of(data, best_first)[: len(data.train) * 32]
    assert stream(data.heldout) == ids_of(data, documents[49::50])[: len(data.heldout) * 32]


def test_few_documents_hold_out_the_last_rows_whatever_the_order(tmp_path):
    documents = [f"{name} and another word " * 400 for name in ("zzz qqq", "a cat", "the dog")]
    for order in ("shuffled", "quality"):
        data = made(texts(*documents), tmp_path / order, replace(PLAIN, order=order))
        rows = len(data.train) + len(data.heldout)
        assert len(data.heldout) == max(1, rows // 50)
        assert stream(data.heldout) == ids_of(data, documents)[len(data.train) * 32 : rows * 32]


def test_reading_stops_at_max_tokens(corpus_file, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_BATCH_DOCUMENTS", 10)
    whole = made(open_corpus(f"text:{corpus_file}"), tmp_path / "whole")
    part = made(open_corpus(f"text:{corpus_file}"), tmp_path / "part", replace(PLAIN, max_tokens=2000))
    assert whole.manifest.exhausted
    assert not part.manifest.exhausted
    assert 2000 <= part.manifest.tokens_read < 3000 < whole.manifest.tokens_read


def test_shards_are_bounded_and_read_as_one(corpus_file, tmp_path, monkeypatch):
    corpus = open_corpus(f"text:{corpus_file}")
    whole = made(corpus, tmp_path / "whole")
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    cut = made(corpus, tmp_path / "cut")
    files = sorted((tmp_path / "cut").glob("train-*.bin"))
    assert len(files) == len(cut.manifest.train) == -(-len(whole.train) // 15)
    assert {file.stat().st_size for file in files[:-1]} == {15 * 64}
    picks = np.random.default_rng(0).integers(0, len(whole.train), 500)
    taken = cut.train[picks]
    assert taken.dtype == np.int32
    np.testing.assert_array_equal(taken, whole.train[picks])
    np.testing.assert_array_equal(np.concatenate(list(cut.train.blocks(4))), np.concatenate(list(whole.train.blocks())))
    np.testing.assert_array_equal(cut.unigram_log_probs(), whole.unigram_log_probs())


def test_rows_reach_the_device_as_they_were_written(tmp_path, monkeypatch):
    """In random order, from many shards."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 20)
    ids = np.random.default_rng(0).integers(0, 32768, 1 << 22).astype(np.uint16)
    writer = shards.RowWriter(tmp_path, "train", 128)
    writer.append(ids)
    rows, order = shards.Rows(tmp_path, writer.close(), 128), RowOrder(len(ids) // 128, seed=0)
    assert len(list(tmp_path.iterdir())) == 8
    for start in range(0, len(rows), 4096):
        for position in range(start, start + 4096, 128):
            picks = order.take(position, 128)
            batch = jax.device_put(rows.take(picks)).block_until_ready()
        np.testing.assert_array_equal(batch, ids.reshape(-1, 128)[picks])


def test_unigram_frequencies_are_add_one_and_sum_to_one(corpus_file, tmp_path):
    data = made(open_corpus(f"text:{corpus_file}"), tmp_path / "data")
    log_p, rows = data.unigram_log_probs(), all_rows(data.train)
    np.testing.assert_allclose(np.exp(log_p).sum(), 1.0)
    token = int(rows[0, 5])
    count = int((rows == token).sum())
    np.testing.assert_allclose(log_p[token], np.log((count + 1) / (rows.size + data.manifest.vocab_size)))


def test_special_tokens_written_in_the_text_are_text(tmp_path):
    data = made(texts(*["the [MASK] and [CLS] stay words " * 20] * 10), tmp_path / "data")
    assert not np.any(all_rows(data.train) == special_ids(data.tokenizer).mask)


def test_documents_without_tokens_are_left_out(tmp_path):
    documents = [*numbered(60), "\u0000\u200b", "\u0007"]
    data = made(texts(*documents), tmp_path / "data")
    assert data.manifest.removed["documents without tokens"]["documents"] == 2
    assert data.manifest.documents == 60


def test_the_same_corpus_gives_the_same_bytes(corpus_file, tmp_path):
    corpus = open_corpus(f"text:{corpus_file}")
    one, other = (made(corpus, tmp_path / name, CLEAN).manifest for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint
    assert one == other
    assert made(corpus, tmp_path / "plain").manifest.fingerprint != one.fingerprint


def test_the_manifest_says_where_the_rows_come_from(corpus_file, tmp_path):
    manifest = made(open_corpus(f"text:{corpus_file}"), tmp_path / "data", CLEAN).manifest
    assert manifest.corpus == f"text:{corpus_file}"
    assert manifest.source["files"] == [[corpus_file.stat().st_size, corpus_file.stat().st_mtime_ns]]
    assert manifest.recipe.near_window == 1000
    assert manifest.documents_read == 400
    assert manifest.characters_read == len(corpus_file.read_text()) - 2 * 399 - 1
    assert sum(gone["documents"] for gone in manifest.removed.values()) == 400 - manifest.documents > 0


def test_the_order_is_a_shuffle_of_each_epoch_and_resumes_anywhere():
    order = RowOrder(10, seed=3)
    found = order.take(0, 25)
    for epoch in range(2):
        assert sorted(found[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert found[:10].tolist() != found[10:20].tolist()
    np.testing.assert_array_equal(RowOrder(10, seed=3).take(7, 9), found[7:16])
    assert RowOrder(10, seed=4).take(0, 10).tolist() != found[:10].tolist()


def test_rows_in_order_of_quality_are_read_as_they_lie():
    order = RowOrder(10, seed=3, shuffled=False)
    assert order.take(0, 25).tolist() == [*range(10), *range(10), *range(5)]
    assert order.take(17, 5).tolist() == [7, 8, 9, 0, 1]


@pytest.mark.parametrize(
    "wrong", [{"filter_worst": 1.0}, {"near_threshold": 0.0}, {"near_window": 0}, {"max_tokens": -1}]
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(UserError, match=f"data.{next(iter(wrong))}"):
        DataConfig(**wrong)


def test_progress_shows_a_share_and_what_is_left():
    meter = Meter(1000)
    meter.leave(250)
    line = Progress(meter, 0).line(1234, 5_000_000)
    assert " left  tokenising 25% of 0.0 MB  5.0 M tokens" in line
    assert line.endswith("1,234 documents")
    assert " 50%" in Progress(meter, 10_000_000).line(1, 5_000_000)
    assert "%" not in Progress(None, 0).line(1, 5_000_000)


MEMORY = """
import random, sys
from pathlib import Path
from ufbert.config import DataConfig
from ufbert.data.corpora import Corpus
from ufbert.data.prepare import Recipe, prepare

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def documents(n):
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 8))) for _ in range(5000)]
    for _ in range(n):
        yield " ".join(rng.choices(words, k=30))

recipe = Recipe.of(DataConfig(tokenizer_chars=1_000_000, near_window=20_000), 2000)
for n in (20_000, 80_000):
    data = prepare(Corpus("x", "none", lambda: documents(n)), Path(sys.argv[1]) / str(n), recipe)
    print(peak(), data.manifest.characters_read, data.manifest.documents)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_grows_by_bytes_a_document_not_with_the_text(tmp_path):
    """At 10 million documents and 2 GB, 2 GiB are promised: 60 thousand more documents (10 MB of text and as much again in
    ids) may take 60 bytes each, and noise."""
    code = [sys.executable, "-c", MEMORY, str(tmp_path)]
    found = subprocess.run(code, capture_output=True, text=True, check=True, cwd=REPO)
    (low, few, _), (high, many, kept) = (map(float, line.split()) for line in found.stdout.splitlines())
    assert many - few > 8e6
    assert kept > 70_000
    assert high - low < 60_000 * 60 / 2**20 + 20


def test_a_held_out_text_of_its_own_is_never_trained_on(tmp_path):
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(60)]
    documents = [" ".join(rng.choices(words, k=100)) for _ in range(120)]
    shared, near = documents[100], f"{documents[101]} {words[0]}"
    held = texts(*documents[100:])
    data = made(texts(*documents[:100], shared, near)._replace(heldout=held), tmp_path / "p", CLEAN)
    assert data.manifest.removed[EXACT]["documents"] == 1
    assert data.manifest.removed[NEAR]["documents"] == 1
    assert stream(data.heldout) == ids_of(data, documents[100:])[: len(stream(data.heldout))]
    assert len(stream(data.heldout)) > 20 * 100
    left = 100 - data.manifest.removed[WORST]["documents"]
    assert data.manifest.documents == left
    assert stream(data.train).count(special_ids(data.tokenizer).cls) == left  # none of the 100 is held out
    with pytest.raises(UserError, match="held-out text is too short for a row"):
        made(texts(*documents[:100])._replace(heldout=texts("a b")), tmp_path / "q", CLEAN)

"""Corpora, tokenizer, packed rows and their order."""

import gzip
import json

import numpy as np
import pytest

from ufbert.data.corpora import Corpus, demo_path, open_corpus
from ufbert.data.order import RowOrder
from ufbert.data.rows import open_prepared, prepare
from ufbert.data.tokenizer import fingerprint, special_ids, train_wordpiece
from ufbert.errors import UserError

OPTIONS = {"vocab_size": 300, "seq_len": 32, "max_tokens": 0, "tokenizer_chars": 10**6}


def test_text_files_plain_and_gzipped_give_documents(tmp_path):
    text = "One.\nTwo.\n\n\nThree.\r\n \n"
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8", newline="")
    with gzip.open(tmp_path / "b.gz", "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    corpus = open_corpus(f"text:{tmp_path / 'a.txt'},{tmp_path / 'b.gz'}")
    assert list(corpus.documents()) == ["One.\nTwo.", "Three."] * 2
    assert list(corpus.documents()) == ["One.\nTwo.", "Three."] * 2


def test_hub_datasets_stream_from_local_files(tmp_path):
    lines = [json.dumps({"body": f"text {i}", "n": i}) for i in range(5)] + [json.dumps({"body": " ", "n": 9})]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    corpus = open_corpus(f"hf:{tmp_path / 'data'}::body")
    assert list(corpus.documents()) == [f"text {i}" for i in range(5)]
    with pytest.raises(UserError, match="no field 'text'; it has body, n"):
        open_corpus(f"hf:{tmp_path / 'data'}")


def test_a_hub_corpus_out_of_reach_names_the_remedies():
    with pytest.raises(UserError, match=r"--corpus demo.*--corpus text:PATH"):
        open_corpus("hf:nobody/has-this")


@pytest.mark.parametrize("spec", ["", "demos", "text:", "file:x", "hf:"])
def test_other_specs_are_refused(spec):
    with pytest.raises(UserError, match="no corpus"):
        open_corpus(spec)


def test_damaged_files_are_named_with_their_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_corpus(f"text:{tmp_path / 'none'}")
    (tmp_path / "bad.txt").write_bytes(b"fine\nb\xe9d\n")
    with pytest.raises(UserError, match=r"bad\.txt, line 2: not UTF-8"):
        list(open_corpus(f"text:{tmp_path / 'bad.txt'}").documents())
    whole = gzip.compress(b"a line of text\n" * 5000)
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        list(open_corpus(f"text:{tmp_path / 'cut.gz'}").documents())


def test_the_demo_text_is_read_where_it_is_installed():
    if demo_path() is None:
        with pytest.raises(UserError, match="--extra demo"):
            open_corpus("demo")
    else:
        documents = list(open_corpus("demo").documents())
        assert len(documents) > 9000
        assert sum(map(len, documents)) > 4_000_000


def test_the_tokenizer_is_repeatable_and_wraps_texts(corpus_file):
    documents = list(open_corpus(f"text:{corpus_file}").documents())
    one, other = train_wordpiece(documents, 200), train_wordpiece(documents, 200)
    assert fingerprint(one) == fingerprint(other)
    assert special_ids(one) == (0, 1, 2, 3, 4)
    assert one.encode("The CAT", "a dog").tokens == ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]
    assert one.encode("the [MASK]").tokens == ["[CLS]", "the", "[MASK]", "[SEP]"]


def test_rows_hold_every_document_in_order(corpus_file, tmp_path):
    corpus = open_corpus(f"text:{corpus_file}")
    data = prepare(corpus, tmp_path / "data", **OPTIONS)
    ids, documents = special_ids(data.tokenizer), list(corpus.documents())
    stream = data.train.reshape(-1).tolist()
    wanted = []
    for number, document in enumerate(documents, start=1):
        if number % 50:
            wanted += [ids.cls, *data.tokenizer.encode(document, add_special_tokens=False).ids, ids.sep]
    assert stream == wanted[: len(stream)]
    assert len(wanted) - len(stream) < 32
    assert data.manifest.documents == 400
    assert data.manifest.heldout_rows == len(data.heldout) > 0
    assert not (tmp_path / ".data.partial").exists()
    again = open_prepared(tmp_path / "data")
    np.testing.assert_array_equal(again.train, data.train)


def test_unigram_frequencies_are_add_one_and_sum_to_one(corpus_file, tmp_path):
    data = prepare(open_corpus(f"text:{corpus_file}"), tmp_path / "data", **OPTIONS)
    log_p = data.unigram_log_probs()
    np.testing.assert_allclose(np.exp(log_p).sum(), 1.0)
    token = int(data.train[0, 5])
    count = int((data.train == token).sum())
    np.testing.assert_allclose(log_p[token], np.log((count + 1) / (data.train.size + data.manifest.vocab_size)))


def test_special_tokens_written_in_the_text_are_text(tmp_path):
    corpus = Corpus("x", "none", lambda: iter(["the [MASK] and [CLS] stay words " * 20] * 10))
    data = prepare(corpus, tmp_path / "data", **OPTIONS)
    assert not np.any(data.train == special_ids(data.tokenizer).mask)


def test_few_documents_hold_out_the_last_rows(tmp_path):
    corpus = Corpus("x", "none", lambda: iter(["a word and another word " * 400] * 3))
    data = prepare(corpus, tmp_path / "data", **OPTIONS)
    assert len(data.heldout) == max(1, (len(data.train) + len(data.heldout)) // 50)


def test_an_empty_or_tiny_corpus_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        prepare(Corpus("x", "none", lambda: iter([])), tmp_path / "data", **OPTIONS)
    with pytest.raises(UserError, match="too little text"):
        prepare(Corpus("x", "none", lambda: iter(["two words"])), tmp_path / "data", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_cut_rows_are_refused(corpus_file, tmp_path):
    prepare(open_corpus(f"text:{corpus_file}"), tmp_path / "data", **OPTIONS)
    path = tmp_path / "data" / "train.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="prepare the data anew"):
        open_prepared(tmp_path / "data")


def test_the_order_is_a_shuffle_of_each_epoch_and_resumes_anywhere():
    order = RowOrder(10, seed=3)
    stream = order.take(0, 25)
    for epoch in range(2):
        assert sorted(stream[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert stream[:10].tolist() != stream[10:20].tolist()
    np.testing.assert_array_equal(RowOrder(10, seed=3).take(7, 9), stream[7:16])
    assert RowOrder(10, seed=4).take(0, 10).tolist() != stream[:10].tolist()

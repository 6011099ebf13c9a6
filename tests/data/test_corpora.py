"""Corpora: what is read, in which pieces, and what damage is named."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc

import huggingface_hub.utils
import pytest
from conftest import REPO

from ufbert.data import text_files
from ufbert.data.corpora import datasets_library, demo_path, open_corpus, source_of
from ufbert.errors import UserError


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


def parquet(place, values, kind=None):
    import pyarrow as pa
    import pyarrow.parquet

    place.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pa.table({"text": pa.array(values, kind)}), place)
    return f"hf:{place.parent}"


def test_hub_texts_may_be_bytes_or_missing(tmp_path):
    import pyarrow as pa

    texts = ["größer", None, " ", "a\u2028b"]
    for kind in (pa.string(), pa.large_string(), pa.binary(), pa.string_view()):
        values = [text and text.encode() for text in texts] if kind == pa.binary() else texts
        corpus = open_corpus(parquet(tmp_path / str(kind) / "train.parquet", values, kind))
        assert list(corpus.documents()) == ["größer", "a\u2028b"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([5, 6], "row 0: the field 'text' is of type int, not a text; name a field of texts"),
        ([["a"], ["b"]], "row 0: the field 'text' is of type list"),
        ([{"a": "b"}], "row 0: the field 'text' is of type dict"),
        ([b"good", b"b\xff"], r"row 1: the field 'text' holds bytes that are not UTF-8 \(invalid start byte\)"),
    ],
)
def test_hub_columns_that_hold_no_texts_are_a_sentence(tmp_path, values, words):
    spec = parquet(tmp_path / "data" / "train.parquet", values)
    with pytest.raises(UserError, match=words):
        list(open_corpus(spec).documents())


def test_a_stream_is_closed_whatever_ends_its_reading(monkeypatch):
    import datasets

    closed = []

    class Stream:
        def __iter__(self):
            try:
                yield from ({"text": text} for text in ("a", "b", 3))
            finally:
                closed.append(True)

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Stream())
    with pytest.raises(UserError, match="has no field 'body'"):
        open_corpus("hf:x::body")
    assert len(closed) == 1
    corpus = open_corpus("hf:x")
    documents = corpus.documents()
    assert next(documents) == "a"
    documents.close()
    assert len(closed) == 3
    with pytest.raises(UserError, match="row 2"):
        list(corpus.documents())
    assert len(closed) == 4


LATE = """
import io, sys, threading, time
import pyarrow, pyarrow.dataset, pyarrow.parquet
from ufbert.data.corpora import datasets_library

class Slow(io.BytesIO):
    slow, asked = False, threading.Event()
    def read(self, *size):
        if self.slow:
            self.asked.set()
            time.sleep(1.0)
        return super().read(*size)

datasets_library()
file = Slow()
pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), file)
fragment = pyarrow.dataset.ParquetFileFormat().make_fragment(file)
fragment.ensure_complete_metadata()
file.slow = True
threading.Thread(target=next, args=(fragment.scanner().to_batches(),), daemon=True).start()
assert file.asked.wait(60)
sys.exit(2)
"""
"""Ends while one of Arrow's threads reads a file of Python's, whose next step needs the interpreter."""


def test_a_process_that_ends_while_arrow_reads_is_not_aborted():
    found = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, cwd=REPO)
    assert found.returncode == 2, found.stderr


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"a line\n"), "is not text but gzip; its name must end in .gz"),
        (b"PK\x03\x04" + bytes(20), "is not text but a zip archive or a workbook"),
        (bz2.compress(b"a line\n"), "is not text but bzip2"),
        (lzma.compress(b"a line\n"), "is not text but xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "is not text but zstandard"),
        (b"PAR1" + bytes(20), "is not text but parquet; name its folder as hf:FOLDER"),
        ('\ufeff{"text": "a line"}\n{"text": "b"}\n'.encode(), "is JSON lines, not plain text; .* hf:FOLDER::FIELD"),
    ],
    ids=["gzip", "zip", "bzip2", "xz", "zstandard", "parquet", "JSON lines"],  # gzip's bytes hold the time
)  # fmt: skip
def test_a_file_of_another_kind_is_named_whatever_it_is_called(tmp_path, content, words):
    (tmp_path / "corpus.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"corpus\.txt {words}"):
        list(open_corpus(f"text:{tmp_path / 'corpus.txt'}").documents())


def test_texts_that_look_like_other_files_and_names_with_commas_are_read(tmp_path):
    for name, text in {
        "a, b.txt": "{not JSON} but text\n",
        "c.txt": "{1} is a set\n",
        "d.txt": '"{}" is a string\n',
    }.items():
        (tmp_path / name).write_text(text)
        assert list(open_corpus(f"text:{tmp_path / name}").documents()) == [text.strip()]
    both = open_corpus(f"text:{tmp_path / 'c.txt'},{tmp_path / 'd.txt'}")
    assert list(both.documents()) == ["{1} is a set", '"{}" is a string']


def test_other_encodings_and_line_ends_are_named(tmp_path):
    for data, words in (
        ("one\n\ntwo\n".encode("utf-16"), r"a\.txt is not UTF-8: it begins as UTF-16 does"),
        (b"one\r\rtwo\r", r"a\.txt ends its lines with carriage returns alone"),
    ):
        (tmp_path / "a.txt").write_bytes(data)
        for read in (lambda path: list(open_corpus(f"text:{path}").documents()), text_files.read_lines):
            with pytest.raises(UserError, match=words):
                read(tmp_path / "a.txt")


def test_only_newlines_end_lines(tmp_path):
    ends = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    (tmp_path / "a.txt").write_bytes(f"\ufeff{ends}\r\nsecond\n\nthird".encode())
    assert list(open_corpus(f"text:{tmp_path / 'a.txt'}").documents()) == [f"{ends}\nsecond", "third"]
    assert text_files.read_lines(tmp_path / "a.txt") == [ends, "second", "", "third"]
    (tmp_path / "b.txt").write_bytes(b"fine\nb\xe9d\n")
    with pytest.raises(UserError, match=r"b\.txt, line 2: not UTF-8"):
        text_files.read_lines(tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"Cannot read .*none: No such file"):
        text_files.read_lines(tmp_path / "none")


def test_the_demo_text_is_read_where_it_is_installed():
    if demo_path() is None:
        with pytest.raises(UserError, match="--extra demo"):
            open_corpus("demo")
    else:
        documents = list(open_corpus("demo").documents())
        assert len(documents) > 9000
        assert sum(map(len, documents)) > 4_000_000


def test_a_long_line_is_split_at_blanks_and_used_whole_in_bounded_memory(tmp_path):
    words = [f"wörd{i}" for i in range(1000)]
    line = " ".join(words * 800)  # 6.1 million characters
    (tmp_path / "long.txt").write_text(f"before\n{line}\nafter\n\nnext\n", encoding="utf-8")
    corpus = open_corpus(f"text:{tmp_path / 'long.txt'}")
    tracemalloc.start()
    pieces = sum(1 for _ in corpus.documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    documents = list(corpus.documents())
    assert len(documents) == pieces >= 7
    assert max(map(len, documents)) <= text_files.MAX_CHARS
    assert " ".join(documents).split() == ["before", *words * 800, "after", "next"]
    assert documents[-1] == "next"
    assert peak < 25e6


def test_a_line_without_blanks_or_end_is_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_CHARS", 10)
    text = "äöü" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    documents = list(open_corpus(f"text:{tmp_path / 'a.txt'}").documents())
    assert "".join(documents) == text
    assert max(map(len, documents)) <= 10
    assert list(text_files.split_long("aaaa bbbb cccccccccccc d")) == ["aaaa bbbb", "cccccccccc", "cc d"]


def test_a_long_document_becomes_several_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_CHARS", 20)
    (tmp_path / "a.txt").write_text("one two three\nfour five\nsix\n\nseven\n")
    documents = list(open_corpus(f"text:{tmp_path / 'a.txt'}").documents())
    assert documents == ["one two three", "four five\nsix", "seven"]


def test_a_character_cut_short_inside_a_long_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_CHARS", 10)
    (tmp_path / "a.txt").write_bytes(b"fine\n" + b"abcd " * 10 + b"\xc3")
    with pytest.raises(UserError, match=r"a\.txt, line 2: not UTF-8"):
        list(open_corpus(f"text:{tmp_path / 'a.txt'}").documents())


def test_a_file_that_vanishes_or_grows_is_named(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some words\n\n" * 100_000)
    corpus = open_corpus(f"text:{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}")
    documents = corpus.documents()
    next(documents)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"Cannot read .*b\.txt: No such file"):
        list(documents)
    documents = open_corpus(f"text:{tmp_path / 'a.txt'}").documents()
    next(documents)
    with (tmp_path / "a.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match=r"a\.txt changed while it was being read"):
        list(documents)


def test_the_meter_tells_how_much_has_been_read(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n\n" * 100_000)
    with gzip.open(tmp_path / "b.gz", "wb") as file:
        file.write(os.urandom(1 << 20).hex().encode())
    corpus = open_corpus(f"text:{tmp_path / 'a.txt'},{tmp_path / 'b.gz'}")
    assert corpus.meter.total == sum(path.stat().st_size for path in tmp_path.iterdir())
    seen = [corpus.meter.read for _ in corpus.documents()]
    assert seen == sorted(seen)
    assert seen[0] < 0.3 * corpus.meter.total
    assert corpus.meter.read == corpus.meter.total


def test_a_source_is_known_by_place_size_and_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    spec, before = f"text:{path}", source_of(f"text:{path}")
    assert source_of(spec) == before
    os.utime(path, ns=(0, 0))
    assert source_of(spec) != before
    path.unlink()
    assert source_of(spec) == {**before, "files": None}


def test_the_libraries_show_no_bars_of_their_own(capfd):
    datasets = datasets_library()
    assert len(datasets.Dataset.from_dict({"text": ["a", "b"]}).map(lambda row: row)) == 2
    assert huggingface_hub.utils.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")

"""Prepared folders: found again, never half, whoever is killed and whatever breaks."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, SMALL

from ufbert.config import DataConfig
from ufbert.data import prepare as preparing
from ufbert.data.cache import cache_folder, finish, locate, reopen
from ufbert.data.corpora import Corpus
from ufbert.data.prepare import Recipe, prepare
from ufbert.data.prepared import DATA_FORMAT, open_prepared
from ufbert.data.tokenizer import train_wordpiece
from ufbert.errors import UserError
from ufbert.runtime.files import private_folder, publish

DATA = DataConfig(seq_len=32, tokenizer_chars=10**6, near_window=1000)


@pytest.fixture
def text(tmp_path, corpus_file) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(corpus_file.read_bytes())
    return path


def obtain(path, root, data=DATA, vocab_size=300):
    """(data, lines said, whether it was prepared now)."""
    said = []
    located = locate(f"text:{path}", data, vocab_size, None, str(root), said.append)
    return finish(located, lambda line: None, said.append), said, located.ready is None


def rows(data):
    return data.train.take(np.arange(len(data.train)))


def test_an_equal_run_finds_its_data_ready_and_another_does_not(text, tmp_path):
    root = tmp_path / "cache"
    one, _, fresh = obtain(text, root)
    assert fresh
    again, said, fresh = obtain(text, root)
    assert not fresh
    assert said == [f"prepared before: {one.folder}"]
    np.testing.assert_array_equal(rows(again), rows(one))
    for other in (replace(DATA, filter_worst=0.1), replace(DATA, order="quality"), replace(DATA, drop_near=False)):
        assert obtain(text, root, other)[2]
    assert obtain(text, root, vocab_size=200)[2]
    assert not obtain(text, root, replace(DATA, eval_rows=7, short_len=8))[2]
    os.utime(text, ns=(0, 0))
    assert obtain(text, root)[2]


def test_a_corpus_read_to_its_end_serves_every_larger_bound(text, tmp_path):
    whole, _, _ = obtain(text, tmp_path, replace(DATA, max_tokens=10**6))
    assert whole.manifest.exhausted
    assert not obtain(text, tmp_path, replace(DATA, max_tokens=10**7))[2]
    assert not obtain(text, tmp_path)[2]
    assert obtain(text, tmp_path, replace(DATA, max_tokens=1000))[2]


def test_a_corpus_that_vanishes_after_preparation_does_not_matter(text, tmp_path):
    one, _, _ = obtain(text, tmp_path / "cache")
    text.unlink()
    again, said, fresh = obtain(text, tmp_path / "cache")
    assert not fresh
    assert again.folder == one.folder
    assert "is gone; its prepared text is used" in said[0]
    with pytest.raises(UserError, match="does not exist"):
        obtain(text, tmp_path / "cache", replace(DATA, seq_len=16))


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_shard_is_named_and_prepared_again_while_the_corpus_is_there(text, tmp_path, damage):
    one, _, _ = obtain(text, tmp_path / "cache")
    path = one.folder / "train-00000.bin"
    before = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(before[:-10] if damage == "cut" else before[:500] + bytes([before[500] ^ 1]) + before[501:])
    with pytest.raises(UserError, match=r"train-00000\.bin.*delete its folder to prepare the data anew"):
        open_prepared(one.folder)
    again, said, fresh = obtain(text, tmp_path / "cache")
    assert fresh
    assert "train-00000.bin" in said[0]
    assert again.manifest.fingerprint == one.manifest.fingerprint
    assert path.read_bytes() == before


def test_a_foreign_tokenizer_or_manifest_is_refused(text, tmp_path):
    one, _, _ = obtain(text, tmp_path / "cache")
    tokens = (one.folder / "tokenizer.json").read_text()
    (one.folder / "tokenizer.json").write_text(tokens.replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(UserError, match="not the tokenizer"):
        open_prepared(one.folder)
    manifest = json.loads((one.folder / "manifest.json").read_text())
    (one.folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UserError, match="another version"):
        open_prepared(one.folder)
    (one.folder / "manifest.json").write_text("[")
    with pytest.raises(UserError, match="does not hold prepared data"):
        open_prepared(one.folder)
    again, _, fresh = obtain(text, tmp_path / "cache")
    assert fresh
    assert again.folder == one.folder
    assert again.manifest == one.manifest


def test_manifests_that_make_no_sense_are_passed_over_with_a_line(text, tmp_path):
    one, _, _ = obtain(text, tmp_path / "cache")
    good = json.loads((one.folder / "manifest.json").read_text())
    shard = good["train"][0]
    odd = [
        "", "5", "[]", "null", '"x"', "{", "[" * 100_000, "{}", json.dumps({**good, "format_version": 3, "new": 1}),
        *(json.dumps({k: v for k, v in good.items() if k != name}) for name in good),
        *(json.dumps({**good, name: wrong}) for name in good for wrong in (None, 5.5, [{"a": 1}])),
        json.dumps({**good, "train": [5]}), json.dumps({**good, "train": [{}]}), json.dumps({**good, "recipe": {}}),
        *(json.dumps({**good, "train": [{**shard, **wrong}]}) for wrong in ({"rows": "x"}, {"name": "../x"}, {"more": 1})),
    ]  # fmt: skip
    for number, content in enumerate(odd):
        (tmp_path / "cache" / f"odd-{number:03}").mkdir()
        (tmp_path / "cache" / f"odd-{number:03}" / "manifest.json").write_text(content)
    (tmp_path / "cache" / "odd-folder" / "manifest.json").mkdir(parents=True)
    (tmp_path / "cache" / "odd-file").write_text("")
    again, said, fresh = obtain(text, tmp_path / "cache")
    assert not fresh
    assert again.folder == one.folder
    assert said[-1] == f"prepared before: {one.folder}"
    named = {line.split("/odd-")[1].split(" ")[0] for line in said[:-1] if line.startswith("passed over: ")}
    assert named == {"folder", *(f"{number:03}" for number in range(len(odd)))}
    assert len(said) == len(odd) + 2


def test_a_file_where_prepared_data_is_to_be_is_replaced(text, tmp_path):
    one, _, _ = obtain(text, tmp_path / "cache")
    shutil.rmtree(one.folder)
    one.folder.write_text("a file")
    again, _, fresh = obtain(text, tmp_path / "cache")
    assert fresh
    assert again.folder == one.folder


def test_the_folder_is_chosen_by_option_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UFBERT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "ufbert" / "prepared"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/ufbert/prepared")
    monkeypatch.setenv("UFBERT_CACHE", "/mine")
    assert cache_folder() == Path("/mine/prepared")
    assert cache_folder("there") == Path("there")


def test_what_a_dead_process_left_is_removed_and_a_living_one_is_left_alone(tmp_path):
    with private_folder(tmp_path) as alive:
        code = (
            "import os, sys; from pathlib import Path; from ufbert.runtime.files import private_folder\n"
            "with private_folder(Path(sys.argv[1])) as folder:\n    (folder / 'half').write_text('x'); os.kill(os.getpid(), 9)"
        )
        found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPO, check=False)
        assert found.returncode == -signal.SIGKILL
        dead = list(tmp_path.glob("*/half"))
        assert len(dead) == 1
        with private_folder(tmp_path) as other:
            assert not dead[0].exists()
            assert alive.is_dir()
            assert other.is_dir()
    assert not list(tmp_path.iterdir())


PREPARE = """
import sys
from pathlib import Path
from ufbert.config import DataConfig
from ufbert.data import prepare as preparation
from ufbert.data.cache import finish, locate
preparation._BATCH_DOCUMENTS = 8
data = DataConfig(seq_len=32, tokenizer_chars=10**6, near_window=1000)
print("ready", flush=True)
located = locate(f"text:{sys.argv[1]}", data, 300, None, sys.argv[2], print)
print(finish(located, lambda line: None, print).manifest.fingerprint)
"""


def test_of_two_processes_that_prepare_the_same_the_first_stays(text, tmp_path):
    with private_folder(tmp_path) as one, private_folder(tmp_path) as two:
        (one / "from").write_text("one")
        (two / "from").write_text("two")
        publish(one, tmp_path / "final")
        publish(two, tmp_path / "final")
    assert (tmp_path / "final" / "from").read_text() == "one"
    root = tmp_path / "cache"
    args = [sys.executable, "-c", PREPARE, str(text), str(root)]
    both = [subprocess.Popen(args, stdout=subprocess.PIPE, text=True, cwd=REPO) for _ in range(2)]
    fingerprints = {process.communicate()[0].split()[-1] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = root.glob("text-*")
    assert fingerprints == {open_prepared(folder).manifest.fingerprint}
    assert not list(root.glob(".*.partial"))


def test_killed_at_random_moments_the_next_start_works_and_nothing_is_half_written(text, tmp_path):
    args = [sys.executable, "-c", PREPARE, str(text)]
    began = time.monotonic()
    whole = subprocess.run([*args, str(tmp_path / "whole")], capture_output=True, text=True, check=True, cwd=REPO)
    seconds = time.monotonic() - began
    fingerprint, root = whole.stdout.split()[-1], tmp_path / "cache"
    rng = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen([*args, str(root)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=REPO)
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.5 * seconds))
        process.kill()
        process.communicate()
        for folder in root.glob("text-*"):
            assert open_prepared(folder).manifest.fingerprint == fingerprint
    last = subprocess.run([*args, str(root)], capture_output=True, text=True, check=True, cwd=REPO)
    assert last.stdout.split()[-1] == fingerprint
    assert len(list(root.glob("text-*"))) == 1
    obtain(text, root, replace(DATA, seq_len=16))  # the next preparation, of anything, clears what was left
    assert not list(root.glob(".*.partial"))


def is_empty(root):
    return not list(root.iterdir())


@pytest.mark.long
def test_a_full_disk_is_one_sentence_and_leaves_nothing(text, tmp_path, monkeypatch):
    """A file system of two megabytes where mounting is allowed, and a disk that says it is full everywhere."""
    root = tmp_path / "small"
    root.mkdir()
    mounted = os.name == "posix" and os.geteuid() == 0
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(root)]
    mounted = mounted and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    text.write_text("\n\n".join(f"a document of its own, number {i}" for i in range(100_000)))
    try:
        if not mounted:
            monkeypatch.setattr("ufbert.data.spool.DocumentStore.append", no_space)
        with pytest.raises(
            UserError, match=r"Cannot write prepared data at .*No space left on device.*--prepared FOLDER"
        ):
            obtain(text, root)
        assert is_empty(root)
    finally:
        if mounted:
            subprocess.run(["umount", str(root)], check=True)


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where",
    [
        "ufbert.data.spool.DocumentStore.append",
        "ufbert.data.shards.RowWriter._finish_shard",
        "ufbert.data.prepared.Manifest.write",
    ],
)
def test_a_disk_that_fills_up_at_any_step_leaves_nothing(text, tmp_path, monkeypatch, where):
    monkeypatch.setattr(where, no_space)
    with pytest.raises(UserError, match="No space left on device"):
        obtain(text, tmp_path / "cache")
    assert is_empty(tmp_path / "cache")
    monkeypatch.undo()
    assert obtain(text, tmp_path / "cache")[2]


def test_an_output_folder_that_cannot_be_written_is_one_sentence(text, tmp_path, command):
    (tmp_path / "file").write_text("not a folder")
    args = ["train", "--budget=5steps", f"--corpus=text:{text}", f"--out={tmp_path / 'run'}", *SMALL]
    for place, words in ((tmp_path / "file" / "cache", "Not a directory"), ("/proc/ufbert", "No such file")):
        found = command(*args, f"--prepared={place}")
        assert found.returncode == 2
        assert found.stderr.startswith("error: Cannot write prepared data at ")
        assert words in found.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.txt", b"fine\nb\xe9d\n", "bad.txt, line 2: not UTF-8"),
        ("cut.gz", gzip.compress(os.urandom(50_000).hex().encode())[:-9000], "cut.gz is damaged or cut short"),
        ("no.gz", b"this is not gzip\n", "no.gz is damaged or cut short"),
        ("tiny.txt", b"two words\n", "too little text"),
    ],
)
def test_a_corpus_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, command, name, content, words):
    (tmp_path / name).write_bytes(content)
    found = command(
        "train", "--budget=5steps", f"--corpus=text:{tmp_path / name}", f"--out={tmp_path / 'run'}",
        f"--prepared={tmp_path / 'cache'}", *SMALL,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert words in found.stderr
    assert not (tmp_path / "run").exists()
    assert is_empty(tmp_path / "cache")


def test_a_corpus_file_that_vanishes_during_preparation_is_one_sentence(text, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes())
    located = locate(f"text:{text},{other}", DATA, 300, None, str(tmp_path / "cache"), print)

    def vanish_first(*arguments):
        other.unlink()
        return train_wordpiece(*arguments)

    monkeypatch.setattr(preparing, "train_wordpiece", vanish_first)
    with pytest.raises(UserError, match=r"Cannot read .*other\.txt: No such file or directory"):
        finish(located, print, print)
    assert is_empty(tmp_path / "cache")


def test_a_corpus_that_changes_during_preparation_is_refused(text, tmp_path):
    located = locate(f"text:{text}", DATA, 300, None, str(tmp_path / "cache"), print)

    def change(line):
        if line.startswith("packing the heldout"):
            text.write_text("something else")

    with pytest.raises(UserError, match="changed while it was being read"):
        finish(located, change, print)
    assert is_empty(tmp_path / "cache")


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        prepare(Corpus("x", "none", lambda: iter([])), tmp_path / "data", Recipe.of(DATA, 300))
    assert is_empty(tmp_path)


@pytest.mark.long
def test_a_fifty_megabyte_line_is_used(tmp_path, monkeypatch):
    words = np.array([word * 8 for word in ("cat", "dog", "king", "river", "house", "bird", "castle", "garden")])
    with (tmp_path / "line.txt").open("w") as file:
        rng = np.random.default_rng(0)
        for _ in range(56):
            file.write(" ".join(rng.choice(words, 25_000)) + " ")
    assert (tmp_path / "line.txt").stat().st_size > 50e6
    data, _, _ = obtain(tmp_path / "line.txt", tmp_path / "cache", replace(DATA, drop_near=False))
    assert data.manifest.documents_read >= 50
    assert data.manifest.tokens_read >= 56 * 25_000
    assert data.manifest.characters_read == pytest.approx((tmp_path / "line.txt").stat().st_size, rel=1e-4)


def test_rows_of_the_version_before_serve_the_run_that_began_with_them_and_no_new_one(text, tmp_path):
    first, _, _ = obtain(text, tmp_path / "root")
    values = json.loads((first.folder / "manifest.json").read_text())
    del values["unknown_share"]
    folder = first.folder.rename(first.folder.with_name("text-before"))  # its name, a hash, has the version in it
    (folder / "manifest.json").write_text(json.dumps({**values, "format_version": 2}))
    begun = open_prepared(folder)
    assert (begun.manifest.format_version, begun.manifest.train) == (2, first.manifest.train)
    assert reopen(str(folder), begun.manifest.fingerprint, print) is not None
    again, _, fresh = obtain(text, tmp_path / "root")
    assert fresh
    assert again.manifest.format_version == DATA_FORMAT


def test_a_run_goes_on_with_its_own_rows_or_not_at_all(text, tmp_path, command):
    from ufbert.cli import call

    run, cache = tmp_path / "run", tmp_path / "cache"
    call("train", ["--budget=2steps", f"--corpus=text:{text}", f"--out={run}", f"--prepared={cache}", *SMALL])
    used = json.loads((run / "config.json").read_text())["prepared_data"]
    assert used["fingerprint"] == open_prepared(Path(used["folder"])).manifest.fingerprint
    assert not (run / "data").exists()
    (run / "summary.json").unlink()  # as if it had been killed in its last moment
    resume = ["train", "--resume", f"--out={run}"]
    assert reopen(used["folder"], used["fingerprint"], print) is not None
    with pytest.raises(UserError, match="no longer holds the rows"):
        reopen(used["folder"], "other", print)
    moved = Path(used["folder"]).rename(tmp_path / "aside")
    found = command(*resume)
    assert found.returncode == 0, found.stderr
    assert "preparing the text again" in found.stdout
    assert open_prepared(Path(used["folder"])).manifest.fingerprint == used["fingerprint"]
    (run / "summary.json").unlink()
    shutil.rmtree(used["folder"])
    text.write_text(text.read_text().replace("cat", "cow"))
    found = command(*resume)
    assert found.returncode == 2
    assert "now gives other rows; start a new run" in found.stderr
    assert moved.is_dir()


def test_a_held_out_text_is_a_part_of_what_makes_prepared_text_equal(text, tmp_path):
    held, root = tmp_path / "held.txt", tmp_path / "cache"
    words = ["fox", "sea", "sees", "likes", "the", "rome", "london", "old", "in", "bird"]
    held.write_text("\n\n".join(" ".join(random.Random(n).choices(words, k=30)) for n in range(20)))

    def found(heldout: str) -> tuple[bool, str]:
        located = locate(f"text:{text}", DATA, 300, None, str(root), lambda line: None, heldout)
        finish(located, lambda line: None, lambda line: None)
        return located.ready is not None, located.folder.name

    plain, own = found(""), found(f"text:{held}")
    assert (plain[0], own[0]) == (False, False)
    assert plain[1] != own[1]
    assert found("") == (True, plain[1])
    assert found(f"text:{held}") == (True, own[1])
    held.write_text(held.read_text() + "\n\nAnother one.\n")
    changed = found(f"text:{held}")
    assert not changed[0]
    held.unlink()
    text.unlink()
    assert found(f"text:{held}")[0]
    with pytest.raises(UserError, match="does not exist"):
        found(f"text:{tmp_path / 'other.txt'}")

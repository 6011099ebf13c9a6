"""A folder is written by one process at a time, whoever dies and however."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import REPO
from filelock import FileLock

from ufbert.errors import UserError
from ufbert.runtime.claim import LOCK, claimed, claimed_new, discard, new_folder, refuse_links

OWNER = """
import subprocess, sys
from pathlib import Path
from ufbert.runtime.claim import claimed
with claimed(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"]) if "child" in sys.argv else None
    print(child.pid if child else "mine", flush=True)
    sys.stdin.read()
"""

RACER = """
import sys, time
from pathlib import Path
from ufbert.runtime.claim import claimed_new
from ufbert.errors import UserError
print("ready", flush=True)
sys.stdin.readline()
try:
    with claimed_new(Path(sys.argv[1])):
        with (Path(sys.argv[1]) / "metrics").open("a") as file:
            for step in range(100):
                file.write(f"{sys.argv[2]} {step}\\n")
                file.flush()
            print("mine", flush=True)
            sys.stdin.read()
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""


def start(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )


def test_the_second_comer_learns_who_has_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text('{"process": 1, "host": "gone", "since": "then"}')  # of a process that died
    owner = start(OWNER, tmp_path / "run")
    assert owner.stdout.readline() == "mine\n"
    with pytest.raises(UserError) as found, claimed(tmp_path / "run"):
        pass
    assert f"is in use by process {owner.pid} on {socket.gethostname()}, since" in str(found.value)
    assert "another folder with --out" in str(found.value)
    owner.communicate()
    assert not (tmp_path / "run").exists()  # nothing was in it


def test_one_process_does_not_claim_twice_either(tmp_path):
    with (
        claimed(tmp_path / "run"),
        pytest.raises(UserError, match=f"in use by process {os.getpid()} on"),
        claimed(tmp_path / "run"),
    ):
        pass


def test_a_killed_owner_holds_nothing_and_neither_does_what_it_started(tmp_path):
    owner = start(OWNER, tmp_path / "run", "child")
    child = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    os.kill(child, 0)  # still there
    with claimed_new(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    os.kill(child, signal.SIGKILL)
    owner.stdin.close()
    owner.stdout.close()


def test_of_six_that_start_together_one_writes(tmp_path):
    racers = [start(RACER, tmp_path / "run", number) for number in range(6)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.stdout.readline() for racer in racers]
    for racer in racers:
        racer.communicate()
    codes = sorted(racer.returncode for racer in racers)
    assert codes == [0, 2, 2, 2, 2, 2]
    (winner,) = (racer for racer in racers if racer.returncode == 0)
    assert said.count("mine\n") == 1
    assert sum(f"is in use by process {winner.pid} on" in line for line in said) == 5
    lines = (tmp_path / "run" / "metrics").read_text().splitlines()
    assert lines == [f"{racers.index(winner)} {step}" for step in range(100)]


def test_names_that_are_free_are_taken_by_one_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: new_folder(tmp_path / "runs", "tiny-5m"), range(24)))
    assert len(set(found)) == 24
    assert {path.name for path in found} == {"tiny-5m", *(f"tiny-5m-{i}" for i in range(2, 25))}


def test_what_is_there_is_left_alone_and_what_a_kill_left_of_a_beginning_is_not_in_the_way(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("kept")
    for name in ("file", "mine"):
        with pytest.raises(UserError, match="exists already; pass --resume"), claimed_new(tmp_path / name):
            pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter"]
    (tmp_path / "half").mkdir()
    for name in (LOCK, ".config.json.partial"):
        (tmp_path / "half" / name).write_text("")
    with claimed_new(tmp_path / "half"):
        (tmp_path / "half" / "config.json").write_text("")
        (tmp_path / "half" / "model").mkdir()
        discard(tmp_path / "half")
        assert [path.name for path in (tmp_path / "half").iterdir()] == [LOCK]
    assert not (tmp_path / "half").exists()
    with pytest.raises(UserError, match="Cannot make the run folder"), claimed_new(tmp_path / "file" / "run"):
        pass


def test_a_file_system_without_locks_is_used_with_a_note(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with claimed_new(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("")
    assert "has no locks; let no other process write there" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.json").exists()


def test_a_link_to_a_file_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    refuse_links(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "letter")
    with pytest.raises(UserError, match=r"metrics\.jsonl is a link, to .*letter; put a file in its place"):
        refuse_links(tmp_path / "run")

"""Ways out of the process: what stops it, what does not, and that nothing holds it."""

import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import REPO

from ufbert.runtime import console, signals
from ufbert.runtime.signals import StopSignals

NET = 120.0
"""Seconds after which a process is taken to hang: only a safety net."""


class Gone(io.StringIO):
    """A console that cannot be written to."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, _: str) -> int:
        raise self.error


def test_a_console_that_is_gone_costs_only_what_it_would_have_shown():
    for error in (OSError(5, "Input/output error"), OSError(28, "No space left on device"), BrokenPipeError()):
        print("text", file=console.Console(Gone(error), stops=False), flush=True)
    with pytest.raises(BrokenPipeError):
        print("text", file=console.Console(Gone(BrokenPipeError()), stops=True))


def test_a_closed_pipe_asks_a_run_to_save_and_stop():
    with StopSignals() as stops:
        print("text", file=console.Console(Gone(BrokenPipeError()), stops=True))
        assert stops.asked == signal.SIGPIPE
        print("text", file=console.Console(Gone(BrokenPipeError()), stops=True))  # the first request stands
    assert signals.WATCHER.note is None


def test_help_whose_reader_leaves_says_nothing_of_a_run():
    """As in `ufbert train --help | head -3`."""
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "ufbert", "train", "--help"]
    with os.fdopen(theirs, "w") as pipe:
        done = subprocess.run(command, cwd=REPO, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=NET)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_watcher_may_ask_from_its_own_thread():
    with StopSignals() as stops, ThreadPoolExecutor(1) as watcher:
        assert signals.WATCHER.note is not None
        watcher.submit(signals.WATCHER.note, signal.SIGPIPE, None).result()
        assert stops.asked == signal.SIGPIPE


def process(body: str, **options) -> subprocess.Popen[str]:
    """A process that runs `body` as if it were the command line's work."""
    script = (
        "import os, signal, sys, threading, time\nfrom ufbert import cli\nfrom ufbert.runtime import signals\n"
        "signals.GRACE, signals.ECHO = 0.5, 0.1\n"
        f"def work(args):\n{body}\n"
        "    return 0\ncli.main = work\ncli.run(['train'])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)}, **options,
    )  # fmt: skip


NOTED = (
    "    signals.WATCHER.note = lambda number, frame: None\n    signal.signal(signal.SIGTERM, signals.WATCHER.note)\n"
)
DEAF = (
    "    signals.WATCHER.unsaved = True\n    print('ready', flush=True)\n    lock = threading.Lock(); lock.acquire()\n"
)
"""Work that takes note of a signal, has something to save, and never comes to an end."""


def test_the_second_signal_ends_work_that_hears_of_none():
    started = process(f"{NOTED}{DEAF}    lock.acquire()")
    started.stdout.readline()
    os.kill(started.pid, signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):  # the first one waits for what is to be saved
        started.wait(0.5)
    os.kill(started.pid, signal.SIGTERM)
    assert started.communicate(timeout=NET)[1] == "SIGTERM: ended at once\n"
    assert started.returncode == 128 + signal.SIGTERM


def test_one_request_that_arrives_twice_is_one_request():
    """A launcher like `uv run`, and a service manager, send a process of theirs the signal that it got already."""
    body = "    signals.ECHO = 60.0\n    with signals.StopSignals() as stops:\n        stops.save_first()\n"
    body += "        print('ready', flush=True)\n        sys.stdin.readline()\n        print(stops.asked.name)\n"
    started = process(body, stdin=subprocess.PIPE)
    started.stdout.readline()
    os.kill(started.pid, signal.SIGTERM)
    assert started.stdout.readline() == "SIGTERM: saving; once more ends it at once\n"
    os.kill(started.pid, signal.SIGTERM)
    os.kill(started.pid, signal.SIGINT)
    assert started.communicate("\n", timeout=NET) == ("SIGTERM\n", "")
    assert started.returncode == 0


def test_an_echo_does_not_disturb_what_the_first_request_has_begun():
    body = "    signals.ECHO, signals.WATCHER.unsaved = 60.0, True\n"
    body += "    try:\n        print('ready', flush=True)\n        sys.stdin.readline()\n"
    body += "    finally:\n        print('cleaning', flush=True)\n        time.sleep(0.3)\n        print('clean')\n"
    started = process(body, stdin=subprocess.PIPE)
    started.stdout.readline()
    os.kill(started.pid, signal.SIGTERM)
    assert started.stdout.readline() == "cleaning\n"
    os.kill(started.pid, signal.SIGTERM)
    said, complaint = started.communicate(timeout=NET)
    assert said == "clean\n"
    assert complaint.count("raise Stopped(number)") == 1


def test_a_program_of_ones_own_hears_the_second_signal_itself(monkeypatch):
    monkeypatch.setattr(signals, "ECHO", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    try:
        with StopSignals() as stops:
            signal.raise_signal(signal.SIGINT)
            assert stops.asked == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_work_with_nothing_to_save_is_ended_where_it_does_not_end():
    started = process(f"{NOTED}{DEAF}    signals.WATCHER.unsaved = False\n    lock.acquire()")
    started.stdout.readline()
    os.kill(started.pid, signal.SIGTERM)
    assert started.communicate(timeout=NET)[1] == "SIGTERM: stopped, with nothing to save\n"
    assert started.returncode == 128 + signal.SIGTERM


def test_a_thread_that_hangs_does_not_hold_a_process_that_is_done():
    started = process("    threading.Thread(target=threading.Event().wait).start()\n    print('saved')")
    assert started.communicate(timeout=NET) == ("saved\n", "")
    assert started.returncode == 0


def test_two_hang_ups_are_one_request_and_an_ignored_one_is_none():
    """A terminal that closes may send two; nohup ignores both."""
    hangs = "    signals.WATCHER.note = lambda number, frame: print(number, flush=True)\n"
    hangs += "    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:\n"
    hangs += "        signal.signal(signal.SIGHUP, signals.WATCHER.note)\n"
    hangs += "    signals.WATCHER.unsaved = True\n    print('ready', flush=True)\n    sys.stdin.readline()\n"
    for ignored, said in ((False, ["1\n", "1\n"]), (True, [])):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        try:
            started = process(hangs, stdin=subprocess.PIPE)
        finally:
            signal.signal(signal.SIGHUP, before)
        started.stdout.readline()
        for line in said or [""] * 2:
            os.kill(started.pid, signal.SIGHUP)
            if said:
                assert started.stdout.readline() == line
        assert started.communicate("\n", timeout=NET) == ("", "")
        assert started.returncode == 0


def test_a_forked_child_is_not_heard_as_its_parent():
    body = "    ready, tell = os.pipe()\n    child = os.fork()\n"
    body += "    if not child: os.write(tell, b'.'); time.sleep(100)\n"
    body += "    os.read(ready, 1)\n    os.kill(child, signal.SIGTERM)\n"
    body += "    print(os.waitpid(child, 0)[1], flush=True)\n    time.sleep(1)"
    started = process(body)
    assert started.communicate(timeout=NET)[0] == f"{int(signal.SIGTERM)}\n"
    assert started.returncode == 0


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", ">&- 2>&- <&-", ">/dev/full"])
def test_without_a_console_the_work_is_done(closed, tmp_path):
    script = "from ufbert import cli\ndef work(args):\n    print('text', flush=True)\n"
    script += f"    open({str(tmp_path / 'f')!r}, 'w').write('whole')\n    return 0\n"
    script += "cli.main = work\ncli.run(['train'])"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "SCRIPT": script}
    ended = subprocess.run(f'"{sys.executable}" -c "$SCRIPT" {closed}', shell=True, env=environment)
    assert ended.returncode == 0
    assert (tmp_path / "f").read_text() == "whole"


def test_a_reader_that_is_gone_is_noticed_without_printing():
    body = "    noted = threading.Event()\n    signals.WATCHER.note = lambda number, frame: noted.set()\n"
    body += "    print('ready', flush=True)\n    noted.wait()"
    started = process(body)
    started.stdout.readline()
    started.stdout.close()
    assert started.wait(NET) == 0
    started.stderr.close()

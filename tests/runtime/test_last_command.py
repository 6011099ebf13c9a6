"""`--when-done` and its kin: which end runs what, once, and with which status."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import REPO

from ufbert import cli
from ufbert.errors import Interrupted, UserError
from ufbert.options.ending import EndOptions
from ufbert.runtime import signals
from ufbert.runtime.last_command import exit_code, last_commands
from ufbert.runtime.signals import Stopped

ENDS = [
    (UserError("the disk is full"), 2),
    (OSError("no such file"), 2),
    (Interrupted("saved", 143), 143),
    (Stopped(signal.SIGHUP), 129),
    (KeyboardInterrupt(), 130),
    (BrokenPipeError(), 141),
    (TypeError("a fault"), 70),
    (MemoryError(), 70),
]


def logging(log) -> EndOptions:
    note = "$UFBERT_EXIT_CODE $UFBERT_RUN"
    return EndOptions(
        when_done=f"echo done {note} >> {log}",
        when_finished=f"echo well {note} >> {log}",
        when_failed=f"echo badly {note} >> {log}",
    )


@pytest.mark.parametrize(("error", "code"), ENDS, ids=lambda value: getattr(type(value), "__name__", ""))
def test_every_bad_end_runs_the_commands_with_its_status(error, code, tmp_path):
    log, released, noted = tmp_path / "log", [], []
    with (
        pytest.raises(type(error)) as raised,
        last_commands(logging(log).last_commands, tmp_path, lambda: released.append(log.exists()), noted.append),
    ):
        raise error
    assert raised.value is error
    assert log.read_text() == f"badly {code} {tmp_path}\ndone {code} {tmp_path}\n"
    assert released == [False]
    assert noted == []  # a run that goes on may have them again


def test_a_good_end_is_noted_before_the_commands_run(tmp_path):
    log, order = tmp_path / "log", []
    options = logging(log)
    with last_commands(options.last_commands, tmp_path, lambda: order.append("released"), order.append):
        order.append("work")
    assert log.read_text() == f"well 0 {tmp_path}\ndone 0 {tmp_path}\n"
    assert order == ["work", f"{options.when_finished}\n{options.when_done}", "released"]


@pytest.mark.parametrize(("error", "code"), ENDS[:-1], ids=lambda value: getattr(type(value), "__name__", ""))
def test_the_status_is_the_one_that_the_command_line_ends_with(error, code, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "call", fail)
    monkeypatch.setattr(cli.console, "silence", lambda stream: None)
    monkeypatch.setattr(cli.crash, "report_crash", lambda error: "a sentence")
    assert exit_code(error) == code == cli.main(["train"])


def test_a_command_that_fails_is_said_and_hides_no_error(tmp_path, capfd):
    broken = EndOptions(when_done="exit 3", when_failed="exit 4").last_commands
    with (
        pytest.raises(UserError, match=r"is saved in .*, but `exit 3` ended with status 3"),
        last_commands(broken, tmp_path),
    ):
        pass
    with pytest.raises(UserError, match="the disk is full"), last_commands(broken, tmp_path):
        raise UserError("the disk is full")
    said = capfd.readouterr().err
    assert "the run has not ended well: the disk is full" in said
    assert "`exit 4` ended with status 4" in said
    assert "`exit 3` ended with status 3" in said


def test_a_console_that_is_gone_keeps_no_command_from_running(tmp_path, monkeypatch):
    class Gone:
        def write(self, _: str) -> int:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(Interrupted), last_commands(logging(tmp_path / "log").last_commands, tmp_path):
        raise Interrupted("SIGPIPE: saved", 141)
    assert "done 141" in (tmp_path / "log").read_text()


def test_a_library_that_holds_the_process_up_keeps_no_command_from_running(tmp_path):
    script = f"""
import sys, threading
from pathlib import Path
from ufbert.runtime import signals
from ufbert.runtime.last_command import last_commands
signals.GRACE = 0.2
signals.WATCHER.start()
lock = threading.Lock()
lock.acquire()
with last_commands(lambda code: [f"echo {{code}} $UFBERT_EXIT_CODE >> {tmp_path / "log"}"], Path("run")):
    while True:
        try:
            print("ready", flush=True)
            lock.acquire()
        except KeyboardInterrupt:
            pass
"""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    held = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert held.stdout is not None
    assert held.stdout.readline() == "ready\n"
    held.send_signal(signal.SIGTERM)
    held.communicate(timeout=120.0)
    assert held.returncode == 143
    assert (tmp_path / "log").read_text() == "143 143\n"
    assert signals.WATCHER.at_end is None

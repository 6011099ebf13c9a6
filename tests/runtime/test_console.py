"""Progress: whole lines on a terminal of 80 columns, in a file and in a notebook, and every phase with its name and time."""

import builtins
import re
import sys
import threading

import pytest
from terminal import Screen, terminal, told, wait_for

from ufbert.runtime import console
from ufbert.runtime.console import PROGRESS, phase, say, show


def test_training_tells_every_phase_in_whole_lines(finished_run):
    screen = Screen(finished_run[1])
    assert told(screen) >= {
        "starting jax on the device", "measuring this device", "looking for the text and checking it",
        "counting the words of the text", "making or restoring the weights", "compiling the evaluation",
        "compiling the training step", "training", "saving the model and the last checkpoint", "drawing the report",
    }  # fmt: skip
    assert any(line.startswith("step 80: held-out loss ") for line in screen.lines)
    assert "planned passes over the text: " in " ".join(screen.lines)
    assert all(line.startswith(("report ", "model ", "try ")) for line in screen.too_long.values())  # to be copied
    assert screen.lines[screen.row] == ""  # no line is left half
    assert not any(" left  " in line for line in screen.lines)  # nor one that was to be rewritten


def test_a_line_is_cut_between_words_and_what_is_printed_stays_whole():
    with terminal() as written:
        say("a sentence that goes on " * 10)
        with phase("training"):
            show("0:47 left  step 89  34,820 tokens/s  loss 6.018  lr 2.28e-03  and more than there is room for")
            wait_for("lr 2.28e-03 and more", written)
            print("a line of another library")
            print("and its warning", file=sys.stderr)
            with phase("saving", stays=False):
                wait_for("saving 0:00", written)
        text = written()
    screen = Screen(text)
    assert "room" not in text
    assert not screen.too_long
    words = set(" ".join(screen.lines).split())
    assert words >= {"sentence", "a", "another", "library"}
    assert "a line of another library" in screen.lines
    assert "and its warning" in screen.lines
    assert told(screen) == {"training"}
    assert "sentenc" not in words


def test_an_interrupt_leaves_the_terminal_as_it_was():
    with terminal() as written:

        def interrupted() -> None:
            with phase("training"), phase("saving"):
                wait_for("saving 0:00", written)
                raise KeyboardInterrupt

        before = sys.stdout, sys.stderr
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert (sys.stdout, sys.stderr) == before
        text = written()
    assert [line for line in Screen(text).lines if line] == []
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back, if it ever was away


@pytest.mark.parametrize("to_stdout", [True, False])
def test_a_file_gets_whole_lines_now_and_then_and_no_codes(capsys, monkeypatch, to_stdout):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    monkeypatch.setattr(console, "SLOW", 0.0)
    monkeypatch.setattr(PROGRESS, "on_stdout", to_stdout)
    announced = threading.Event()
    monkeypatch.setattr(PROGRESS, "_log", lambda *given, log=PROGRESS._log: (log(*given), announced.set()))
    with phase("compiling"):
        assert announced.wait(60)
    with phase("training", stays=False):
        for step in range(100):
            show(f"step {step}")
    with phase("evaluating", stays=False):
        pass
    out, err = capsys.readouterr()
    text, other = (out, err) if to_stdout else (err, out)
    assert re.fullmatch(r"compiling \.\.\.\ncompiling: \d+\.\d s\nstep 0\n", text)
    assert other == ""  # a result on standard output is not mixed with progress


def test_a_quick_phase_leaves_nothing(capsys):
    with phase("compiling"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_notebook_has_one_output_that_changes(monkeypatch, capsys):
    import IPython.display

    class ZMQInteractiveShell:
        """By this name rich knows a notebook."""

    class Output:
        def update(self, text):
            shown[-1].append(text.plain)

    def display(text, display_id):
        assert display_id is True
        assert "<pre" in text._repr_mimebundle_([], [])["text/html"]
        shown.append([text.plain])
        return Output()

    shown = []
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr(IPython.display, "display", display)
    with phase("training"):
        monkeypatch.setattr(console, "SLOW", 0.0)
        for step in range(100):
            show(f"0:47 left  step {step}")
        with phase("saving", stays=False):
            pass
        say("step 99: held-out loss 5.971 nats")
    (texts,) = shown
    assert texts[0] == "0:47 left  step 0"
    assert re.fullmatch(r"training: \d+\.\d s", texts[-1])
    assert len(texts) < 10
    assert capsys.readouterr() == ("step 99: held-out loss 5.971 nats\n", "")

"""The last net: what nobody foresaw is a line and a file, never a bare traceback."""

from pathlib import Path

import pytest

from ufbert.config.presets import load_preset
from ufbert.errors import UserError
from ufbert.runtime.crash import NET_OFF, report_crash


def crashed() -> Exception:
    try:
        raise LookupError("no such\nthing")
    except LookupError as error:
        return error


def test_a_crash_is_a_line_that_names_the_file_with_the_traceback(tmp_path, monkeypatch):
    monkeypatch.delenv(NET_OFF, raising=False)
    monkeypatch.setenv("UFBERT_CACHE", str(tmp_path))
    sentence = report_crash(crashed())
    assert sentence.startswith("LookupError: no such. ")
    assert "\n" not in sentence
    (path,) = (tmp_path / "crashes").iterdir()
    assert str(path) in sentence
    assert 'raise LookupError("no such\\nthing")' in path.read_text()


def test_where_the_cache_cannot_be_written_the_traceback_lies_elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv(NET_OFF, raising=False)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("UFBERT_CACHE", str(tmp_path / "file"))
    path = Path(report_crash(crashed()).rpartition(" ")[2].removesuffix("."))
    assert "LookupError" in path.read_text()
    path.unlink()


def test_tests_switch_the_net_off(monkeypatch):
    monkeypatch.setenv(NET_OFF, "1")
    with pytest.raises(LookupError):
        report_crash(crashed())


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1/0", "line 1: ZeroDivisionError: division by zero"),
        ("\nx = (", "line 2: SyntaxError: '\\(' was never closed"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit"),
        ("x\0y", "SyntaxError: .*null bytes"),
        (
            "from ufbert.config import *\nModelConfig(n_layrs=3)",
            "line 2: TypeError: .*unexpected keyword argument 'n_layrs'",
        ),
        ("from ufbert.config import *\nModelConfig(n_layers=0)", r"line 2: model\.n_layers is 0"),
        ("def f():\n    f()\nf()", "line 2: RecursionError"),
        ("config = 5", "does not define `config"),
    ],
)
def test_a_preset_that_fails_is_a_sentence_with_its_line(code, words, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=rf"mine\.py.*{words}") as refusal:
        load_preset(str(tmp_path / "mine.py"))
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("name", ["x" * 3_000_000, "a\0b", "a\0.py", "/", ""])
def test_a_preset_of_an_impossible_name_is_a_sentence(name):
    with pytest.raises(UserError, match="There is no preset"):
        load_preset(name)

"""The typed reader: what is refused, and in which words."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import pytest

from ufbert.config import ModelConfig
from ufbert.errors import UserError
from ufbert.runtime.typed import MAX_LINE, Count, convert, decode, read_lines, read_typed


class Point(NamedTuple):
    x: float
    y: int


@dataclass(frozen=True)
class Inner:
    rate: float = 0.0
    kinds: tuple[Literal["a", "b"], ...] = ()


@dataclass(frozen=True)
class Outer:
    name: str
    count: Count = 0
    loss: float | None = None
    scores: dict[str, float] | None = None
    inner: Inner = Inner()
    points: tuple[Point, ...] = ()
    parts: tuple[Inner, ...] = ()
    model: ModelConfig | None = None


def test_values_of_the_right_kind_are_read():
    text = '\ufeff{"name": "é", "loss": 3, "points": [[1, 2]], "inner": {"kinds": ["a"]}, "scores": {"x": 0.5}, "other": [[]]}'
    wanted = Outer("é", loss=3.0, points=(Point(1.0, 2),), inner=Inner(kinds=("a",)), scores={"x": 0.5})
    assert decode(text, Outer, "here") == wanted
    assert decode(text.encode(), dict[str, object], "here")["other"] == [[]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "here: name is missing."),
        ('{"name": "a", "parts": [{}, {"rate": "x"}]}', 'here: parts[1].rate is "x"; it must be a finite number.'),
        ('{"name": 5}', "here: name is 5; it must be text."),
        ('{"name": "a", "count": 1.0}', "here: count is 1.0; it must be a whole number at least 0 and"),
        ('{"name": "a", "count": true}', "here: count is true; it must be a whole number"),
        ('{"name": "a", "count": -1}', "here: count is -1; it must be a whole number at least 0"),
        ('{"name": "a", "loss": "x"}', 'here: loss is "x"; it must be a finite number or null.'),
        ('{"name": "a", "loss": 1e999}', "here: loss is 1e999; it must be a finite number or null."),
        ('{"name": "a", "scores": {"x": 1, "y": null}}', "here: scores.y is null; it must be a finite number."),
        ('{"name": "a", "inner": {"kinds": ["a", "c"]}}', 'here: inner.kinds[1] is "c"; it must be one of a, b.'),
        ('{"name": "a", "points": [[1]]}', "here: points[0] is [1]; it must be a list of x, y."),
        ('{"name": "a", "model": {"n_layers": 0}}', "here: model.n_layers is 0; it must be a whole number at least 1"),
        (
            '{"name": "a", "n": 1, "inner": {"m\\n": 2}, "parts": [{"o": 1}]}',
            "does not know: 'inner.m\\n', n, parts.o.",
        ),
        ('{"name": "a", "count": ' + "9" * 5000 + "}", "here: count is 999"),
        ('{"name": "a", "other": ' + "[" * 100_000 + "}", "here is not readable JSON: it is nested too deeply."),
        ('{"name": "a", "count": 5', "here is not readable JSON: it is cut short."),
        (
            '{"name": "a",\n "loss": NaN}',
            "here is not readable JSON: invalid character in line 2, at '\"loss\": NaN}'.",
        ),
        ('{"name": 5, "loss": NaN}', "here is not readable JSON: invalid character"),
        (b'{"name": "\xff"}', "here is not readable JSON: it is not UTF-8 text."),
        (b'{"name": "a", "\xff": 1}', "here is not readable JSON: it is not UTF-8 text."),
        (" ", "here is not readable JSON: it is empty."),
        ("[1]", "here holds [1] where an object belongs."),
    ],
)
def test_others_are_a_sentence_that_names_the_field(text, words):
    with pytest.raises(UserError) as refusal:
        decode(text, Outer, "here", exact=True)
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_values_that_are_read_already_are_held_to_the_same_rules():
    with pytest.raises(UserError, match=r"here: inner\.rate is 'x'; it must be a finite number"):
        convert({"name": "a", "inner": {"rate": "x"}}, Outer, "here")
    with pytest.raises(UserError, match=r"here: model\.leaf_leak is nan; it must be a finite number"):
        convert({"name": "a", "model": {"leaf_leak": float("nan")}}, Outer, "here")
    with pytest.raises(UserError, match="does not know: colour"):
        convert({"name": "a", "colour": 1}, Outer, "here", exact=True)


def test_only_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "large").write_bytes(b" " * 1001)
    for name, words in (
        ("large", "1,001 bytes; such a file has at most 1,000"),
        ("none", "no file"),
        ("", "not a file"),
        ("\0", "Cannot"),
    ):
        with pytest.raises(UserError, match=words):
            read_typed(tmp_path / name, Outer, most=1000)


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [
        b'{"name": "a"}',
        b'{"name": 5}',
        b"\xff",
        b"",
        b"[" * 9999,
        b" " * 2 * MAX_LINE,
        b'{"name": "b", "loss": NaN}',
        b'{"na',
    ]
    path.write_bytes(b"\n".join(lines))
    assert [line.name for line in read_lines(path, Outer)] == ["a", "b"]
    assert list(read_lines(tmp_path / "none", Outer)) == []
    with pytest.raises(UserError, match="not a file of at most 10 bytes"):
        list(read_lines(path, Outer, most=10))

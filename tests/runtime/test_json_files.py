"""What is written is JSON, and what was damaged is left out."""

import json
import math

from ufbert.runtime.files import to_json_text, write_json
from ufbert.runtime.metrics import JsonlWriter, read_records


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def test_numbers_that_are_not_finite_become_null(tmp_path):
    value = {
        "a": math.nan,
        "b": [1.5, math.inf, (-math.inf, "NaN")],
        "c": {"d": {"e": math.nan}},
        "f": True,
        "g": 10**30,
    }
    wanted = {"a": None, "b": [1.5, None, [None, "NaN"]], "c": {"d": {"e": None}}, "f": True, "g": 10**30}
    write_json(tmp_path / "summary.json", value)
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(value)
    writer.close()
    for name in ("summary.json", "metrics.jsonl"):
        assert json.loads((tmp_path / name).read_text(), parse_constant=refuse) == wanted
    assert to_json_text({"a": 1.0}) == '{"a": 1.0}'


def test_a_resumed_run_drops_damage_and_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": NaN}\n5\n[]\n\n{"step": "x"}\n{"event": "y"}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo'
    )
    JsonlWriter(path, keep_through_step=2).close()
    assert path.read_text() == '{"step": 1, "loss": null}\n{"event": "y"}\n{"step": 2}\n'
    assert read_records(path)[-1] == {"step": 2}

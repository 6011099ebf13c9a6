"""Signals are noted, and a run is held to a curve only where that is fair."""

import json
import os
import signal

import pytest

from ufbert.config.presets import preset_folder
from ufbert.errors import UserError
from ufbert.pretrain.reference import Point, Reference, no_reference_complaint, packaged_reference, reference_from_run
from ufbert.runtime.signals import StopSignals

CURVE = Reference("the run", (Point(0.0, 0.0, -1.0), Point(0.2, 1e6, 1.0), Point(0.6, 3e6, 2.0), Point(1.0, 5e6, 3.0)))


@pytest.mark.parametrize(
    ("now", "far_below"),
    [
        (Point(0.4, 2e6, 0.5), True),  # the curve was at 1.5 then
        (Point(0.4, 9e6, 0.5), True),
        (Point(0.4, 2e6, 1.2), False),  # within a quarter
        (Point(0.4, 1e6, 0.5), False),  # it has seen fewer tokens: no telling
        (Point(0.2, 1e6, 0.72), False),  # within 0.3 nats
        (Point(1.0, 5e6, 2.2), True),
        (Point(0.05, 9e6, -9.0), False),  # how a run starts says nothing
    ],
)
def test_a_run_is_held_to_a_curve_that_had_seen_no_more_text(now, far_below):
    complaint = CURVE.complaint(now)
    assert (complaint is not None) == far_below
    if complaint:
        assert "off track" in complaint
        assert f"{now.gain:.2f} below" in complaint


def test_without_a_curve_half_a_budget_must_beat_word_frequency():
    assert no_reference_complaint(Point(0.4, 1e6, -1.0)) is None
    assert no_reference_complaint(Point(0.5, 1e6, 0.2)) is None
    assert "half of the budget" in (no_reference_complaint(Point(0.5, 1e6, 0.05)) or "")


def test_packaged_curves_belong_to_presets_and_rise():
    curves = json.loads((preset_folder() / "reference_curves.json").read_text())
    for name in curves:
        config, scale, recipe = name.split()
        found = packaged_reference(config, scale, recipe)
        assert found is not None
        assert (preset_folder() / f"{config}.py").is_file()
        shares, tokens = [point.share for point in found.points], [point.tokens for point in found.points]
        assert shares == sorted(shares)
        assert tokens == sorted(tokens)
        assert found.points[-1].gain > found.points[0].gain + 1.0
    assert packaged_reference("tiny", "base", "modern") is None


def test_a_finished_run_is_a_curve(run_folder, tmp_path):
    found = reference_from_run(run_folder)
    assert [point.share for point in found.points] == pytest.approx([i / 5 for i in range(6)])
    assert found.points[-1].tokens == 80 * 8 * 32
    assert found.points[-1].gain == json.loads((run_folder / "summary.json").read_text())["gain_over_unigram"]
    with pytest.raises(UserError, match="does not hold a finished run"):
        reference_from_run(tmp_path)


def test_the_first_signal_is_noted_and_the_second_is_not_held_back(capsys, monkeypatch):
    monkeypatch.setattr("ufbert.runtime.signals.ECHO", 0.0)
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with StopSignals() as signals:
            assert signals.asked is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.asked == signal.SIGTERM
            assert came == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM).__name__ == "<lambda>"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "once more ends it at once" in capsys.readouterr().out

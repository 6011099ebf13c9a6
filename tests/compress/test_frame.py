"""The frame of `ufbert compress`: every method leaves a model folder and a report, goes on where it stopped, and refuses in
a sentence."""

import numpy as np
from conftest import COMPRESS

from ufbert.cli import call
from ufbert.compress.report import read_results
from ufbert.hub.folder import flatten, load_model
from ufbert.inference.predictor import Predictor


def test_magnitude_zeroes_the_smallest_weights_and_says_that_nothing_is_faster(tuned_folder, toy_task, tmp_path):
    out = tmp_path / "child"
    call(
        "compress",
        [
            str(tuned_folder),
            "--method=magnitude",
            "--keep=0.25",
            "--budget=6steps",
            f"--out={out}",
            *toy_task,
            *COMPRESS,
        ],
    )
    before, after = flatten(load_model(tuned_folder).params), flatten(load_model(out / "model").params)
    kernel = "encoder.layer_01.dense.in.kernel"
    kept = np.abs(before[kernel]) >= np.quantile(np.abs(before[kernel]), 0.75)
    assert (after[kernel][~kept] == 0).all()
    assert (after[kernel][kept] != 0).mean() > 0.99
    assert (after[kernel][kept] != before[kernel][kept]).mean() > 0.99  # it was tuned
    results = read_results(out)
    assert [row.name for row in results.rows] == ["before", "after"]
    assert results.updates == 6
    assert results.unit == "points"
    assert "nothing is smaller or faster" in (out / "report.md").read_text()
    assert "<svg" in (out / "report.html").read_text()
    assert Predictor(load_model(out / "model")).classify("word7 word8").label in ("no", "yes")

"""`ufbert bench encoder`: a small race against ONNX Runtime, what it reports, and that it times no wrong answer."""

import json
import sys

import pytest

from ufbert.errors import UserError
from ufbert.ops import native
from ufbert.options.bench import BenchEncoderOptions

TINY = [
    "--layers=1", "--d-model=64", "--tree-depth=3", "--vocab-size=200", "--shapes", "2x12", "1x16", "--fourier-len=16",
    "--blocks=2", "--seconds-a-block=0.02",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    bool(native.unavailable()),
    reason="it times the native kernels, and there are none; where there is a compiler, test_native.py fails then",
)


@pytest.mark.long
def test_a_small_race(command, tmp_path):
    done = command(
        "bench",
        "encoder",
        *TINY,
        "--peers",
        "onnxruntime",
        "onnxruntime-int8",
        "torch",
        f"--json={tmp_path / 'e.json'}",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "e.json").read_text())
    assert (tmp_path / "e.svg").read_text().startswith("<?xml")
    assert "torch is not there" in report["missing"]["torch"]
    assert "torch: missing" in done.stdout
    assert [one["shape"] for one in report["shapes"]] == ["2x12", "1x16"]
    first, second = report["shapes"]
    assert "fourier-float32" not in first["contestants"]
    assert set(first["contestants"]) == {
        "tree-float32",
        "tree-int8",
        "dense-float32",
        "dense-int8",
        "onnxruntime",
        "onnxruntime-int8",
    }
    assert "Fourier mixing" in second["contestants"]["fourier-int8"]["parts"]
    tree = first["contestants"]["tree-float32"]
    assert set(tree["parts"]) == {"projections", "attention", "trees", "LayerNorms"}
    assert len(tree["blocks"]["call"]) == 2
    assert tree["operations"] < first["contestants"]["onnxruntime"]["operations"]
    ratio = first["ratios"]["tree-float32"]["onnxruntime"]
    pairs = zip(first["contestants"]["onnxruntime"]["blocks"]["call"], tree["blocks"]["call"], strict=True)
    assert ratio["median"] == pytest.approx(sum(theirs / ours for theirs, ours in pairs) / 2)
    assert report["checked"]["tree-float32"]["error"] < 1e-4
    assert 0 < report["checked"]["onnxruntime"]["relative"] < 1e-4
    assert 1e-4 < report["checked"]["onnxruntime-int8"]["relative"] < 0.4
    assert report["starts"]["tree-int8"]["bytes"] < report["starts"]["tree-float32"]["bytes"]
    assert "### 2x12" in done.stdout


WRONG = """
import sys
sys.path[:0] = {path!r}
import numpy as np
from pathlib import Path
from ufbert.bench.worker import Worker, serve
folder, name, _ = sys.argv[1:]
liar = Worker(Path(folder), {{name: {{"call": lambda i, ids: np.ones((*ids.shape, 64), np.float32)}}}})
serve(lambda *_: ("a liar", liar.answers()))
"""


def test_wrong_answers_are_not_timed(command, tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG.format(path=sys.path))
    done = command("bench", "encoder", *TINY, "--peers", "onnxruntime", f"--peer-script={tmp_path / 'wrong.py'}")
    assert done.returncode == 2
    assert "onnxruntime computes another model: it is off by" in done.stderr
    assert "timing" not in done.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"shapes": ("8",)}, "'8' is not a shape"), ({"blocks": 0}, "blocks is 0"), ({"plot": "a.pdf"}, "must end in")],
)
def test_wrong_options_are_a_sentence(fields, message):
    with pytest.raises(UserError, match=message):
        BenchEncoderOptions(**fields)

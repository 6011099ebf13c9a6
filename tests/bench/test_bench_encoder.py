"""`ufbert bench encoder`: a small race against ONNX Runtime, what it reports, and that it times no wrong answer."""

import json

import pytest

from ufbert.ops import native

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
    assert len(tree["blocks"]) == 2
    assert tree["operations"] < first["contestants"]["onnxruntime"]["operations"]
    ratio = first["ratios"]["tree-float32"]["onnxruntime"]
    pairs = zip(first["contestants"]["onnxruntime"]["blocks"], tree["blocks"], strict=True)
    assert ratio["median"] == pytest.approx(sum(theirs / ours for theirs, ours in pairs) / 2)
    assert report["checked"]["tree-float32"]["error"] < 1e-4
    assert 0 < report["checked"]["onnxruntime"]["relative"] < 1e-4
    assert 1e-4 < report["checked"]["onnxruntime-int8"]["relative"] < 0.4
    assert report["starts"]["tree-int8"]["bytes"] < report["starts"]["tree-float32"]["bytes"]
    assert "### 2x12" in done.stdout


WRONG = """
import json, sys, numpy as np
folder = sys.argv[1]
print(json.dumps({"ready": "a liar"}), flush=True)
for line in sys.stdin:
    shape = json.loads(line)["shape"]
    np.save(f"{folder}/lie.npy", np.ones((*map(int, shape.split("x")), 64), np.float32))
    print(json.dumps({"file": "lie.npy"}), flush=True)
"""


def test_wrong_answers_are_not_timed(command, tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    done = command("bench", "encoder", *TINY, "--peers", "onnxruntime", f"--peer-script={tmp_path / 'wrong.py'}")
    assert done.returncode == 2
    assert "onnxruntime computes another model: it is off by" in done.stderr
    assert "timing" not in done.stderr
    for option, message in (
        ("--shapes=8", "'8' is not a shape"),
        ("--blocks=0", "blocks is 0"),
        ("--plot=a.pdf", "must end in"),
    ):
        refused = command("bench", "encoder", option)
        assert refused.returncode == 2
        assert message in refused.stderr

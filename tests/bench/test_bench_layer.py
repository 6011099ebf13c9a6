"""`ufbert bench layer`: it times nothing that is wrong or walks few paths, and says what is missing. No speed is tested."""

import json
import sys
from math import erf
from typing import Any

import numpy as np
import pytest

from ufbert.bench import layer, layer_ours
from ufbert.bench.harness import Entry, Missing, WorkerProcess
from ufbert.bench.layer import run_layer
from ufbert.bench.layer_dense import NumpyDense, gelu_in_place
from ufbert.bench.layer_gates import check_answers, check_everything
from ufbert.bench.layer_job import RightAnswers, Stored, dense_chain, samples, tree_chain, work, write_job
from ufbert.bench.layer_ours import OurLayers, as_stored, narrowed, weight_types
from ufbert.bench.report import distinct_nodes, limit, type_of
from ufbert.errors import UserError
from ufbert.ops import native
from ufbert.options.bench import BenchLayerOptions

SMALL: dict[str, Any] = {
    "rows": (1, 64), "d_model": 32, "tree_depth": 3, "dense": 15, "layers": 2, "blocks": 1, "seconds_a_block": 0.001,
    "threads": 1,
}  # fmt: skip
TWO_TREES = BenchLayerOptions(**SMALL, n_trees=2)

FAKE = """
import sys
sys.path[:0] = {path!r}
import numpy as np
from ufbert.bench.layer_job import dense_chain
from ufbert.bench.worker import Worker, serve

def start(folder, name, threads):
    arrays = dict(np.load(folder / "weights.npz"))
    chain = lambda i, x: dense_chain(x, arrays).y.astype(np.float32) * np.float32({factor})
    return "a fake", Worker(folder, {{name: {{"chain": chain, "layer": chain}}}}).answers()

serve(start)
"""
"""A torch peer without torch: the right answers times a factor."""


@pytest.fixture
def compiled():
    """For tests of paths by the native kernels."""
    if native.unavailable():
        pytest.skip(f"this machine cannot have what is timed here, the native kernels: {native.unavailable()}")


@pytest.fixture
def fake_peer(tmp_path):
    """(factor) -> options that run peers whose answers are right but for the factor."""

    def write(factor: float) -> dict[str, str]:
        script = tmp_path / "fake.py"
        script.write_text(FAKE.format(path=sys.path, factor=factor), encoding="utf-8")
        return {"peer_python": sys.executable, "peer_script": str(script)}

    return write


def test_right_contestants_are_timed_and_reported(compiled, fake_peer, tmp_path, capsys):
    to = tmp_path / "report.json"
    paths = ["native", "native-int8-exact"]
    peers = ["torch", "torch-int8"]
    run_layer(BenchLayerOptions(**SMALL, **fake_peer(1.0), paths=tuple(paths), peers=tuple(peers), json=str(to)))
    said = capsys.readouterr().out
    assert "best dense float32: torch" in said
    assert "best dense int8: torch-int8" in said
    assert "best dense layer of any type: torch" in said
    report = json.loads(to.read_text())
    assert report["missing"] == {}
    assert ("OTHER WORK RAN HERE" in said) == (report["machine"]["load"] > 0.5)
    assert [one["rows"] for one in report["rows"]] == [1, 64]
    for one in report["rows"]:
        assert list(one["contestants"]) == [*paths, *peers]
        assert list(one["ratios"]) == paths
        assert one["ratios"]["native"]["torch"]["pairs"] == 1
        blocks = [contestant["blocks"] for contestant in one["contestants"].values()]
        assert all(block["chain"][0] > 0 < block["layer"][0] for block in blocks)
    assert max(report["checked"]["errors"][path] for path in paths) < 1e-5
    assert report["checked"]["changed"] == dict.fromkeys(paths, 0)
    assert (tmp_path / "report.svg").read_text().startswith("<?xml")


def test_a_peer_that_answers_something_else_is_not_timed(command, fake_peer, tmp_path):
    fields = {
        **SMALL,
        **fake_peer(1.01),
        "rows": 64,
        "paths": "gather",
        "peers": "torch",
        "json": tmp_path / "report.json",
    }
    options = [text for name, value in fields.items() for text in (f"--{name.replace('_', '-')}", value)]
    done = command("bench", "layer", *options)
    assert done.returncode == 2
    assert "torch computes something else" in done.stderr
    assert "Nothing was timed" in done.stderr
    assert "µs" not in done.stdout
    assert not (tmp_path / "report.json").exists()


def test_zeros_are_labelled_and_what_is_missing_is_named(capsys):
    run_layer(BenchLayerOptions(**SMALL | {"rows": (8,)}, paths=("gather",), peers=("numpy", "torch"), zeros=True))
    said = capsys.readouterr().out
    assert "torch: missing: no interpreter that has torch was named (--peer-python)" in said
    true, false = said.split("### NOT A RESULT: weights and rows of zeros")
    assert "zeros" not in true
    wrong = [line for line in false.splitlines() if line.startswith("- ")]
    assert len(wrong) == 1
    assert "gather over numpy" in wrong[0]
    assert "NOT A RESULT" in wrong[0]


def test_claims_come_with_what_they_were_measured_against(capsys):
    run_layer(BenchLayerOptions(claims=True))
    said = capsys.readouterr().out
    for words in (
        "48x and 78x",
        "against its own dense layer",
        "one path",
        "38x, 34x and 32x",
        "None is of a whole model",
    ):
        assert words in said


def test_the_torch_peer_says_that_its_interpreter_has_no_torch(tmp_path):
    # This environment has no torch, on purpose.
    with (
        WorkerProcess("torch", [sys.executable, str(layer.PEER_SCRIPT), "x", "torch", "1"], tmp_path) as peer,
        pytest.raises(Missing, match=r"torch is not there: .* cannot import torch"),
    ):
        peer.wait_ready()
    with pytest.raises(Missing, match="Cannot start torch"):
        WorkerProcess("torch", [str(tmp_path / "nowhere")], tmp_path)


class InThisProcess(WorkerProcess):
    """RightAnswers without a process."""

    def __init__(self, worker) -> None:
        self.worker = worker

    def ask(self, do, wanted, **arguments):
        answer = getattr(self.worker, do)(**arguments)
        assert wanted in answer
        return answer


@pytest.fixture
def check(compiled, tmp_path):
    """(change of the worker) -> what the gates find of the gathered and the int8 path."""

    def run(change=lambda worker: None):
        write_job(tmp_path, TWO_TREES, False)
        worker = OurLayers(tmp_path, ["gather", "native-int8"], 1)
        change(worker)
        process = InThisProcess(worker)
        ours = [Entry(process, name) for name in ("gather", "native-int8")]
        return check_everything(tmp_path, TWO_TREES, ours, [])

    return run


def test_right_paths_pass_the_gates(check):
    found = check()
    assert max(found["errors"].values()) < 1e-5
    assert found["changed"]["gather"] == 0
    assert found["leaves"] == 1.0


def test_a_kernel_with_wrong_answers_is_refused(check):
    def break_answers(worker):
        right = worker.calls["native-int8"]
        worker.calls["native-int8"] = right | {"chain": lambda i, x: right["chain"](i, x) + 0.001}

    with pytest.raises(UserError, match=r"native-int8 computes something else: with 1 rows .* Nothing was timed"):
        check(change=break_answers)


def test_a_kernel_that_takes_wrong_turns_is_refused(check, monkeypatch):
    right = layer_ours.tree_nodes

    def turned(path, threads):
        def nodes(x, weights):
            found = right(path, threads)(x, weights)
            return found.at[0, 0, -1].add(1) if path == "native-int8" else found

        return nodes

    monkeypatch.setattr(layer_ours, "tree_nodes", turned)
    with pytest.raises(UserError, match=r"native-int8 takes wrong turns in layer 0\. Nothing was timed"):
        check()


def test_rows_that_walk_few_paths_are_refused(check):
    def make_alike(worker):
        inputs = np.load(worker.folder / "inputs.npy")
        np.save(worker.folder / "inputs.npy", np.broadcast_to(inputs[:1], inputs.shape))

    with pytest.raises(UserError, match=r"end in only 12% of a tree's leaves.*Nothing was timed"):
        check(change=make_alike)


def test_rows_near_a_turn_are_not_compared_and_too_few_others_are_refused():
    x, y = np.zeros((4, 2)), np.ones((4, 2))
    found = y.copy()
    found[0] = 7
    margin = np.array([1e-6, 1.0, 1.0, 1.0])
    assert check_answers("it", 4, found, x, RightAnswers(y, margin), 1e-4) == 0
    for wrong in (found + 1e-3, np.full_like(found, np.nan), found[:, :1]):
        with pytest.raises(UserError, match="it computes something else"):
            check_answers("it", 4, wrong, x, RightAnswers(y, margin), 1e-4)
    with pytest.raises(UserError, match="only 1 are clear of a turn"):
        check_answers("it", 4, found, x, RightAnswers(y, margin * [1, 0, 0, 1]), 1e-4)


def test_the_oracle_is_a_walk_down_the_tree(tmp_path):
    write_job(tmp_path, TWO_TREES, False)
    arrays, x = dict(np.load(tmp_path / "weights.npz")), np.load(tmp_path / "inputs.npy")[:4]
    parts = (arrays[name] for name in ("tree_in", "tree_bias", "tree_out"))
    layers = [(Stored(w_in), bias, Stored(w_out)) for w_in, bias, w_out in zip(*parts, strict=True)]
    for row, found in zip(x, tree_chain(x, layers).y, strict=True):
        y = row.astype(float)
        for w_in, bias, w_out in layers:
            added = np.zeros(32)
            for tree in range(2):
                node = 0
                for _ in range(4):
                    z = float(w_in.rows[tree, node].astype(float) @ y + bias[tree, node])
                    added += 0.5 * z * (1 + erf(z / 2**0.5)) * w_out.rows[tree, node].astype(float)
                    node = 2 * node + (2 if z > 0 else 1)
            y = y + added
        np.testing.assert_allclose(found, y, atol=1e-12)


def test_numpys_gelu_and_layer_are_near_the_exact_ones(tmp_path):
    z = np.linspace(-50, 50, 100001, dtype=np.float32)
    found, wanted = z.copy(), np.array([0.5 * v * (1 + erf(v / 2**0.5)) for v in z.tolist()])
    gelu_in_place(found)
    np.testing.assert_allclose(found, wanted, atol=4e-5)
    write_job(tmp_path, TWO_TREES, False)
    arrays, x = dict(np.load(tmp_path / "weights.npz")), np.load(tmp_path / "inputs.npy")
    for threads in (1, 2):
        np.testing.assert_allclose(NumpyDense(arrays, threads).chain(x), dense_chain(x, arrays).y, atol=2e-4)


def test_narrow_weights_are_near_the_float32_ones_and_exact_paths_keep_their_input_weights():
    w = np.random.default_rng(0).standard_normal((3, 32), np.float32)
    every = (np.arange(3),)
    assert np.array_equal(as_stored(narrowed(w, "float32")).take(every), w)
    np.testing.assert_allclose(as_stored(narrowed(w, "bfloat16")).take(every), w, rtol=2**-8)
    np.testing.assert_allclose(as_stored(narrowed(w, "int8")).take(every), w, atol=np.abs(w).max() / 253)
    assert weight_types("native-int8-exact") == ("float32", "int8")
    assert weight_types("native-bf16") == ("bfloat16", "bfloat16")
    assert weight_types("gather") == ("float32", "float32")


def test_the_limit_counts_distinct_nodes_once():
    assert distinct_nodes(1, 11) == pytest.approx(12)
    assert distinct_nodes(128, 11) == pytest.approx(658, abs=1)  # as in the notes of the prototypes
    assert distinct_nodes(10**9, 3) == pytest.approx(15)
    options, machine = BenchLayerOptions(), {"read": 1e10, "float32": 1e11, "bfloat16": 2e11}
    assert work("native", 1, options)[:2] == pytest.approx((12 * 2 * 768 * 4 + 2 * 768 * 4, 48 * 768))
    assert work("native-int8-exact", 1, options).bytes == pytest.approx(12 * 768 * 5 + 2 * 768 * 4)
    assert work("native-int8-exact", 1, options).arithmetic == "float32"
    assert work("torch-bf16", 1, options) == (2 * 4095 * 768 * 2 + 2 * 768 * 4, 4 * 4095 * 768, "bfloat16")
    assert limit(work("jax", 4096, options), machine) == 4096 * 4 * 4095 * 768 / 1e11
    assert limit(work("torch-int8", 1, options), machine) is None
    assert [type_of(name) for name in ("jax", "jax-bf16", "torch-int8")] == ["float32", "bfloat16", "int8"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rows": (0,)}, "rows is .*at least 1"),
        ({"rows": ()}, "at least one number of rows"),
        ({"layers": 0}, "layers is 0"),
        ({"seconds_a_block": 0.0}, "seconds_a_block is .*above 0"),
        ({"seconds_a_block": float("nan")}, "seconds_a_block is .*above 0"),
        ({"plot": "a.gif"}, "must end in .svg or .png"),
    ],
)
def test_wrong_options_are_a_sentence(fields, said):
    with pytest.raises(UserError, match=said):
        BenchLayerOptions(**fields)


def test_a_report_without_a_folder_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere to write"):
        run_layer(BenchLayerOptions(json=str(tmp_path / "nowhere" / "report.json")))


def test_exact_routing_adds_its_paths_once():
    assert BenchLayerOptions(paths=("gather", "native-int8-exact"), exact_routing=True).our_paths == (
        "gather", "native-int8-exact", "native-bf16-exact",
    )  # fmt: skip
    assert samples(1) == [0]
    assert samples(64)[0] == 0
    assert samples(64)[-1] == 63


def test_without_kernels_the_rest_is_timed_and_none_at_all_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(layer.native, "unavailable", lambda: "there is no compiler")
    with pytest.raises(
        UserError, match="None of the paths can be used; there are no native kernels: there is no compiler"
    ):
        layer.measure(BenchLayerOptions(**SMALL, paths=("native",)), False)

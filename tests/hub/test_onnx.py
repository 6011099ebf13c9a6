"""Models as ONNX graphs: ONNX Runtime gives the answers of the encoder, trees turn at the same nodes, and int8 is near."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import FAMILIES

from ufbert import nn
from ufbert.data.encode import encode_texts
from ufbert.errors import UserError
from ufbert.hub import onnx_export
from ufbert.hub.folder import load_model

TEXTS = ["the cat sees the dog", "a king", "the river in london follows the bird to the old house"]


encode = jax.jit(nn.encode, static_argnames="config")


def run(path, batch) -> dict[str, np.ndarray]:
    """What ONNX Runtime gives for a batch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {"input_ids": batch.ids, "attention_mask": batch.segment_ids, "token_type_ids": batch.type_ids}
    wanted = [one.name for one in session.get_inputs()]
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, {k: given[k].astype(np.int64) for k in wanted}), strict=True))


@pytest.mark.parametrize(
    ("name", "head", "pooling"),
    [
        *((name, "masked_lm", "first") for name in FAMILIES),
        ("crammed", "classifier", "first"),
        ("bert", "classifier", "first"),
        ("fourier", "classifier", "mean"),
    ],
)
def test_onnx_runtime_gives_our_answers(family, tmp_path, name, head, pooling):
    model = family(name, head, pooling=pooling)
    onnx_export.export_onnx(model, tmp_path / "out")
    config = replace(model.config, tree_backend="gather")
    for pairs in (None, TEXTS[::-1]):
        batch = encode_texts(model.tokenizer, TEXTS, pairs, config).pad([0, 1, 2])
        found = run(tmp_path / "out" / "model.onnx", batch)
        ids, segments, types = map(jnp.asarray, batch)
        hidden = encode(model.params, config, ids, segments, type_ids=types)[0]
        if head == "masked_lm":
            wanted = nn.masked_lm_logits(model.params, config, hidden)
        else:
            wanted = nn.classify(model.params, config, nn.pool(config, hidden, segments != 0))
        real = batch.segment_ids > 0
        np.testing.assert_allclose(found["last_hidden_state"][real], np.asarray(hidden)[real], atol=1e-4)
        np.testing.assert_allclose(
            found["logits"][real if head == "masked_lm" else ...],
            np.asarray(wanted)[real if head == "masked_lm" else ...],
            atol=2e-4,
        )


def test_operators_are_standard_and_trees_touch_only_their_paths(family):
    made = onnx_export.build(family("tree"))
    assert {node.domain for node in made.graph.node} <= {"", "ai.onnx"}
    trees = {one.name for one in made.graph.initializer if list(one.dims) == [63, 32]}
    assert len(trees) == 4
    assert {node.op_type for node in made.graph.node if trees & set(node.input)} == {"Gather"}


def test_dense_parts_can_be_quantised(family, tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = family("tree")
    onnx_export.export_onnx(model, tmp_path / "out")
    quantize_dynamic(tmp_path / "out" / "model.onnx", tmp_path / "int8.onnx", weight_type=QuantType.QInt8)
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 4 * 2
    batch = encode_texts(model.tokenizer, TEXTS, None, model.config).pad([0, 1, 2])
    full, narrow = (
        run(path, batch)["last_hidden_state"] for path in (tmp_path / "out" / "model.onnx", tmp_path / "int8.onnx")
    )
    error = np.linalg.norm(full - narrow) / np.linalg.norm(full)
    assert 1e-4 < error < 0.5


def test_the_command_writes_a_folder_and_refuses_what_it_cannot(run_folder, tmp_path, command, monkeypatch):
    done = command("export", run_folder / "model", "--to=onnx", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "model.onnx, opset 20" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "tokenizer.json"]
    again = command("export", run_folder / "model", "--to=onnx", f"--out={tmp_path / 'out'}")
    assert again.returncode == 2
    assert "exists already" in again.stderr
    monkeypatch.setattr(onnx_export, "LARGEST", 1000)
    with pytest.raises(UserError, match="and an ONNX file at most 2"):
        onnx_export.export_onnx(load_model(run_folder / "model"), tmp_path / "big")
    assert not (tmp_path / "big").exists()


def test_hashed_tables_are_looked_up_and_not_multiplied(family):
    made = onnx_export.build(family("ngrams"))
    tables = {one.name for one in made.graph.initializer if list(one.dims) == [61, 32]}
    assert len(tables) == 3
    assert {node.op_type for node in made.graph.node if tables & set(node.input)} == {"Gather"}

"""Distillation: who teaches whom what, and where a student's weights come from; and models without a feedforward."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import COMPRESS

from ufbert import nn
from ufbert.cli import call
from ufbert.compress.distill import narrowed
from ufbert.compress.drop import without_feedforward
from ufbert.compress.report import read_results
from ufbert.compress.tune import even_pairs, hidden_distance
from ufbert.data.encode import Encoded
from ufbert.errors import UserError
from ufbert.hub.folder import flatten, load_model, save_model
from ufbert.inference.engine import Engine


def options(folder, out, *more: str) -> list[str]:
    return [str(folder), f"--out={out}", "--budget=4steps", *COMPRESS, *more]


@pytest.mark.long
def test_a_narrow_and_shallow_student_starts_from_a_layer_of_its_teacher_and_learns(tuned_folder, toy_task, tmp_path):
    student = ["--method=distill", "--from-layers=1", "--model.d-model=16", "--model.d-hidden=12"]
    call("compress", options(tuned_folder, tmp_path / "child", *student, *toy_task))
    child, results = load_model(tmp_path / "child" / "model"), read_results(tmp_path / "child")
    assert (child.config.n_layers, child.config.d_model, child.config.n_heads) == (1, 16, 1)
    assert "starts from layers 1 of its teacher, 100% of its weights" in results.notes[0]
    assert results.options["model.d_model"] == 16
    assert set(child.params) == {"encoder", "classifier"}  # no projection is left


def test_a_student_of_the_same_width_starts_as_its_teachers_layer_is(numbered):
    teacher = numbered("crammed", n_heads=4)
    config = replace(teacher.config, d_hidden=7, n_heads=3, head_width=8)
    flat, whole = flatten(narrowed(teacher, config)), flatten(teacher.params)
    kernel, chosen = "encoder.layer_00.glu.gate.kernel", flat["encoder.layer_00.glu.gate.kernel"]
    assert chosen.shape == (32, 7)
    assert all(any((column == other).all() for other in whole[kernel].T) for column in chosen.T)
    assert flat["encoder.layer_00.attention.out.kernel"].shape == (24, 32)


def test_hidden_states_are_compared_where_tokens_are():
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))
    real = jnp.array([[True, True, False], [True, False, False]])
    picked, wanted = np.asarray(student)[np.asarray(real)], np.asarray(teacher)[np.asarray(real)]
    distance = float(hidden_distance(student, teacher, real, None))
    assert distance == pytest.approx(((picked - wanted) ** 2).mean() / (wanted**2).mean(), rel=1e-5)
    matrix = jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)
    projected = float(hidden_distance(student, teacher, real, matrix))
    assert projected == pytest.approx(
        ((picked @ np.asarray(matrix) - wanted) ** 2).mean() / (wanted**2).mean(), rel=1e-4
    )
    assert even_pairs(3, 6) == ((0, 1), (1, 3), (2, 5))
    assert even_pairs(6, 6) == tuple((i, i) for i in range(6))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "The student would be its teacher"),
        (["--from-layers=5"], "--from-layers 5 must name layers from 0 to 1, the lowest first"),
        (["--from-layers=a"], "is not a list of whole numbers"),
        (["--student=tinny"], "There is no preset"),
        (["--model.vocab-size=70"], "would have 70 word pieces and its teacher has 60"),
        (["--budget=none", "--from-layers=0"], "A student learns from rows"),
        (["--keep=0.5"], "--keep belongs to --method prune or magnitude"),
    ],
)
def test_wrong_students_are_refused_in_a_sentence(tuned_folder, toy_task, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        call("compress", options(tuned_folder, tmp_path / "child", "--method=distill", *toy_task, *more))
    assert not (tmp_path / "child").exists(), "the mended command may name it again"


@pytest.mark.parametrize("name", ["crammed", "bert"])
def test_a_model_without_feedforward_answers_as_one_whose_feedforwards_write_nothing(numbered, name):
    model = numbered(name)
    child, ids = without_feedforward(model), jnp.asarray(np.random.default_rng(0).integers(5, 60, (2, 16)))
    for layer in model.params["encoder"].values():
        for kind in ("dense", "glu"):
            if kind in layer:
                layer[kind]["out"] = jax.tree.map(jnp.zeros_like, layer[kind]["out"])
    wanted = np.asarray(nn.encode(model.params, model.config, ids)[0])
    np.testing.assert_allclose(np.asarray(nn.encode(child.params, child.config, ids)[0]), wanted, atol=1e-5)
    rows = Encoded(ids.tolist(), [[0] * 16] * 2, 48, 0, 0, 0)
    np.testing.assert_allclose(np.stack(Engine(child).hidden(rows)), wanted, atol=1e-4)
    with pytest.raises(UserError, match="no feedforward to drop"):
        without_feedforward(child)


def test_feedforwards_are_dropped_without_rows_too(numbered, tmp_path):
    save_model(tmp_path / "model", numbered("bert", "masked_lm"))
    call("compress", options(tmp_path / "model", tmp_path / "child", "--method=drop-feedforward"))
    assert load_model(tmp_path / "child" / "model").config.feedforward == ("none",)
    assert read_results(tmp_path / "child").rows[1].lost is None

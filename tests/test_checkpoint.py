"""Checkpoints: the newest good one of the right run, or a sentence."""

import logging
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufbert.checkpoint import Checkpoints
from ufbert.errors import UserError

IDENTITY = {"configuration": "a", "tokenizer": "b"}


def state_of(number: int):
    return {"w": jnp.arange(1000, dtype=jnp.float32) + number, "step": jnp.int32(number), "none": None}


@pytest.fixture
def shapes():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state_of(0))


@pytest.fixture
def checkpoints(tmp_path):
    """Four saves of which 2 had the lowest loss; two are kept by age."""
    found = Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2)
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = state_of(1)
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 4.5)):
        found.save(step, state, loss, spent=10.0 * step)
        state = add(state)  # donates what is being saved
    found.wait()
    yield found
    found.close()


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_the_newest_and_the_best_stay(checkpoints, shapes):
    assert checkpoints.steps() == [2, 3, 4]
    said = []
    found = checkpoints.restore(shapes, said.append)
    assert (found.step, found.spent, said) == (4, 40.0, [])
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(4))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "metadata"])
def test_a_damaged_one_is_passed_over_with_a_sentence(checkpoints, shapes, damage):
    folder = checkpoints.folder / "4"
    path = folder / "_CHECKPOINT_METADATA" if damage == "metadata" else largest_file(folder)
    path.write_bytes(path.read_bytes()[: 0 if damage == "emptied" else path.stat().st_size // 2])
    said = []
    again = Checkpoints(checkpoints.folder, IDENTITY, keep=2)
    found = again.restore(shapes, said.append)
    assert found.step == 3
    assert said == ["checkpoint 4 is damaged or cut short; the one of step 3 is used"]
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(3))
    again.save(4, found.state, 1.0, 0.0)  # the run comes to that step once more
    again.wait()
    assert int(again.restore(shapes, said.append).state["step"]) == 3
    again.close()


@pytest.mark.parametrize("name", ["configuration", "tokenizer"])
def test_one_of_another_run_is_refused(checkpoints, shapes, name):
    other = Checkpoints(checkpoints.folder, IDENTITY | {name: "else"}, keep=2)
    with pytest.raises(UserError, match=f"checkpoint 4 is of another {name}; checkpoint 3 is of another {name}"):
        other.restore(shapes, print)
    other.close()


def test_where_there_is_none_there_is_none(tmp_path, shapes):
    checkpoints = Checkpoints(tmp_path / "none", IDENTITY, keep=2)
    assert checkpoints.restore(shapes, print) is None
    checkpoints.close()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoint"):
        Checkpoints(tmp_path / "file" / "checkpoints", IDENTITY, keep=2)


def test_a_disk_that_refuses_is_a_sentence_and_costs_nothing(checkpoints, shapes, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._writer, "save_async", full)
    with pytest.raises(
        UserError, match=r"Cannot write a checkpoint in .*No space left on device; earlier ones are kept"
    ):
        checkpoints.save(9, state_of(9), 1.0, 90.0)
    assert checkpoints.restore(shapes, print).step == 4


def test_a_checkpoint_that_cannot_be_begun_leaves_no_thread_waiting(tmp_path):
    """They waited five minutes for a folder that could not be made, and the process with them."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2)
    checkpoints.save(1, state_of(1), 1.0, 0.0)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"Cannot write a checkpoint in .*; earlier ones are kept"):
        checkpoints.save(2, state_of(2), 1.0, 0.0)
    checkpoints.close()
    assert not [thread for thread in threading.enumerate() if type(thread).__name__ == "_SignalingThread"]
    assert not logging.getLogger("absl").isEnabledFor(logging.ERROR)  # else tracebacks precede the sentence


def test_a_kill_before_the_sizes_were_noted_costs_nothing(checkpoints, shapes):
    sizes = checkpoints.folder / "4" / "sizes.json"
    sizes.rename(sizes.with_name(".sizes.json.partial"))
    said = []
    assert checkpoints.restore(shapes, said.append).step == 4
    assert said == []

"""Checkpoints: the newest good one of the right run, or a sentence."""

import json
import logging
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from ufbert.errors import UserError
from ufbert.pretrain.checkpoint import Checkpoints

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


def test_arrays_without_numbers_come_back_in_their_shape(tmp_path):
    """Orbax does not write them; a tree of depth 0 has no nodes."""
    state = {"node": jnp.zeros((1, 0, 8), jnp.bfloat16), "leaf": jnp.arange(3.0), "none": None}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found = Checkpoints(tmp_path / "checkpoints", IDENTITY, keep=2)
    found.save(1, state, 5.0, spent=1.0)
    found.wait()
    restored = found.restore(abstract, print)
    found.close()
    assert restored is not None
    assert (restored.state["node"].shape, restored.state["node"].dtype) == ((1, 0, 8), jnp.bfloat16)
    np.testing.assert_array_equal(restored.state["leaf"], state["leaf"])


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

    monkeypatch.setattr(ocp, "save_async", full)
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


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :] if content else b"x")


def make_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [empty, flip, lambda path: path.unlink(), make_a_folder])
def test_no_damage_to_any_file_is_more_than_a_sentence(checkpoints, shapes, tmp_path, damage):
    files = [path.relative_to(checkpoints.folder) for path in (checkpoints.folder / "4").rglob("*") if path.is_file()]
    assert len(files) > 8
    for number, name in enumerate(files):
        folder, said = tmp_path / f"copy-{number}", []
        shutil.copytree(checkpoints.folder, folder, ignore=shutil.ignore_patterns("2"))
        before = (folder / name).read_bytes()
        damage(folder / name)
        again = Checkpoints(folder, IDENTITY, keep=2)
        found = again.restore(shapes, said.append)
        unchanged = (folder / name).is_file() and (folder / name).read_bytes() == before  # one is empty as it is
        if unchanged or (
            name.name == "sizes.json" and not (folder / name).exists()
        ):  # as after a kill before it was there
            assert (found.step, said) == (4, [])
        else:
            assert (found.step, said) == (3, ["checkpoint 4 is damaged or cut short; the one of step 3 is used"]), name
        jax.tree.map(np.testing.assert_array_equal, found.state, state_of(found.step))
        again.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"spent": "x"}, {"spent": float("nan")}, {"spent": -1}, {"spent": 10**400}, {"spent": None}, {"identity": 5},
        {"identity": "a"}, {"identity": ["a"]}, {"heldout_loss": "x"}, 5, [], None, "text",
    ],
)  # fmt: skip
def test_json_of_wrong_kinds_is_damage(checkpoints, shapes, wrong):
    """Written by whoever can write a checksum, too, or before there were any."""
    folder = checkpoints.folder / "4"
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    about = {**metadata["custom_metadata"], **wrong} if isinstance(wrong, dict) else wrong
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({**metadata, "custom_metadata": about}))
    (folder / "sizes.json").unlink()
    said = []
    assert checkpoints.restore(shapes, said.append).step == 3
    assert said == ["checkpoint 4 is damaged or cut short; the one of step 3 is used"]


@pytest.mark.parametrize(
    "wrong",
    [
        "5",
        "[]",
        "{}",
        "null",
        '{"state/_METADATA": "x"}',
        "{",
        '{"a": [1, 2]}',
        "[" * 100_000,
        f'{{"a": {"9" * 5000}}}',
        '{"a\\u0000b": 1}',
    ],
)
def test_a_list_of_contents_that_makes_no_sense_is_damage(checkpoints, shapes, wrong):
    (checkpoints.folder / "4" / "sizes.json").write_text(wrong)
    assert checkpoints.restore(shapes, lambda _: None).step == 3


def test_checkpoints_of_earlier_versions_are_held_to_their_sizes(checkpoints, shapes):
    folder = checkpoints.folder / "4"
    sizes = {name: size for name, (size, _) in json.loads((folder / "sizes.json").read_text()).items()}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    (folder / ".DS_Store").write_text("of a file manager")
    assert checkpoints.restore(shapes, print).step == 4
    (folder / "sizes.json").write_text(json.dumps({**sizes, "_CHECKPOINT_METADATA": 1}))
    assert checkpoints.restore(shapes, lambda _: None).step == 3


def test_a_damaged_one_neither_ends_the_next_save_nor_takes_the_place_of_a_good_one(checkpoints, shapes):
    flip(checkpoints.folder / "4" / "_CHECKPOINT_METADATA")
    flip(largest_file(checkpoints.folder / "2"))
    again = Checkpoints(checkpoints.folder, IDENTITY, keep=2)
    assert again.restore(shapes, lambda _: None).step == 3
    assert again.steps() == [2, 3]  # 4 is to be saved again when the run comes there
    again.save(5, state_of(5), 9.0, 50.0)
    again.wait()
    assert again.steps() == [2, 3, 5]  # nobody has looked at 2, the best
    again.save(6, state_of(6), float("nan"), 60.0)
    again.wait()
    assert again.steps() == [2, 5, 6]
    assert "NaN" not in (checkpoints.folder / "6" / "_CHECKPOINT_METADATA").read_text()
    again.close()


def test_what_a_kill_left_of_a_save_or_a_removal_is_cleared_away(checkpoints, shapes):
    for name in ("7.orbax-checkpoint-tmp", "1.removed"):
        (checkpoints.folder / name / "state").mkdir(parents=True)
    (checkpoints.folder / "9").write_text("a file")
    again = Checkpoints(checkpoints.folder, IDENTITY, keep=2)
    assert again.restore(shapes, lambda _: None).step == 4
    again.save(9, state_of(9), 1.0, 90.0)
    again.wait()
    assert {path.name for path in checkpoints.folder.iterdir()} == {"4", "9"}
    again.close()

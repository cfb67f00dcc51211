"""A checkpoint is whole or told to be damaged; the last few and the best stay; a full disk is one sentence."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sftjax.config import UserError
from sftjax.train.checkpoint import Checkpoints


def state(n):
    """Several arrays that all say n."""
    return {"big": jnp.full((40, 30), float(n)), "more": {"row": jnp.full(7, n), "scalar": jnp.int32(n)}}


def says(restored):
    """The one number that all of a restored checkpoint says."""
    said = {float(x) for leaf in jax.tree.leaves(restored.state) for x in np.ravel(leaf)} | {restored.step, restored.extras["n"]}
    assert len(said) == 1, said
    return said.pop()


def write(directory, *steps, keep=9, **best):
    with Checkpoints(directory, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"n": step}, **best)


def on_disk(directory):
    return sorted(int(d.name) for d in directory.iterdir() if d.name.isdecimal())


def test_restored_is_the_newest_saved(tmp_path):
    write(tmp_path, 1, 2)
    with Checkpoints(tmp_path) as checkpoints:
        assert says(checkpoints.restore(state(0))) == 2
        assert says(checkpoints.restore(state(0), 1)) == 1


def test_a_part_is_restored_without_the_rest(tmp_path):
    write(tmp_path, 1)
    part = state(0) | {"big": None}
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore(part, part=True)
        assert says(restored) == 1 and jax.tree.structure(restored.state) == jax.tree.structure(part)
        with pytest.raises(UserError, match=r"of big it holds \[40, 30\] where this config makes nothing"):
            checkpoints.restore(part)


@pytest.mark.parametrize(
    "other", [{"none": jnp.zeros(3)}, {"big": jnp.zeros((40, 31))}, {"big": jnp.zeros((20, 30))}], ids=["name", "more", "less"]
)
def test_what_was_not_saved_is_not_restored(tmp_path, other):
    write(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="where this config makes"):
        checkpoints.restore(state(0) | other)


def test_nothing_saved_is_nothing_restored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state(0)) is None
        assert checkpoints.extras() is None


@pytest.mark.parametrize("damage", ["cut in half", "gone"])
def test_whatever_file_is_damaged_what_is_restored_was_saved(tmp_path, damage):
    write(tmp_path / "good", 1, 2)
    passed_over = 0
    files = [f.relative_to(tmp_path / "good") for f in (tmp_path / "good" / "2").rglob("*") if f.is_file()]
    for file in files:
        directory = shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        if damage == "gone":
            (directory / file).unlink()
        else:
            os.truncate(directory / file, (directory / file).stat().st_size // 2)
        said = []
        with Checkpoints(directory, say=said.append) as checkpoints:
            restored = says(checkpoints.restore(state(0)))
        assert restored in (1, 2)
        assert bool(said) == (restored == 1), (file, said)
        passed_over += restored == 1
    assert 3 <= passed_over <= len(files)


def test_a_state_of_another_shape_is_not_restored(tmp_path):
    write(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="where this config makes"):
        checkpoints.restore(state(0) | {"big": jnp.zeros((40, 31))})
    assert on_disk(tmp_path) == [1]


def test_the_best_stays_beside_the_last_in_another_process_too(tmp_path):
    write(tmp_path, 1, 2, 3, keep=2, best=1)
    assert on_disk(tmp_path) == [1, 2, 3]
    write(tmp_path, 4, keep=2, best=1)  # a new manager, which knows nothing of the scores of old
    assert on_disk(tmp_path) == [1, 3, 4]
    write(tmp_path, 5, keep=2, best=5)
    assert on_disk(tmp_path) == [4, 5]


@pytest.mark.parametrize("keep", [0, 1])
def test_the_last_one_stays_however_few_are_kept(tmp_path, keep):
    write(tmp_path, 1, 2, 3, keep=keep)
    assert on_disk(tmp_path) == [3]


def test_forget_after(tmp_path):
    write(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.forget_after(2)
    assert on_disk(tmp_path) == [1, 2]


def test_training_on_does_not_change_what_is_being_saved(tmp_path):
    """The state's buffers are given to the next step while the checkpoint is still written."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    s = jax.tree.map(lambda x: jnp.full((300, 300), x.ravel()[0]), state(1))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for n in range(1, 6):
            checkpoints.save(n, s, {"n": n})
            s = step(s)
    with Checkpoints(tmp_path) as checkpoints:
        assert [says(checkpoints.restore(s, n)) for n in range(1, 6)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_moves_to_another_sharding(tmp_path):
    devices = jax.devices()[:2]
    split = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",), devices=devices), jax.sharding.PartitionSpec("x"))
    write(tmp_path, 3)
    like = {"big": jax.device_put(state(0)["big"], split), "more": state(0)["more"]}
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(like)
    assert says(restored) == 3
    assert restored.state["big"].sharding == split


@pytest.mark.parametrize("where", ["when the save begins", "while it is written", "when all is closed"])
def test_a_full_disk_is_one_sentence_that_names_what_is_whole(tmp_path, monkeypatch, where):
    write(tmp_path, 1, keep=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def no_space(self, x, directory):
        raise full

    def no_space_at_once(*_, **__):
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing: [OS error 28: {full.strerror}]")  # as tensorstore says it

    if where == "when the save begins":
        monkeypatch.setattr(ocp.CheckpointManager, "save", no_space_at_once)
    else:
        monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", no_space)
    sentence = r"the disk is full; the checkpoint of step 1 is whole: free some space and run"
    with pytest.raises(UserError, match=sentence), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state(2), {"n": 2})
        if where != "when all is closed":
            checkpoints.wait()
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        assert says(checkpoints.restore(state(0))) == 1

import concurrent.futures
import errno
import logging
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from lcr.training import checkpoints
from lcr.training.checkpoints import (
    CheckpointError,
    CheckpointWriter,
    find_damage,
    from_named_arrays,
    list_steps,
    named_arrays,
    newest_good,
    read_checkpoint,
)

from pallas_kernels.tolerances import assert_close


def arrays(value=0.0):
    rng = np.random.default_rng(0)
    return {
        "params": {"a.kernel": jnp.asarray(rng.normal(size=(70, 30)), jnp.float32) + value},
        "training": {"step": jnp.int32(3), "0.mu": jnp.full(5, value, jnp.bfloat16)},
    }


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def writer(directory):
    writer = CheckpointWriter(directory, keep_last=2)
    yield writer
    writer.close()


def write(writer, losses):
    """Checkpoints of steps 1, 2, ... with these losses, each told by its arrays and its run."""
    for step, loss in enumerate(losses, start=1):
        writer.save(step, arrays(float(step)), {"step": step, "data": {"next_index": step}}, loss)
    writer.wait()


def largest_file(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_what_is_read_is_what_was_saved_bit_for_bit(writer, directory):
    write(writer, [None])
    like = jax.eval_shape(arrays)
    read, run = read_checkpoint(directory / "1", like)
    assert_close(read, arrays(1.0), "exact")
    assert jax.tree.map(lambda x: x.dtype, read) == jax.tree.map(lambda x: x.dtype, like)
    assert run == {"step": 1, "data": {"next_index": 1}}


def test_one_item_can_be_read_alone(writer, directory):
    write(writer, [None])
    read, _ = read_checkpoint(directory / "1", {"params": arrays()["params"]})
    assert_close(read, {"params": arrays(1.0)["params"]}, "exact")


def test_arrays_may_be_donated_while_they_are_being_written(writer, directory):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    held = arrays(1.0)
    writer.save(1, held, {}, None)
    for _ in range(20):
        held = spoil(held)
    writer.wait()
    assert_close(read_checkpoint(directory / "1", arrays())[0], arrays(1.0), "exact")


def test_a_pytree_survives_its_names():
    tree = {"b": (jnp.ones(2), {"c": jnp.zeros(3)}), "a": jnp.int32(4)}
    assert set(named_arrays(tree)) == {"a", "b.0", "b.1.c"}
    assert_close(from_named_arrays(tree, named_arrays(tree)), tree, "exact")


@pytest.mark.parametrize(
    "losses, kept",
    [([5.0, 4.0, 3.0, 2.0], [3, 4]), ([5.0, 1.0, 3.0, 2.0, 4.0], [2, 4, 5]), ([None, 2.0, 3.0, None], [2, 3, 4])],
)
def test_the_last_two_and_the_best_are_kept(writer, directory, losses, kept):
    write(writer, losses)
    assert list_steps(directory) == kept


@pytest.mark.parametrize("what", ["truncated", "missing", "changed"])
def test_a_damaged_checkpoint_is_passed_over_and_kept_aside(writer, directory, caplog, what):
    write(writer, [2.0, 1.0])
    file = largest_file(directory / "2")
    content = bytearray(file.read_bytes())
    if what == "truncated":
        os.truncate(file, len(content) // 2)
    elif what == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    expected = {"truncated": "bytes instead of", "missing": "is missing", "changed": "have changed"}[what]
    assert expected in find_damage(directory / "2")
    step, damaged = newest_good(directory)
    assert step == 1 and list(damaged) == [2]
    assert f"{directory / '2'} cannot be used" in caplog.text and expected in caplog.text
    assert (directory / "2").exists(), "reading must change nothing"

    writer.clear_away(damaged)
    assert list_steps(directory) == [1]
    assert (directory / "2.corrupt").is_dir()
    assert "kept as 2.corrupt" in caplog.text
    writer.save(2, arrays(2.0), {}, 1.0)  # the number is free again
    writer.wait()
    assert newest_good(directory) == (2, {})


@pytest.mark.parametrize("killed", ["before the manifest", "within the manifest", "within Orbax"])
def test_a_half_written_checkpoint_does_not_count_and_is_removed_when_training_goes_on(
    writer, directory, caplog, killed
):
    write(writer, [2.0, 1.0])
    if killed == "before the manifest":
        (directory / "2" / "manifest.json").unlink()
    elif killed == "within the manifest":
        os.truncate(directory / "2" / "manifest.json", 40)
    else:
        (directory / "2").rename(directory / "2.orbax-checkpoint-tmp-17")
    assert newest_good(directory) == (1, {})
    writer.clear_away({})
    assert sorted(path.name for path in directory.iterdir()) == ["1"]
    assert "was not written to the end: removed" in caplog.text


def test_a_second_damaged_checkpoint_of_a_step_is_kept_too(writer, directory):
    for _ in range(2):
        write(writer, [2.0])
        largest_file(directory / "1").unlink()
        writer.clear_away(newest_good(directory)[1])
    assert sorted(path.name for path in directory.iterdir()) == ["1.corrupt", "1.corrupt2"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tensorstore_no_space(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing: Failed to write 953 bytes: No space left on device")


def nearly_full(_):
    return SimpleNamespace(free=10_000)


@pytest.mark.parametrize(
    "place, name, fault",
    [
        (shutil, "disk_usage", nearly_full),
        (ocp.AsyncCheckpointer, "save", no_space),
        (ocp.AsyncCheckpointer, "wait_until_finished", tensorstore_no_space),
        (checkpoints, "file_sums", no_space),
        (os, "fsync", no_space),
    ],
    ids=["before", "while copying", "in the background", "while summing", "in the manifest"],
)
def test_a_full_disk_is_reported_and_costs_no_good_checkpoint(writer, directory, monkeypatch, place, name, fault):
    write(writer, [2.0])
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fault)
        with pytest.raises(CheckpointError) as caught:
            writer.save(2, arrays(2.0), {}, 1.0)
            writer.wait()
    message = str(caught.value)
    assert "checkpoint of step 2 could not be written" in message and "the disk is full" in message
    assert f"the last good one is {directory / '1'}. Free disk space" in message
    assert newest_good(directory)[0] == 1
    assert_close(read_checkpoint(directory / "1", arrays())[0], arrays(1.0), "exact")


def test_a_failure_without_an_earlier_checkpoint_says_so(writer, monkeypatch):
    monkeypatch.setattr(checkpoints, "file_sums", no_space)
    writer.save(1, arrays(), {}, None)
    with pytest.raises(CheckpointError, match="there is no earlier one"):
        writer.wait()


def test_a_failure_in_the_background_is_told_at_the_next_check(writer, monkeypatch):
    writer.check()
    monkeypatch.setattr(checkpoints, "file_sums", no_space)
    writer.save(1, arrays(), {}, None)
    concurrent.futures.wait([writer._commit])
    with pytest.raises(CheckpointError, match="the disk is full"):
        writer.check()
    writer.check()


def test_arrays_of_another_model_are_named(writer, directory):
    write(writer, [None])
    like = arrays()
    like["params"]["a.kernel"] = jnp.zeros((70, 31))
    like["params"]["b.kernel"] = jnp.zeros(2)
    with pytest.raises(CheckpointError, match=r"2 arrays of 'params' differ: a.kernel: \[70, 30, 'float32'\] instead"):
        read_checkpoint(directory / "1", like)


def test_a_folder_without_checkpoints_has_none(directory, caplog):
    caplog.set_level(logging.WARNING)
    assert newest_good(directory) == (None, {}) and list_steps(directory) == []
    assert not caplog.records

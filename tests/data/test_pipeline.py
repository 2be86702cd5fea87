"""Batches: a pure function of (seed, step, process), the same after a resume, whole over any number of processes."""

import json
from itertools import islice

import numpy as np
import pytest
from lcr.data.pipeline import make_batches
from lcr.data.schedule import BLOCK, LengthSchedule
from lcr.tasks import make_task

OPTIONS = {"batch_tokens": 512, "lengths": (70, 96, 128), "seed": 5}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):  # lengths from 20 to 900 bytes, every byte of a document naming it
        (folder / f"{i:02d}.txt").write_text(chr(ord("a") + i) * (20 + 80 * i))
    source = f"files:{folder}/*.txt"
    return {"passkey": make_task("passkey"), "text": make_task("text", source=source, data_dir=folder / "cache")}


def take(batches, count):
    return list(islice(batches, count))


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("name", ["passkey", "text"])
def test_shapes_and_types(tasks, name):
    shapes = set()
    for batch in take(make_batches(tasks[name], **OPTIONS), 30):
        shapes.add(batch["tokens"].shape)
        assert batch["tokens"].dtype == np.int32 and batch["loss_mask"].dtype == np.bool_
        assert batch["loss_mask"].shape == batch["tokens"].shape
        assert ("segment_ids" in batch) == (name == "text")
    assert shapes == {(7, 70), (5, 96), (4, 128)}


@pytest.mark.parametrize("name", ["passkey", "text"])
def test_batches_follow_from_the_seed(tasks, name):
    first = take(make_batches(tasks[name], **OPTIONS), 8)
    assert_same(first, take(make_batches(tasks[name], **OPTIONS), 8))
    other = take(make_batches(tasks[name], **OPTIONS | {"seed": 6}), 8)
    assert not all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["passkey", "text"])
@pytest.mark.parametrize("step", [0, 1, 7, 40])
def test_a_resumed_iterator_goes_on_where_the_saved_one_stood(tasks, name, step):
    batches = make_batches(tasks[name], **OPTIONS)
    take(batches, step)
    state = json.loads(json.dumps(batches.get_state()))
    following = take(batches, 12)
    resumed = make_batches(tasks[name], **OPTIONS)
    take(resumed, 3)
    resumed.set_state(state)
    assert_same(take(resumed, 12), following)
    assert resumed.get_state() == batches.get_state()


@pytest.mark.parametrize("name", ["passkey", "text"])
def test_the_union_over_processes_is_the_batch_of_one(tasks, name):
    options = {"batch_tokens": 560, "lengths": (70, 140), "seed": 1}
    whole = take(make_batches(tasks[name], **options), 10)
    for count in (2, 4):
        parts = [
            take(make_batches(tasks[name], **options, process_index=index, process_count=count), 10)
            for index in range(count)
        ]
        steps = zip(*parts, strict=True)
        joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in steps]
        assert_same(joined, whole)


def test_rows_of_a_batch_and_batches_differ(tasks):
    options = OPTIONS | {"lengths": (128,)}
    rows = np.concatenate([batch["tokens"] for batch in take(make_batches(tasks["passkey"], **options), 20)])
    assert len(np.unique(rows[:, -5:], axis=0)) > 75


def test_an_epoch_of_text_has_every_token_once_and_the_next_is_in_another_order(tasks):
    size = sum(20 + 80 * i for i in range(12))
    batches = take(make_batches(tasks["text"], batch_tokens=size, lengths=(size,), seed=3), 2)
    first, second = (batch["tokens"][0] for batch in batches)
    counts = np.bincount(first - 1 - ord("a"))
    np.testing.assert_array_equal(counts, 20 + 80 * np.arange(12))
    np.testing.assert_array_equal(np.sort(second), np.sort(first))
    assert (first != second).any()
    np.testing.assert_array_equal(np.unique(batches[0]["segment_ids"]), np.arange(1, 13))


def test_segments_of_text_are_documents(tasks):
    for batch in take(make_batches(tasks["text"], **OPTIONS), 20):
        changed = np.diff(batch["tokens"], axis=1) != 0  # each document is one letter, over and over
        np.testing.assert_array_equal(np.diff(batch["segment_ids"], axis=1), changed)
        np.testing.assert_array_equal(batch["segment_ids"][:, 0], 1)
        np.testing.assert_array_equal(batch["loss_mask"][:, 1:], ~changed)
        assert not batch["loss_mask"][:, 0].any()


def test_lengths_are_drawn_evenly_and_by_step():
    schedule = LengthSchedule((64, 128, 256), batch_tokens=512, seed=0)
    steps = [0, BLOCK - 1, BLOCK, 5 * BLOCK + 7, *range(3000)]
    lengths = [schedule.length(step) for step in steps]
    again = LengthSchedule((64, 128, 256), batch_tokens=512, seed=0)
    assert lengths == [again.length(step) for step in reversed(steps)][::-1]
    for length in (64, 128, 256):
        assert 0.28 < lengths.count(length) / len(lengths) < 0.39
    assert [schedule.rows(length) for length in (64, 128, 256, 1024)] == [8, 4, 2, 1]


def test_a_curriculum_changes_the_lengths_at_its_steps():
    schedule = LengthSchedule((64,), batch_tokens=512, seed=0, curriculum=((10, (64, 128)), (30, (256,))))
    assert {schedule.length(step) for step in range(10)} == {64}
    assert {schedule.length(step) for step in range(10, 30)} == {64, 128}
    assert {schedule.length(step) for step in range(30, 50)} == {256}
    assert schedule.all_lengths() == (64, 128, 256)


def test_a_run_does_not_go_on_with_another_corpus(tasks, tmp_path):
    (tmp_path / "a.txt").write_text("something else")
    other = make_task("text", source=f"files:{tmp_path}/*.txt", data_dir=tmp_path / "cache")
    state = make_batches(tasks["text"], **OPTIONS).get_state()
    with pytest.raises(ValueError, match="the run began with the corpus"):
        make_batches(other, **OPTIONS).set_state(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (96, 60)}, "length=60 is too short for task 'passkey': expected at least 67"),
        ({"curriculum": ((5, (66,)),)}, "length=66 is too short"),
        ({"lengths": ()}, "at least one length"),
        ({"lengths": (0,)}, "length=0: expected an integer of at least 1"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"seed": -1}, "seed=-1: expected an integer of at least 0"),
        ({"curriculum": ((5, (96,)), (5, (128,)))}, "from_step=5: expected an integer of at least 6"),
        ({"process_index": 2, "process_count": 2}, "process_index=2, process_count=2"),
        ({"process_count": 2}, "makes 7 rows of length 70, which do not divide among process_count=2"),
    ],
)
def test_bad_options_are_named(tasks, options, message):
    with pytest.raises(ValueError, match=message):
        make_batches(tasks["passkey"], **OPTIONS | options)

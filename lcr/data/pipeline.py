"""Batches for training: a pure function of (seed, step, process), with a position to save in a checkpoint.

    batches = make_batches(task, batch_tokens=16384, lengths=(128, 256, 512), seed=0)
    batch = next(batches)                  # {"tokens": int32[B, T], "loss_mask": bool[B, T]}
    position = batches.get_state()         # a small dict, ready for JSON
    batches.set_state(position)            # goes on with the batch that would have come next

Nothing is prefetched: a batch takes about a millisecond to make, and the device works meanwhile; so what `get_state`
says is exactly what was handed out.
"""

import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from lcr.data.packing import DocumentStream, Position, as_rows
from lcr.data.schedule import EXAMPLE, LengthSchedule
from lcr.tasks.interface import DocumentTask, Task

type Batch = dict[str, np.ndarray]


def make_batches(
    task: Task | DocumentTask,
    *,
    batch_tokens: int,
    lengths: Sequence[int],
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    curriculum: Sequence[tuple[int, Sequence[int]]] = (),
) -> grain.DatasetIterator:
    """An endless iterator of batches: dicts of tokens int32[B, T] and loss_mask bool[B, T].

    A task of documents has segment_ids int32[B, T] besides: documents are shuffled anew for every epoch and packed
    (`lcr.data.packing`), each row of an endless stream being full.

    Each step draws one of `lengths` (from the steps that `curriculum` names on, of its lengths); a batch of rows of T
    tokens has `rows = max(1, batch_tokens // T)` of them over all processes. This process gets rows
    `[process_index * rows / process_count, (process_index + 1) * rows / process_count)`, so the union over processes
    does not depend on how many there are.

    Raises ValueError where a length is shorter than the task's prompt, the rows of a length do not divide among the
    processes, or an argument is out of range; `set_state` does where the corpus is not the one of the state.
    """
    schedule = LengthSchedule(lengths, batch_tokens=batch_tokens, seed=seed, curriculum=curriculum)
    check_processes(schedule, process_index, process_count)
    shard = Shard(schedule, process_index, process_count)
    if isinstance(task, DocumentTask):
        return PackedBatches(task, shard)
    for length in schedule.all_lengths():
        if length < task.min_length():
            raise ValueError(
                f"length={length} is too short for task {task.name!r}: expected at least {task.min_length()}"
            )
    steps = grain.MapDataset.range(sys.maxsize).map(lambda step: example_batch(task, shard, step))
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


class Shard:
    """Which rows of each step's batch are this process's."""

    def __init__(self, schedule: LengthSchedule, process_index: int, process_count: int):
        self.schedule = schedule
        self.process_index = process_index
        self.process_count = process_count

    def rows(self, length: int) -> range:
        count = self.schedule.rows(length) // self.process_count
        return range(self.process_index * count, (self.process_index + 1) * count)


def example_batch(task: Task, shard: Shard, step: int) -> Batch:
    """The rows of step number `step`, each made from a random generator of its own."""
    length = shard.schedule.length(step)
    rows = shard.rows(length)
    tokens = np.empty((len(rows), length), np.int32)
    loss_mask = np.empty((len(rows), length), np.bool_)
    for i, row in enumerate(rows):
        example = task.example(np.random.default_rng([shard.schedule.seed, EXAMPLE, step, row]), length)
        tokens[i], loss_mask[i] = example.tokens, example.loss_mask
    return {"tokens": tokens, "loss_mask": loss_mask}


class PackedBatches(grain.DatasetIterator):
    """Batches of packed documents. Every process reads the whole stream and keeps its rows."""

    def __init__(self, task: DocumentTask, shard: Shard):
        super().__init__()
        documents = task.documents()
        shuffled = documents.seed(shard.schedule.seed).shuffle().repeat()
        self._stream = DocumentStream(shuffled, len(documents))
        self._shard = shard
        self._fingerprint = task.fingerprint()
        self._step = 0

    def __next__(self) -> Batch:
        schedule = self._shard.schedule
        length = schedule.length(self._step)
        tokens, starts = self._stream.take(schedule.rows(length) * length)
        rows = self._shard.rows(length)
        packed = as_rows(tokens, starts, length, len(tokens))
        self._step += 1
        return {name: array[rows.start : rows.stop] for name, array in packed._asdict().items()}

    def get_state(self) -> dict[str, Any]:
        position = self._stream.position
        return {
            "step": self._step,
            "document": position.document,
            "offset": position.offset,
            "corpus": self._fingerprint,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if state["corpus"] != self._fingerprint:
            raise ValueError(
                f"the run began with the corpus {state['corpus']!r}, but the source now holds {self._fingerprint!r}: "
                "bring the earlier files back, or start a new run"
            )
        self._step = state["step"]
        self._stream.position = Position(state["document"], state["offset"])


def check_processes(schedule: LengthSchedule, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index}, process_count={process_count}: expected 0 <= process_index < process_count"
        )
    for length in schedule.all_lengths():
        rows = schedule.rows(length)
        if rows % process_count:
            raise ValueError(
                f"batch_tokens={schedule.batch_tokens} makes {rows} rows of length {length}, which do not divide among "
                f"process_count={process_count}: make batch_tokens // length a multiple of it"
            )

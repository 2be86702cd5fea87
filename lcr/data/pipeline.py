"""Batches for training: a pure function of (seed, step, process), with a position to save in a checkpoint.

    batches = make_batches(task, batch_tokens=16384, lengths=(128, 256, 512), seed=0)
    batch = next(batches)                  # {"tokens": int32[B, T], "loss_mask": bool[B, T]}
    position = batches.get_state()         # a small dict of integers, ready for JSON
    batches.set_state(position)            # goes on with the batch that would have come next
"""

import sys
from collections.abc import Sequence

import grain
import numpy as np

from lcr.data.schedule import EXAMPLE, LengthSchedule
from lcr.tasks.interface import Task

Batch = dict[str, np.ndarray]


def make_batches(
    task: Task,
    *,
    batch_tokens: int,
    lengths: Sequence[int],
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    curriculum: Sequence[tuple[int, Sequence[int]]] = (),
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of batches, beginning with that of `start_step`.

    Each step draws one of `lengths` (from the steps that `curriculum` names on, of its lengths); a batch of rows of T
    tokens has `rows = max(1, batch_tokens // T)` of them over all processes. This process gets rows
    `[process_index * rows / process_count, (process_index + 1) * rows / process_count)`, so the union over processes
    does not depend on how many there are.

    Raises ValueError where a length is shorter than the task's prompt, the rows of a length do not divide among the
    processes, or an argument is out of range.
    """
    schedule = LengthSchedule(lengths, batch_tokens=batch_tokens, seed=seed, curriculum=curriculum)
    check_processes(schedule, process_index, process_count)
    for length in schedule.all_lengths():
        if length < task.min_length():
            raise ValueError(
                f"length={length} is too short for task {task.name!r}: expected at least {task.min_length()}"
            )

    def batch(step: int) -> Batch:
        length = schedule.length(step)
        count = schedule.rows(length) // process_count
        first = process_index * count
        tokens = np.empty((count, length), np.int32)
        loss_mask = np.empty((count, length), np.bool_)
        for row in range(count):
            example = task.example(np.random.default_rng([seed, EXAMPLE, step, first + row]), length)
            tokens[row], loss_mask[row] = example.tokens, example.loss_mask
        return {"tokens": tokens, "loss_mask": loss_mask}

    steps = grain.MapDataset.range(start_step, sys.maxsize).map(batch)
    # Without threads: a batch takes about a millisecond, and the device works while the next one is made.
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


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

"""Runs the cells of a grid through a model, and writes a row for each as soon as it is known."""

import dataclasses
import datetime
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from lcr.evaluation.grid import Grid, GridError, Subject, prompt_generator, row_key, subject_from_config
from lcr.evaluation.memory import peak_bytes, reset_peak
from lcr.evaluation.progress import EvaluationProgress
from lcr.evaluation.results import Row, append_row, code_versions, read_rows
from lcr.evaluation.statistics import wilson_interval
from lcr.evaluation.streaming import NOT_FINITE, Streamer
from lcr.tasks.interface import Task


@runtime_checkable
class TrainedRun(Protocol):
    """What `lcr.training.run.load_run` gives: a model, its task and configuration, and the checkpoint's step."""

    model: nnx.Module
    task: Any
    config: ConfigDict
    step: int


@dataclasses.dataclass
class Cell:
    """The measurements of one cell so far."""

    predicted: list[np.ndarray] = dataclasses.field(default_factory=list)
    expected: list[np.ndarray] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    batch: int = 0
    peak: int = 0


def evaluate_run(run: TrainedRun, grid: Grid, path: str | os.PathLike, *, shown: bool = True) -> list[Row]:
    """Evaluates a run on `grid`: see `evaluate_grid`.

    shown: whether progress is shown on stderr.
    Raises as `evaluate_grid` does, and GridError where the run's task asks no questions.
    """
    if not isinstance(run.task, Task):
        raise GridError(
            f"task={run.task.name!r} asks no questions: expected a run of a task with answers, such as 'passkey'"
        )
    progress = EvaluationProgress(run.config.name, shown=shown)
    try:
        streamer = Streamer(run.model, grid.piece)
        return evaluate_grid(streamer, run.task, subject_from_config(run.config, run.step), grid, path, progress)
    finally:
        progress.close()


def evaluate_grid(
    streamer: Streamer,
    task: Task,
    subject: Subject,
    grid: Grid,
    path: str | os.PathLike,
    progress: EvaluationProgress,
) -> list[Row]:
    """Evaluates the cells of `grid` that `path` has no row for; returns the rows of all its cells.

    Each new row is appended to `path` (see `append_row`) as soon as its cell is complete, so that an evaluation
    that is stopped loses at most the cells in hand.

    progress: is told what there is to do, what was read, and what the user should know; closing it is the caller's.

    Raises GridError where a length is too short for the task, ResultsError where `path` has a line that cannot be read.
    """
    if grid.lengths[0] < task.min_length():
        raise GridError(
            f"length={grid.lengths[0]} is too short for task {task.name!r}: "
            f"expected at least {task.min_length()} tokens, answer included"
        )
    rows, notice = read_rows(path)
    if notice:
        progress.say(notice)
    known = {row.key: row for row in rows}
    wanted = {
        (length, depth): row_key(subject, task, grid, length, depth) for length in grid.lengths for depth in grid.depths
    }
    missing = {
        length: [depth for depth in grid.depths if wanted[length, depth] not in known] for length in grid.lengths
    }
    progress.start(
        sum(len(depths) for depths in missing.values()),
        sum(
            grid.samples_at(length) * len(depths) * (length - task.answer_length) for length, depths in missing.items()
        ),
    )
    for length, depths in missing.items():
        for depth, cell in run_length(streamer, task, grid, length, depths, progress):
            row = make_row(streamer, task, subject, grid, length, depth, cell)
            append_row(path, row)
            known[row.key] = row
            if failed := int((np.stack(cell.predicted) == NOT_FINITE).any(axis=1).sum()):
                progress.say(
                    f"{subject.architecture}, length {length}, depth {depth:g}: the logits were not finite in "
                    f"{failed} of {row.samples} answers (counted as wrong)"
                )
    return [known[key] for key in wanted.values()]


def run_length(
    streamer: Streamer,
    task: Task,
    grid: Grid,
    length: int,
    depths: Sequence[float],
    progress: EvaluationProgress,
) -> Iterator[tuple[float, Cell]]:
    """Evaluates the cells of one length, yielding each when it is complete.

    The rows of all depths are read together in batches of equal size; the last one is filled up with copies of its
    last row, so that one program serves them all.
    """
    samples = grid.samples_at(length)
    jobs = [(depth, sample) for depth in depths for sample in range(samples)]
    if not jobs:
        return
    batches = math.ceil(len(jobs) / grid.batch)
    size = math.ceil(len(jobs) / batches)
    prompt_length = length - task.answer_length
    started = time.perf_counter()
    streamer.programs(size, prompt_length, task.answer_length)
    progress.compiled(time.perf_counter() - started)
    # a million tokens of a small vocabulary need not take four bytes each
    prompts = np.empty((size, prompt_length), np.min_scalar_type(task.tokenizer.vocab_size - 1))
    cells = {depth: Cell() for depth in depths}
    for start in range(0, len(jobs), size):
        group = jobs[start : start + size]
        reset_peak()
        for i, (depth, sample) in enumerate(group):
            example = task.example(prompt_generator(grid.seed, length, depth, sample), length, depth)
            prompts[i] = example.tokens[:prompt_length]
            cells[depth].expected.append(example.tokens[prompt_length:].copy())
            cells[depth].positions.append(example.needle_position)
        prompts[len(group) :] = prompts[len(group) - 1]

        def on_piece(tokens: int, rows: int = len(group)) -> None:
            progress.read(length, tokens * rows)

        reply = streamer.answer(prompts, task.answer_length, on_piece)
        peak = peak_bytes()
        for (depth, _), answer in zip(group, reply.tokens[: len(group)], strict=True):
            cells[depth].predicted.append(answer)
        for depth in dict(group):
            cell = cells[depth]
            cell.tokens += size * prompt_length
            cell.seconds += reply.seconds
            cell.peak = max(cell.peak, peak)
            cell.batch = size
            if len(cell.predicted) == samples:
                yield depth, cell


def make_row(
    streamer: Streamer, task: Task, subject: Subject, grid: Grid, length: int, depth: float, cell: Cell
) -> Row:
    """Scores a complete cell."""
    predicted, expected = np.stack(cell.predicted), np.stack(cell.expected)
    scores = task.score(predicted, expected)
    samples, digits = predicted.shape[0], predicted.size
    exact = round(float(scores["exact_match"].sum()))
    right_digits = round(float(scores["digit_accuracy"].mean()) * digits)
    exact_low, exact_high = wilson_interval(exact, samples)
    digit_low, digit_high = wilson_interval(right_digits, digits)
    commit, versions = code_versions()
    return Row(
        architecture=subject.architecture,
        task=task.name,
        haystack=subject.haystack,
        question=subject.question,
        length=length,
        depth=float(depth),
        needle_position=round(float(np.mean(cell.positions))),
        samples=samples,
        answer_length=task.answer_length,
        exact_match=exact / samples,
        exact_match_low=exact_low,
        exact_match_high=exact_high,
        digit_accuracy=right_digits / digits,
        digit_accuracy_low=digit_low,
        digit_accuracy_high=digit_high,
        chance_exact_match=float(task.chance["exact_match"]),
        chance_digit=float(task.chance["digit_accuracy"]),
        state_bytes=streamer.state_bytes(length),
        tokens_per_second=cell.tokens / cell.seconds,
        batch=cell.batch,
        peak_memory_bytes=cell.peak,
        seed=grid.seed,
        configuration=subject.configuration,
        checkpoint_step=subject.checkpoint_step,
        training_length=subject.training_length,
        git_commit=commit,
        versions=versions,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )

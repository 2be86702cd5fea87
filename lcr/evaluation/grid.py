"""What is evaluated: the grid of cells, length x depth, and the model as the rows name it."""

import dataclasses
import hashlib
import json

import numpy as np
from ml_collections import ConfigDict

from lcr.data.schedule import LengthSchedule
from lcr.tasks.interface import Task

_STREAM = int.from_bytes(b"eval")  # keeps the prompts' random numbers apart from those of the training data


class GridError(ValueError):
    """A grid that cannot be evaluated; the message names the value, what was expected, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is to be evaluated.

    lengths:    tokens of whole examples, answer included.
    depths:     where the needle is put, from 0 (start) to 1 (end).
    samples:    prompts for each cell.
    max_tokens: where a length's cells would together read more than this many tokens, they get fewer samples, at
                least one each (0: no limit). The rows record the true number.
    batch:      rows read together, at most.
    piece:      tokens of each row read per call.
    seed:       of the prompts.

    Raises GridError for a value out of range.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    max_tokens: int = 0
    batch: int = 32
    piece: int = 1024
    seed: int = 0

    def __post_init__(self):
        for argument in ("samples", "batch", "piece"):
            if getattr(self, argument) < 1:
                raise GridError(f"{argument}={getattr(self, argument)}: expected an integer above 0")
        for argument in ("max_tokens", "seed"):
            if getattr(self, argument) < 0:
                raise GridError(f"{argument}={getattr(self, argument)}: expected an integer, 0 or above")
        for argument in ("lengths", "depths"):
            if not len(getattr(self, argument)):
                raise GridError(f"{argument} is empty: expected at least one")
        if min(self.lengths) < 1:
            raise GridError(f"lengths={self.lengths}: expected integers above 0")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise GridError(f"depth={depth}: expected a number from 0 (needle first) to 1 (needle last)")
        # shortest first: a peak of memory that cannot be reset (an accelerator's) then belongs to its own length
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        object.__setattr__(self, "depths", tuple(sorted({float(depth) for depth in self.depths})))

    def samples_at(self, length: int) -> int:
        if not self.max_tokens:
            return self.samples
        return max(1, min(self.samples, self.max_tokens // (length * len(self.depths))))


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated, as its rows name it. Fields as in `Row`."""

    architecture: str
    haystack: str
    question: str
    checkpoint_step: int
    training_length: int
    configuration: str = ""


def grid_from_config(config: ConfigDict) -> Grid:
    """The grid of a run's configuration: its section `evaluation`, and its seed."""
    evaluation = config.evaluation
    longest = evaluation.max_length or max(evaluation.lengths)
    lengths = tuple(length for length in evaluation.lengths if length <= longest)
    if not lengths:
        raise GridError(
            f"evaluation.max_length={longest} leaves none of evaluation.lengths={evaluation.lengths}: "
            "raise the one, or add shorter lengths"
        )
    return Grid(
        lengths=lengths,
        depths=tuple(float(depth) for depth in evaluation.depths),
        samples=evaluation.samples,
        max_tokens=evaluation.max_tokens,
        batch=evaluation.batch,
        piece=evaluation.piece,
        seed=config.seed,
    )


def subject_from_config(config: ConfigDict, step: int) -> Subject:
    """How the rows name the checkpoint of this step of a run."""
    data = config.data
    stages = LengthSchedule(
        data.lengths, batch_tokens=data.batch_tokens, seed=config.seed, curriculum=data.curriculum
    ).stages
    return Subject(
        architecture=config.name,
        haystack=config.task.get("haystack", ""),
        question=config.task.get("question", ""),
        configuration=configuration_digest(config),
        checkpoint_step=step,
        training_length=max(max(lengths) for start, lengths in stages if start < max(step, 1)),
    )


def configuration_digest(config: ConfigDict) -> str:
    """Twelve hex digits that differ where two runs were trained differently: of model, task, data, optimizer, seed, and
    what it began from."""
    plain = {key: value for key, value in config.to_dict().items() if key not in ("name", "training", "evaluation")}
    if plain.get("init_from") is None:
        plain.pop("init_from", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def row_key(subject: Subject, task: Task, grid: Grid, length: int, depth: float) -> tuple:
    """`Row.key` of the row that this cell will have."""
    return (
        subject.architecture,
        task.name,
        subject.haystack,
        subject.question,
        length,
        depth,
        grid.samples_at(length),
        grid.seed,
        subject.configuration,
        subject.checkpoint_step,
    )


def prompt_generator(seed: int, length: int, depth: float, sample: int) -> np.random.Generator:
    """The random numbers of one prompt: the same for every architecture, whatever the batch."""
    return np.random.default_rng([_STREAM, seed, length, round(depth * 1e6), sample])

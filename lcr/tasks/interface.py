"""What a task is: where training examples come from, and how an answer is scored.

Two kinds. A `Task` makes one example at a time from a random generator, at any length asked for (passkey). A
`DocumentTask` hands out documents, which the pipeline packs into rows (language modelling). The trainer and the
evaluation know tasks by these protocols alone.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from lcr.checks import unknown_name
from lcr.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Example:
    """One sample of a task.

    tokens:          prompt and answer, exactly the length asked for.
    loss_mask:       True at the tokens to be predicted from what precedes them (never the first).
    prompt_length:   `tokens[:prompt_length]` is the prompt, the rest the answer.
    depth:           where the needle really is: 0 nothing of the haystack precedes it, 1 all of it does.
    needle_position: index of the token with which the needle begins.
    """

    tokens: Int32[np.ndarray, "T"]
    loss_mask: Bool[np.ndarray, "T"]
    prompt_length: int
    depth: float
    needle_position: int


@runtime_checkable
class Task(Protocol):
    """A task of questions with answers of `answer_length` tokens.

    chance: what guessing scores, by the name of the metric.
    """

    name: str
    tokenizer: Tokenizer
    answer_length: int
    chance: Mapping[str, float]

    def example(self, rng: np.random.Generator, length: int, depth: float | None = None) -> Example:
        """A sample of exactly `length` tokens, a pure function of the generator's state and the arguments.

        depth: where the needle goes, 0 to 1; None draws one of the possible places, all alike.
        Raises ValueError where `length < min_length()`, or where depth is outside [0, 1].
        """
        ...

    def min_length(self) -> int:
        """Tokens of the shortest possible sample, answer included."""
        ...

    def score(
        self, predicted: Int[np.ndarray, "B P"], expected: Int[np.ndarray, "B P"]
    ) -> dict[str, Float[np.ndarray, "B"]]:
        """Each metric for each of B samples, from answers of P = `answer_length` tokens."""
        ...


@runtime_checkable
class DocumentTask(Protocol):
    """A task of documents, packed into rows; every token of a document but its first is to be predicted."""

    name: str
    tokenizer: Tokenizer

    def documents(self) -> Any:
        """The documents' token ids, one epoch of them: a `grain.MapDataset` of int32 arrays [T]."""
        ...

    def fingerprint(self) -> str:
        """Names the contents of the corpus: a run must not go on with other documents than it began with."""
        ...


def make_task(name: str, **options: Any) -> Task | DocumentTask:
    """The task of that name ("passkey", "text") with its options.

    Raises ValueError for an unknown name, option or value of an option, naming the nearest known one.
    """
    from lcr.tasks import TASKS  # the tasks themselves import this file

    if name not in TASKS:
        raise ValueError(unknown_name("task", name, TASKS))
    known = inspect.signature(TASKS[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of task {name!r}:", option, known))
    return TASKS[name](**options)

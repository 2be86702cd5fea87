"""Which length the batch of each step has: mixed lengths, and a curriculum of them."""

from collections.abc import Sequence

import numpy as np

DRAW, EXAMPLE = 0, 1  # streams of random numbers of one seed: lengths are drawn from DRAW, examples from EXAMPLE
BLOCK = 4096  # steps whose numbers are drawn at once


class LengthSchedule:
    """The row length of batch s, a pure function of (seed, s).

    lengths:      drawn evenly, one for each step.
    curriculum:   ((from_step, lengths), ...), from_step rising: from that step on these lengths are drawn instead.
    batch_tokens: tokens of a batch: a batch of length T has `max(1, batch_tokens // T)` rows.

    Raises ValueError where a length or batch_tokens is no integer above 0, the seed none from 0 on, there is no
    length, or the curriculum's steps do not rise.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_tokens: int,
        seed: int,
        curriculum: Sequence[tuple[int, Sequence[int]]] = (),
    ):
        check_integer("batch_tokens", batch_tokens)
        check_integer("seed", seed, least=0)
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.stages = [(0, tuple(lengths)), *((step, tuple(stage)) for step, stage in curriculum)]
        for (step, _), (following, _) in zip(self.stages[:-1], self.stages[1:], strict=True):
            check_integer("curriculum: from_step", following, least=step + 1)
        for _, stage in self.stages:
            if not stage:
                raise ValueError("lengths: expected at least one length")
            for length in stage:
                check_integer("length", length)
        self._drawn = (-1, np.zeros(0))

    def all_lengths(self) -> tuple[int, ...]:
        """Every length that some step may have, sorted."""
        return tuple(sorted({length for _, stage in self.stages for length in stage}))

    def length(self, step: int) -> int:
        block, offset = divmod(step, BLOCK)
        if self._drawn[0] != block:
            self._drawn = (block, np.random.default_rng([self.seed, DRAW, block]).random(BLOCK))
        stage = next(lengths for start, lengths in reversed(self.stages) if start <= step)
        return stage[int(self._drawn[1][offset] * len(stage))]

    def rows(self, length: int) -> int:
        return max(1, self.batch_tokens // length)


def check_integer(argument: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}={value!r}: expected an integer of at least {least}")

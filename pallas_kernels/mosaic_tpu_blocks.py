"""Blocks of instructions in a TPU's kernel, parts of its references, registers of its values.

A TPU's scheduler starts within a block whatever can be started, and runs out of registers where a block has much that
does not depend on one another; from one block to the next it moves nothing. Loops and conditions part blocks.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu_chunks import divisor

SUBLANES = 8  # of a register


def alone(body: Callable[[], None], number: int = 1) -> None:
    """Runs `body` in a block of its own: under a condition that always holds, which the compiler does not know. Of
    blocks one after the other those with the same number (from 1) become one."""
    pl.when(pl.program_id(2) > -number)(body)


class Blocks:
    """Runs each that it is called with in a block of its own."""

    def __init__(self):
        self.count = 0

    def __call__(self, body: Callable[[], None]) -> None:
        self.count += 1
        alone(body, self.count)


def in_blocks(count: int, at_once: int, body: Callable[..., None], *arguments: Any) -> None:
    """body(n, *arguments) for n = 0 .. count - 1, at most `at_once` of them in a block. (Stages of one block each, one
    after the other, become one, all the same.)"""
    at_once = divisor(count, at_once)

    def block(number):
        for one in range(at_once):
            body(number * at_once + one, *arguments)

    if count == at_once:
        alone(lambda: block(0))
    else:
        pl.loop(0, count // at_once)(block)


def part(n: Any, size: int, count: int | None = None):
    """The n-th of parts of this size; of a single one (count) all, whatever n."""
    if count == 1:
        return slice(0, size)
    if isinstance(n, int):
        return slice(n * size, (n + 1) * size)
    return pl.ds(pl.multiple_of(n * size, size), size)


def registers(x: jax.Array) -> list[jax.Array]:
    return [x[start : start + SUBLANES] for start in range(0, x.shape[0], SUBLANES)]


def joined(parts: Iterable[jax.Array]) -> jax.Array:
    return jnp.concatenate(list(parts))


def swap(x: jax.Array, half: int, second: jax.Array) -> jax.Array:
    """Rows t with rows t ^ half, of a register. second: whether a row is in the second half of its block of 2 h."""
    back = pltpu.roll(x, half, 0)
    return back if 2 * half == SUBLANES else jnp.where(second, back, pltpu.roll(x, SUBLANES - half, 0))

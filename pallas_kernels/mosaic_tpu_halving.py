"""Decays between the tokens of a chunk on a TPU, one for each key channel: by halves, and never as a difference.

A chunk of C tokens falls into two halves, each of those into two, and so on. The decay from token j to token i passes
the middle of the smallest aligned block that holds both, which splits it in two factors. Each is the exponential of a
sum of log decays within one half: at most 0, and summed up over its own gates alone. So nothing overflows, and a gate
of -1e-6 beside one of -100 loses no digit. Sums of blocks twice as long come from those of their halves by one
exchange of neighbours. At each halving one product of matrices, of which a mask takes the pairs that part there.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu


class Sums(NamedTuple):
    """`[C, K]` each: of the log decays of a token's block, from its start to what the token reads; from after the token
    to its end; and of all of it."""

    reading: jax.Array
    rest: jax.Array
    total: jax.Array


def halvings(log_decay: jax.Array, exclusive: bool) -> Iterator[tuple[int, Sums]]:
    """(h, the sums of blocks of h tokens) for h = 1, 2, .. C. log_decay: finite. exclusive: a token reads what was
    there before its own decay."""
    zero = jnp.zeros_like(log_decay)
    sums, size = Sums(zero if exclusive else log_decay, zero, log_decay), 1
    yield size, sums
    while size < log_decay.shape[0]:
        other = exchange(sums.total, size)
        second = in_second_half(log_decay, size)
        sums = Sums(
            sums.reading + jnp.where(second, other, 0.0),
            sums.rest + jnp.where(second, 0.0, other),
            sums.total + other,
        )
        size *= 2
        yield size, sums


def to_middle(sums: Sums, size: int) -> jax.Array:
    """The decay between a token and the middle of its block of 2 x size."""
    return jnp.exp(jnp.where(in_second_half(sums.total, size), sums.reading, sums.rest))


def in_second_half(x, size):
    """Of its block of 2 x size."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) & size != 0


def parting(i, j):
    """Of the pairs of token i after token j a number that `part_at` takes, of the others 0."""
    return jnp.where(i > j, i ^ j, 0)


def part_at(pairs, size):
    """Whether i is in the second half of a block of 2 x size tokens, and j in the first half of the same."""
    return pairs & -size == size


ROWS = 8  # of a register


def second_halves(x: jax.Array, size: int) -> jax.Array:
    """The rows that are in second halves of blocks of 2 x size; all of them, where those are no whole registers."""
    if size < ROWS:
        return x
    parts = [x[start : start + size] for start in range(size, x.shape[0], 2 * size)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def with_second_halves(x: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    """x with these for its `second_halves`."""
    if size < ROWS:
        return rows
    parts = []
    for block, start in enumerate(range(0, x.shape[0], 2 * size)):
        parts += [x[start : start + size], rows[block * size : (block + 1) * size]]
    return jnp.concatenate(parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def exchange(x: jax.Array, size: int) -> jax.Array:
    """Rows t with rows t ^ size: blocks of `size` rows change places with their neighbours."""
    count = x.shape[0]
    back, forth = pltpu.roll(x, size, 0), pltpu.roll(x, count - size, 0)
    return jnp.where(in_second_half(x, size), back, forth)


exchange.defvjp(lambda x, size: (exchange(x, size), None), lambda size, _, d: (exchange(d, size),))

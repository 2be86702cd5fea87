"""Long sequences of few rows and heads: cut into parts that run side by side, so that a GPU has enough to do.

A recurrence in chunks has one chain of dependent steps for each row and head. Where those are fewer than the chip has
multiprocessors, the rest idles. Two passes mend that: the first finds what each part makes of any state before it (a
map S -> P S + F), a short scan over the parts gives the state before each, and the second runs all parts at once as
rows of a batch. It reads some inputs twice, so it is worth it only where most of the chip would idle.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.segments import document_index

MULTIPROCESSORS = 132  # of an H100 SXM and an H200
LEAST = 2048  # tokens of a part: with fewer, the first pass costs more than the idle chip


def count(chains: int, length: int) -> int:
    """How many parts, given how many independent chains there are: the most, by powers of two, with which each part of
    each chain has one of the chip's multiprocessors to itself, as far as parts are whole and not too short."""
    parts = 1
    while 2 * chains * parts <= MULTIPROCESSORS and length % (2 * parts) == 0 and length // (2 * parts) >= LEAST:
        parts *= 2
    return parts


def cut(x: Array, parts: int) -> Array:
    """`[B, T, ...]` -> `[B parts, T / parts, ...]`: no copy."""
    return x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:])


def cut_documents(
    segment_ids: Int[Array, "B T"], parts: int
) -> tuple[Int[Array, "P L"], Bool[Array, "P"], Bool[Array, "P"]]:
    """The ids of each part, P = B parts of L tokens; whether it goes on with the document that the state before it
    belongs to; and whether all of it belongs to that document (so that the state before it reaches the state after)."""
    batch = segment_ids.shape[0]
    index, valid = document_index(segment_ids)
    last = index.reshape(batch, parts, -1)[:, :, -1]
    before = jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1).reshape(-1)
    ids = cut(jnp.where(valid, index + 1, 0), parts)
    first = jnp.argmax(ids > 0, axis=1)
    goes_on = jnp.take_along_axis(ids, first[:, None], axis=1)[:, 0] == before + 1
    padding = jnp.max(ids, axis=1) == 0
    return ids, goes_on | padding, last.reshape(-1) == before


def states_before(
    transition: Array, written: Array, initial: Array
) -> tuple[Array, Array]:
    """S_{p+1} = transition_p S_p + written_p over axis 1, from the initial state: the states before each part, the last.

    transition: `[B, parts, H, K, 1]` (a decay of each row) or `[B, parts, H, K, K]` (a matrix); written
    `[B, parts, H, K, V]`.
    """
    diagonal = transition.shape[-1] == 1

    def step(state, part):
        by, write = part
        moved = by * state if diagonal else jnp.matmul(by, state, precision=jax.lax.Precision.HIGHEST)
        return moved + write, state

    last, before = jax.lax.scan(step, initial, (jnp.moveaxis(transition, 1, 0), jnp.moveaxis(written, 1, 0)))
    return jnp.moveaxis(before, 0, 1), last

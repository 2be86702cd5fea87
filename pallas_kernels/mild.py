"""Decays of a chunk that are mild enough to be taken into the vectors, so that it costs what one without decay costs.

With G_t the sum of the log decays of a chunk's tokens up to t, and m its middle, the decay from token j to token i is

    exp(G_i - G_j) = exp(G_i - G_m) exp(G_m - G_j)

One factor goes into what is read, the other into what is written. They may be above 1, and their exponents are sums that
forget what float32 has no digits for, so this is for chunks of which neither half decays by more than exp(LIMIT). Then
nothing overflows (pairs with i < j, which are masked, come to exp(2 LIMIT) at most), and exponents are right to 2e-5.

A recurrence in these coordinates is its own undecayed form, and so is its gradient. That of the log decays is found without
a way back through exponentials: a token's log decay scales what is written before it and read from it on, which is all that
is read from then on but for what is also written from then on. So it is the sum of read times its gradient over all later
reads, less that of write times its gradient over all later writes: exactly 0 where nothing later has a gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

LIMIT = 32.0


class Scales(NamedTuple):
    """K is 1 for one decay a head.

    reader: exp(G_t - G_m), for what token t reads after its own decay.
    sooner: exp(G_{t-1} - G_m), for what it reads before that.
    writer: exp(G_m - G_t), for what it writes.
    first:  exp(G_m), from the state before the chunk to its middle.
    last:   from the middle to the state after the chunk.
    """

    reader: Float[Array, "B H C K"]
    sooner: Float[Array, "B H C K"]
    writer: Float[Array, "B H C K"]
    first: Float[Array, "B H K"]
    last: Float[Array, "B H K"]


class Documents(NamedTuple):
    """0/1 masks: whether two tokens of a chunk are of one document; whether a token is of the first or the last one; and
    whether these are the same."""

    same: Bool[Array, "B 1 C C"]
    first: Bool[Array, "B 1 C 1"]
    last: Bool[Array, "B 1 C 1"]
    through: Bool[Array, "B 1 1 1"]


def is_mild(log_decay: Float[Array, "B H C K"]) -> Bool[Array, ""]:
    """Of the gates of a chunk, all of them at most 0: whether all may be treated as above."""
    middle = log_decay.shape[2] // 2
    halves = jnp.sum(log_decay[:, :, :middle], axis=2), jnp.sum(log_decay[:, :, middle:], axis=2)
    return jnp.minimum(*(jnp.min(half) for half in halves)) > -LIMIT


def scales(log_decay: Float[Array, "B H C K"]) -> Scales:
    sums = _add_up(_since_middle(log_decay.shape[2]), log_decay)
    reader, sooner = jnp.exp(sums), jnp.exp(sums - log_decay)
    return Scales(reader, sooner, 1 / reader, 1 / sooner[:, :, 0], reader[:, :, -1])


def of_log_decay(
    written: Float[Array, "B H C K"],
    read: Float[Array, "B H C K"],
    sooner: Float[Array, "B H C K"],
    after: Float[Array, "B H K"],
) -> Float[Array, "B H C K"]:
    """The gradient of the log decays, from the products of vectors with their gradients: of what tokens write, of what
    they read after and before their own decay, and of the state after the chunk."""
    later = np.triu(np.ones((written.shape[2], written.shape[2])))
    return after[:, :, None] + _add_up(later, read + sooner - written) - sooner


def documents(starts: Bool[Array, "B C"]) -> Documents:
    """starts: the tokens before which the state is forgotten."""
    index = jnp.cumsum(starts, axis=1, dtype=jnp.int32)[:, None, :, None]
    last = index[:, :, -1:]
    return Documents(index == jnp.swapaxes(index, 2, 3), index == 0, index == last, last == 0)


def _add_up(table: np.ndarray, x: Float[Array, "B H C K"]) -> Float[Array, "B H C K"]:
    """A table of zeros and ones for all rows and heads: as a product for each, which needs no copy of x."""
    table = jnp.broadcast_to(jnp.asarray(table, x.dtype), (*x.shape[:2], *table.shape))
    return jnp.matmul(table, x, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _since_middle(length: int) -> np.ndarray:
    """`[C, C]`, of 0, 1 and -1: which log decays make up G_t - G_m; each is added up from the middle outward."""
    t, i = np.arange(length)[:, None], np.arange(length)[None]
    middle = length // 2
    return np.where((middle <= i) & (i <= t), 1.0, 0.0) - np.where((t < i) & (i < middle), 1.0, 0.0)

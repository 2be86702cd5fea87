"""Scores under decay, stably: q_t k_j exp(g_{j+1} + ... + g_{t-1}) for all pairs j < t of a chunk, by matrix products.

A chunk is halved again and again. Between the two halves of a block the decay from j to t passes the middle m, so

    score[t, j] = (q_t exp(g_m + ... + g_{t-1})) (k_j exp(g_{j+1} + ... + g_{m-1}))

is one product of two matrices, both with exponents that are sums of log decays: at most 0, so nothing overflows. Each
of these sums is added up over its own gates alone. (Differences of running sums would be cheaper, but once a gate of
-100 has gone into a float32 sum, differences of it no longer know a gate of -1e-6.)
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.delta_rule.blocks import halves, join, product


class Factors(NamedTuple):
    """What the log decays of a chunk come to, all between 0 and 1. K is 1 for one decay a head.

    since:  from the state before the chunk to the state that token t finds (g_1 ... g_{t-1}).
    until:  from what token t writes to the state after the chunk (g_{t+1} ... g_C).
    token:  the decay of token t itself.
    total:  from state to state.
    middle: halving by halving, the largest first, between token t and the middle of its block, as above.
    """

    since: Float[Array, "B H C K"]
    until: Float[Array, "B H C K"]
    token: Float[Array, "B H C K"]
    total: Float[Array, "B H K"]
    middle: tuple[Float[Array, "B H C K"], ...]


def factors(log_decay: Float[Array, "B H C K"]) -> Factors:
    """Of the gates of one chunk: at most 0, -inf included; C a power of two."""
    log_decay = finite(log_decay)
    batch, heads, chunk, width = log_decay.shape
    ranges = _ranges(chunk)
    matrix = jnp.asarray(ranges.reshape(-1, chunk), log_decay.dtype)
    sums = product("si,bhik->bhsk", matrix, log_decay).reshape(batch, heads, len(ranges), chunk, width)
    since, until, *middle = (jnp.exp(sums[:, :, i]) for i in range(len(ranges)))
    token = jnp.exp(log_decay)
    return Factors(since, until, token, since[:, :, -1] * token[:, :, -1], tuple(middle))


def scores(
    rows: Float[Array, "R B H C K"], columns: Float[Array, "L B H C K"], decays: Factors
) -> Float[Array, "R L B H C C"]:
    """rows_t columns_j exp(g_{j+1} + ... + g_{t-1}) for j < t, and 0 elsewhere."""
    if decays.token.shape[-1] == 1 != rows.shape[-1]:  # one decay a head: the decays are a table of their own
        one = jnp.ones((1, *decays.token.shape), rows.dtype)
        return product("rbhtk,lbhjk->rlbhtj", rows, columns) * scores(one, one, decays)
    result = jnp.zeros((rows.shape[0], columns.shape[0], *rows.shape[1:4], 1, 1), rows.dtype)
    half = 1
    for middle in (None, *reversed(decays.middle)):
        later, earlier = (rows, columns) if middle is None else (rows * middle[None], columns * middle[None])
        below = product("rbhntk,lbhnjk->rlbhntj", halves(later, half)[1], halves(earlier, half)[0])
        result = join(result, below)
        half *= 2
    return result[..., 0, :, :]


def _ranges(chunk: int) -> np.ndarray:
    """0/1 `[sums, C, C]`: the gates i that each sum at token t adds up."""
    t, i = np.arange(chunk)[:, None], np.arange(chunk)[None]
    ranges = [i < t, i > t]
    half = chunk // 2
    while half > 1:
        middle = t // (2 * half) * 2 * half + half
        ranges.append(np.where(t >= middle, (middle <= i) & (i < t), (t < i) & (i < middle)))
        half //= 2
    return np.stack(ranges)


def finite(log_decay):
    """No less than where exp becomes 0 in this dtype (-104 in float32), so that sums hold no infinities."""
    smallest = float(jnp.finfo(log_decay.dtype).smallest_subnormal)
    return jnp.maximum(log_decay, jnp.asarray(np.log(smallest) - 1.0, log_decay.dtype))

"""What scalar decays and documents make of every token, in the few numbers that the kernels for Hopper read of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_attention.reference import as_log_decay, product
from pallas_kernels.segments import document_index

CHUNK = 64  # tokens: what a product has lines for
# Rows of `tokens`: the running sums up to a token as it reads and as it is read, each in two parts (see
# `chunked._running_sums`); the decays from the state before the chunk to it, and from it to the state after the chunk;
# and of which tokens of its chunk it reads the first and the last, and its own number, -1 where it is padding. (What
# could be told from numbers of lines and columns is better read: the compiler would keep those in registers.)
READING, SUMS, SINCE, UNTIL, FIRST, LAST, OWN, ROWS = (0, 1), (2, 3), 4, 5, 6, 7, 8, 9


class Tables(NamedTuple):
    """The tokens are filled up to whole chunks, of which there are n. total: from state to state."""

    tokens: Float[Array, "B H ROWS nC"]
    total: Float[Array, "B n H 1"]


def tables(
    log_decay: Float[Array, "B T H"] | Float[Array, "H"] | None,
    segment_ids: Int[Array, "B T"] | None,
    shape: tuple[int, int, int],
    exclusive: bool,
) -> Tables:
    """shape: B, T and H. exclusive: a token reads the state before its own decay. Differentiable by JAX."""
    batch, length, heads = shape
    log_decay = jnp.zeros(heads, jnp.float32) if log_decay is None else as_log_decay(log_decay, np.dtype(np.float32))
    log_decay = jnp.broadcast_to(log_decay if log_decay.ndim > 1 else log_decay[None, None], shape)
    index = valid = None
    if segment_ids is not None:
        index, valid = document_index(segment_ids)
        log_decay = jnp.where(valid[:, :, None], log_decay, jnp.float32(0))
        index, valid = (jnp.pad(x, ((0, 0), (0, -length % CHUNK)), mode="edge") for x in (index, valid))
    log_decay = jnp.pad(log_decay, ((0, 0), (0, -length % CHUNK), (0, 0)))
    log_decay = log_decay.reshape(batch, -1, CHUNK, heads)
    count = log_decay.shape[1]

    coarse = jax.lax.stop_gradient(jnp.round(log_decay * 512) / 512)
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.float32))
    sums = jnp.stack([product("ij,bnjh->bhni", lower, part) for part in (coarse, log_decay - coarse)])
    reading = jnp.pad(sums, ((0, 0),) * 4 + ((1, 0),))[..., :-1] if exclusive else sums
    since = jnp.exp(reading.sum(axis=0))
    until = jnp.exp((sums[..., -1:] - sums).sum(axis=0))
    total = jnp.exp(sums[..., -1].sum(axis=0))
    own = jnp.arange(CHUNK)[None, None]
    first, last = jnp.zeros((batch, 1, 1), jnp.int32), own - int(exclusive)
    if index is not None:
        index, valid = (x.reshape(batch, 1, count, CHUNK) for x in (index, valid))
        before = jnp.pad(index[:, :, :-1, -1], ((0, 0), (0, 0), (1, 0)))[..., None]  # the document of the state
        zero = jnp.float32(0)
        since = jnp.where((index == before) & valid, since, zero)
        until = jnp.where((index == index[..., -1:]) & valid, until, zero)
        total = jnp.where(index[..., -1] == before[..., 0], total, zero)
        first = (index[:, 0, :, None, :] < index[:, 0, :, :, None]).sum(axis=3)
        own, last = jnp.where(valid[:, 0], own, -1), jnp.where(valid[:, 0], last, -1)
    places = (jnp.broadcast_to(x[:, None].astype(jnp.float32), since.shape) for x in (first, last, own))
    tokens = jnp.stack([*reading, *sums, since, until, *places], axis=2).reshape(batch, heads, ROWS, count * CHUNK)
    return Tables(tokens, total.swapaxes(1, 2)[..., None])

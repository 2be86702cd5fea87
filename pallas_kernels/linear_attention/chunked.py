"""Linear attention chunk by chunk: matrix products inside a chunk, one state between chunks (arXiv 2307.08621 §2.3).

With G_i the sum of the log decays of a chunk's tokens 1..i, S the state before it and C its last token,

    o_i = q_i (exp(G_i) S + sum_{j <= i} exp(G_i - G_j) k_j v_j^T)
    S  <- exp(G_C) S + sum_j exp(G_C - G_j) k_j v_j^T

or, with a bonus u for the token itself,

    o_i = q_i (exp(G_{i-1}) S + sum_{j < i} exp(G_{i-1} - G_j) k_j v_j^T + diag(u) k_i v_i^T)

Every exponent is a sum of log decays, so never above 0: nothing can overflow, whatever the gates.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.chunks import scan_chunks
from pallas_kernels.linear_attention.reference import (
    as_log_decay,
    empty_state,
    for_each_head,
    product,
    read_and_write,
    step,
    token_inputs,
)
from pallas_kernels.linear_attention.vector_decay import vector_chunked
from pallas_kernels.segments import document_index, document_starts

CHUNK = 64  # fastest of 32, 64, 128 and 256 on CPU, forward and backward, for widths from 16 to 128


class Chunk(NamedTuple):
    """The inputs, or one chunk of them."""

    q: Float[Array, "B C G K"]
    k: Float[Array, "B C G K"]
    v: Float[Array, "B C H V"]
    log_decay: Float[Array, "B C H"] | None  # None: constant
    index: Int[Array, "B C"] | None  # of the document; None: one document and no padding
    valid: Bool[Array, "B C"] | None
    own: Float[Array, "B C H"] | None  # with a bonus: what a token reads of its own value


class Decays(NamedTuple):
    """What the decays (and the document boundaries) make of one chunk, all between 0 and 1.

    between: from token j to token i (0 where i must not see j).
    since:   from the state before the chunk to token i.
    until:   from token j to the state after the chunk.
    total:   from state to state.
    """

    between: Float[Array, "#B H C C"]
    since: Float[Array, "#B H C"]
    until: Float[Array, "#B H C"]
    total: Float[Array, "#B H"]


def run(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | Float[Array, "H"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    bonus: Float[Array, "H K"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `linear_attention`. Any T: what is left over of full chunks is a shorter one.

    Backward: with everything inside a chunk computed again; what is kept is one state a chunk, `B H K V / C` numbers a
    token.
    """
    length = q.shape[1]
    state = empty_state(q, v) if initial_state is None else initial_state
    dtype = np.promote_types(q.dtype, np.float32)
    if length == 1:
        starts, valid = (None, None) if segment_ids is None else document_starts(segment_ids)
        tokens = token_inputs(q, k, v, log_decay, starts, valid, scale, bonus)
        state, o = step(state.astype(dtype), *jax.tree.map(lambda x: x[:, 0], tokens))
        return o[:, None].astype(v.dtype), state

    if log_decay is not None and log_decay.ndim == 4:
        return vector_chunked(q, k, v, log_decay, initial_state, segment_ids, scale, bonus)
    log_decay = jnp.zeros(v.shape[2], dtype) if log_decay is None else as_log_decay(log_decay, dtype)
    constant = log_decay if log_decay.ndim == 1 else None
    index, valid = (None, None) if segment_ids is None else document_index(segment_ids)
    if bonus is None:
        own = None
    else:
        own = read_and_write(for_each_head(q, v.shape[2]), for_each_head(k, v.shape[2]), bonus, scale)
    if own is not None and valid is not None:
        own = jnp.where(valid[:, :, None], own, jnp.zeros((), dtype))
    inputs = Chunk(q, k, v, log_decay if constant is None else None, index, valid, own)
    carry = state.astype(dtype), jnp.zeros(q.shape[0], jnp.int32)
    body = functools.partial(_body, scale=scale, exclusive=bonus is not None)
    table = None
    if constant is not None and valid is None:  # made once, but for a last chunk that is shorter
        table = _decays(_counts(constant, jnp.ones((1, min(CHUNK, length)), bool)), bonus is not None)
    (state, _), o = scan_chunks(body, CHUNK, (constant, table), carry, inputs)
    return o, state


def _body(shared, carry, x, *, scale, exclusive):
    """One chunk: the state after it, and its outputs."""
    constant, table = shared
    state, document = carry  # `document`: the index of the one that the state belongs to
    dtype, length = state.dtype, x.q.shape[1]
    if x.log_decay is not None:
        decays = _decays(_running_sums(x.log_decay, x.valid), exclusive)
    elif table is not None and table.since.shape[-1] == length:
        decays = table
    else:
        real = jnp.ones((1, length), bool) if x.valid is None else x.valid
        decays = _decays(_counts(constant, real), exclusive)
    if x.valid is not None:
        decays = _part_documents(decays, x.index, x.valid, document)
        document = x.index[:, -1]
    state, o = _chunk(state, x.q.astype(dtype) * scale, x.k.astype(dtype), x.v.astype(dtype), decays)
    if exclusive:
        o = o + x.own[..., None] * x.v.astype(dtype)
    return (state, document), o.astype(x.v.dtype)


def _chunk(state, q, k, v, decays):
    """The two formulas above, for all rows and heads; axes: g groups of r heads that share q and k."""
    groups = q.shape[2]

    def grouped(x, axis):
        return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])

    since, until = (grouped(jnp.moveaxis(x, 1, 2), 2)[..., None] for x in (decays.since, decays.until))
    v = grouped(v, 2)
    scores = product("bigk,bjgk->bgij", q, k)[:, :, None] * grouped(decays.between, 1)
    inside = product("bgrij,bjgrv->bigrv", scores, v)
    before = product("bigk,bgrkv->bigrv", q, grouped(state, 1)) * since
    written = product("bjgk,bjgrv->bgrkv", k, v * until).reshape(state.shape)
    o = (inside + before).reshape(*v.shape[:2], -1, v.shape[-1])
    return decays.total[:, :, None, None] * state + written, o


class Sums(NamedTuple):
    """G = rate * (the sum of the parts); kept apart because differences of the parts are nearly exact."""

    rate: Float[Array, "H"]
    parts: tuple[Float[Array, "B H C"] | Float[Array, "B 1 C"], ...]


def _counts(log_decay, valid):
    """G for one decay a head: it times the number of real tokens so far."""
    return Sums(log_decay, (jnp.cumsum(valid[:, None, :], axis=2, dtype=log_decay.dtype),))


def _running_sums(log_decay, valid):
    """G for decays that depend on the token, in two parts.

    One float32 sum will not do: once a gate of -100 has gone into it, differences of it no longer know a gate of
    -1e-6. So each log decay is cut into a multiple of 1/512, of which sums are exact, and a small rest.
    """
    dtype, (_, length, heads) = log_decay.dtype, log_decay.shape
    g = log_decay if valid is None else jnp.where(valid[:, :, None], log_decay, jnp.zeros((), dtype))
    coarse = jax.lax.stop_gradient(jnp.round(g * 512) / 512)
    lower = jnp.tril(jnp.ones((length, length), dtype))
    return Sums(jnp.ones(heads, dtype), tuple(product("ij,bjh->bhi", lower, part) for part in (coarse, g - coarse)))


def _decays(sums, exclusive):
    """Masked before `exp`: above the diagonal the exponents are positive, and an inf would make NaN gradients.

    From a token to the one that reads it first (itself; with a bonus, `exclusive`, the next one) they are 0 by
    definition: with no gradient, where differences would leave rounding noise.
    """
    rate, parts = sums.rate[None, :, None], sums.parts
    length = parts[0].shape[-1]
    reading = tuple(jnp.pad(g, ((0, 0), (0, 0), (1, 0)))[:, :, :-1] for g in parts) if exclusive else parts
    lower = jnp.tril(jnp.ones((length, length), bool), -1 if exclusive else 0)[None, None]
    below = jnp.tril(lower, -2 if exclusive else -1)
    zero = jnp.zeros((), rate.dtype)
    exponent = rate[..., None] * sum(r[:, :, :, None] - g[:, :, None, :] for r, g in zip(reading, parts, strict=True))
    between = jnp.where(lower, jnp.exp(jnp.where(below, exponent, zero)), zero)
    until = jnp.exp(rate * sum(g[:, :, -1:] - g for g in parts))
    total = jnp.exp(rate[..., 0] * sum(g[:, :, -1] for g in parts))
    return Decays(between, jnp.exp(rate * sum(reading)), until, total)


def _part_documents(decays, index, valid, document):
    """Nothing passes from one document to another, nor into or out of padding."""
    same = (index[:, :, None] == index[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    first = index == document[:, None]
    last = index == index[:, -1:]

    def keep(mask, decay):
        return jnp.where(mask, decay, jnp.zeros((), decay.dtype))

    return Decays(
        between=keep(same[:, None], decays.between),
        since=keep((first & valid)[:, None], decays.since),
        until=keep((last & valid)[:, None], decays.until),
        total=keep(first[:, -1:], decays.total),
    )

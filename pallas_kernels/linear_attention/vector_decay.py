"""Linear attention chunk by chunk with a decay for each key channel (gated linear attention, arXiv 2312.06635 §4).

Where the decays of a chunk are mild, `mild_decay.py` does it; whatever they are, what follows does, in some three times the
time.

The decay from token j to token i is a vector, exp(sum_{j < l <= i} g_l), so it cannot be taken out of q_i k_j as one
number. It can be split at any token between the two: q_i exp(sum since the split) times k_j exp(sum up to the split).
Both exponents are sums of log decays, never above 0, and neither is a difference of larger sums: nothing overflows,
and a gate of -1e-6 beside one of -100 loses no digit. Then a matrix product does the rest. Where to split:

- tokens of different blocks of 16: at the start of the later block (the whole blocks between them decay the key);
- tokens of one block: at the middle of the smallest aligned half, quarter, ... of the block that holds both. That is
  four products of 16 x 16 for each block, one for each level, of which a mask takes the pairs that part there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mild
from pallas_kernels.chunks import scan_chunks
from pallas_kernels.linear_attention import mild_decay
from pallas_kernels.linear_attention.reference import (
    as_log_decay,
    empty_state,
    for_each_head,
    product,
    read_and_write,
)
from pallas_kernels.segments import document_starts

BLOCK = 16
CHUNK = 32  # on CPU 64 takes as long, forward and backward; but of shorter chunks more are mild


class Chunk(NamedTuple):
    """The inputs, or one chunk of them."""

    q: Float[Array, "B C H K"]
    k: Float[Array, "B C H K"]
    v: Float[Array, "B C H V"]
    log_decay: Float[Array, "B C H K"]
    starts: Bool[Array, "B C"] | None  # before which tokens the state is forgotten


def vector_chunked(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"],
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    bonus: Float[Array, "H K"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `linear_attention`. Any T: what is left over of whole chunks is filled up to blocks with tokens that leave the
    state alone.

    Backward: with everything inside a chunk computed again; what is kept is one state a chunk, `B H K V / C` numbers a
    token.
    """
    dtype = np.promote_types(q.dtype, np.float32)
    state = empty_state(q, v) if initial_state is None else initial_state.astype(dtype)
    inputs = Chunk(for_each_head(q, v.shape[2]), for_each_head(k, v.shape[2]), v, as_log_decay(log_decay, dtype), None)
    if segment_ids is not None:
        starts, valid = document_starts(segment_ids)
        inputs = Chunk(*(_where(valid, x) for x in inputs[:4]), starts)
        inputs = inputs._replace(log_decay=_where(~starts, inputs.log_decay))  # the boundary takes its place
    state, o = scan_chunks(functools.partial(_body, scale=scale), CHUNK, bonus, state, inputs)
    return o, state


def _body(bonus, state, x, *, scale):
    """One chunk, filled up to whole blocks, heads before tokens."""
    length = x.k.shape[1]

    def heads_first(array):
        array = jnp.pad(array, ((0, 0), (0, -length % BLOCK)) + ((0, 0),) * (array.ndim - 2))
        return array if array.ndim < 4 else jnp.swapaxes(array, 1, 2).astype(state.dtype)

    padded = jax.tree.map(heads_first, x._replace(q=x.q.astype(state.dtype) * scale))
    state, o = _chunk(bonus is not None, state, padded)
    o = jnp.swapaxes(o, 1, 2)[:, :length]
    if bonus is not None:
        o = o + read_and_write(x.q, x.k, bonus, scale)[..., None] * x.v.astype(state.dtype)
    return state, o.astype(x.v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk(exclusive, state, x):
    """The state after a chunk and its outputs `[B, H, C, V]`; fields of x are `[B, H, C, ...]`, q is scaled."""
    return jax.lax.cond(
        mild.is_mild(x.log_decay),
        lambda: mild_decay.forward(state, *x, exclusive),
        lambda: _any_chunk(state, x, exclusive),
    )


def _chunk_fwd(exclusive, state, x):
    return _chunk(exclusive, state, x), (state, x)


def _chunk_bwd(exclusive, inputs, cotangents):
    state, x = inputs

    def any_backward():
        def run(state, *floats):
            return _any_chunk(state, Chunk(*floats, x.starts), exclusive)

        return jax.vjp(run, state, *x[:4])[1](cotangents)

    d_state, *d_x = jax.lax.cond(
        mild.is_mild(x.log_decay), lambda: mild_decay.backward(state, *x, exclusive, *cotangents), any_backward
    )
    return d_state, Chunk(*d_x, None)


_chunk.defvjp(_chunk_fwd, _chunk_bwd)


def _where(mask, x):
    """x where the mask `[B, T]` says so, else 0."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def _any_chunk(state, x, exclusive):
    """A chunk whatever its gates; axes: z rows, h heads, a and b blocks, i and j tokens of a block, m tokens of the
    chunk, l levels."""
    dtype, (batch, heads, length, _) = state.dtype, x.k.shape
    count = length // BLOCK
    if x.starts is not None:  # a boundary is a decay to nothing
        starts = x.starts[:, None, :, None]
        nothing = as_log_decay(jnp.full((), -jnp.inf, dtype), dtype)
        x = x._replace(log_decay=jnp.where(starts, nothing, x.log_decay))
        if exclusive:  # it must come before the token reads
            x = x._replace(q=jnp.where(starts, jnp.zeros((), dtype), x.q))

    def blocks(array):
        return array.reshape(batch, heads, count, BLOCK, -1)

    def tokens(array):
        return array.reshape(batch, heads, length, -1)

    q, k, v, log_decay = (blocks(array) for array in x[:4])
    sums, parts = block_tables(BLOCK, exclusive)
    decays = jnp.exp(product("lij,zhajk->zhalik", jnp.asarray(sums, dtype), log_decay))
    levels, since, until = decays[:, :, :, :-2], decays[:, :, :, -2], decays[:, :, :, -1]
    between = jnp.exp(product("abc,zhck->zhabk", jnp.asarray(chunk_table(count), dtype), jnp.sum(log_decay, axis=3)))

    # Within a block
    scores = product("zhalik,zhaljk->zhalij", q[:, :, :, None] * levels, k[:, :, :, None] * levels)
    scores = jnp.sum(scores * jnp.asarray(parts, dtype)[None, None, None], axis=3)
    if not exclusive:
        scores = scores + jnp.eye(BLOCK, dtype=dtype)[None, None, None] * jnp.sum(q * k, axis=-1, keepdims=True)
    o = product("zhaij,zhajv->zhaiv", scores, v)
    # From block to block, and from the state before the chunk
    q, k = q * since, k * until
    earlier = jnp.asarray(np.tril(np.ones((count, count)), -1), dtype)[None, None, :, :, None]
    keys = k[:, :, None] * (between[:, :, :count, 1:] * earlier)[:, :, :, :, None]
    scores = product("zhaik,zhabjk->zhaibj", q, keys).reshape(batch, heads, count, BLOCK, length)
    o = o + product("zhaim,zhmv->zhaiv", scores, tokens(v))
    o = o + product("zhaik,zhkv->zhaiv", q * between[:, :, :count, 0][:, :, :, None], state)
    # The state after the chunk
    keys = tokens(k * between[:, :, count, 1:][:, :, :, None])
    state = between[:, :, count, 0][..., None] * state + product("zhmk,zhmv->zhkv", keys, tokens(v))
    return state, tokens(o)


@functools.cache
def block_tables(block: int, exclusive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which log decays of a block of `block` tokens (a power of two) to sum, and which pairs part at which level.

    Returns sums `[levels + 2, block, block]` and parts `[levels, block, block]`, of zeros and ones. At level l, the
    block falls into groups of 2^(l + 1) tokens. sums[l, t] takes the decays from the middle of t's group to t (t in
    the second half) or from t to the middle (first half); sums[-2] from the block's start to t; sums[-1] from t to
    its end. parts[l, i, j] is 1 where i lies in the second half of a group and j in the first half of the same.
    exclusive: a token reads the state before its own decay, so the sums up to a reading token leave that out.
    """
    levels = block.bit_length() - 1
    sums, parts = np.zeros((levels + 2, block, block)), np.zeros((levels, block, block))
    for t in range(block):
        end = t if exclusive else t + 1
        for level in range(levels):
            half = 1 << level
            middle = t // (2 * half) * 2 * half + half
            if t >= middle:
                sums[level, t, middle:end] = 1
                parts[level, t, middle - half : middle] = 1
            else:
                sums[level, t, t + 1 : middle] = 1
        sums[-2, t, :end] = 1
        sums[-1, t, t + 1 :] = 1
    return sums, parts


@functools.cache
def chunk_table(count: int) -> np.ndarray:
    """`[count + 1, count + 1, count]`: the whole blocks between the end of a block (axis 1; first the state before the
    chunk, then block 0, 1, ...) and the start of a later one (axis 0; block 0, 1, ..., last the chunk's end)."""
    table = np.zeros((count + 1, count + 1, count))
    for start in range(count + 1):
        for end in range(start + 1):
            table[start, end, end:start] = 1
    return table

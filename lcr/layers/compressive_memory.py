"""The compressive memory of Infini-attention (arXiv 2404.07143, section 2.1.2): a sum of sigma(k) v^T, read one segment
behind.

A document is cut into segments of L tokens, counted from its first. A token reads the memory M and the normaliser z
that the segments before its own have left; what its own segment writes is summed up beside them, and joins them when
the next segment starts:

    read(x) = sigma(x) M / (sigma(x) z)                       sigma = elu + 1; 0 while the memory is empty   (eq. 3)
    M <- M + sum_i sigma(k_i)^T v'_i        z <- z + sum_i sigma(k_i)        over the tokens i of a segment
    v'_i = v_i (linear update, eq. 4)       or       v'_i = v_i - read(k_i) (linear + delta update, eq. 5)

All of a segment's tokens read the same M, so v'_i is known as soon as token i comes: a segment need not be whole
before it is written, and a call may end anywhere. Arrays hold M and z as one, `[K, V + 1]`, z in the last column
(a value that is always 1).

Why the delta update stays bounded: read(x) is a mean of the rows M_j / z_j with weights that are not negative, and a
segment turns such a row into (1 - f) M_j / z_j + f (v' averaged with weights that are not negative), 0 <= f <= 1. So
the largest entry grows by at most the largest value a segment, whatever the keys; in the mean it does not grow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcr.layers.segments import Segments
from lcr.typing import Array, Bool, Float

CHUNK = 64

# A normaliser below this counts as empty. Gradients have its inverse squared, which must be a float32.
LEAST_NORMALIZER = 1e-12


class Boundaries(NamedTuple):
    """valid: not padding. opens: first token of a document. starts: first token of a segment (so opens implies it)."""

    valid: Bool[Array, "..."]
    opens: Bool[Array, "..."]
    starts: Bool[Array, "..."]


class Memory(NamedTuple):
    """past: M and z of the segments before the running one. running: what the running one has written so far."""

    past: Float[Array, "B G K V+1"]
    running: Float[Array, "B G K V+1"]

    @classmethod
    def join(cls, memory, normalizer, running_memory, running_normalizer) -> "Memory":
        """From M and z, `[B, G, K, V]` and `[B, G, K]`, of the segments before and of the running one."""
        pairs = (memory, normalizer), (running_memory, running_normalizer)
        return cls(*(jnp.concatenate([m, z[..., None]], axis=-1) for m, z in pairs))

    def parts(self) -> tuple[Array, Array, Array, Array]:
        """What `join` takes."""
        return self.past[..., :-1], self.past[..., -1], self.running[..., :-1], self.running[..., -1]


class _Tokens(NamedTuple):
    """One token of each row, or a chunk of them, or (time or chunks in front) all: heads in groups of R = H / G."""

    q: Float[Array, "... G R K"]
    k: Float[Array, "... G K"]
    v: Float[Array, "... G V"]
    at: Boundaries


def find_boundaries(segments: Segments, segment_length: int) -> Boundaries:
    """The boundaries among a call's tokens, `[B, T]`, for segments of so many tokens."""
    positions = segments.positions
    valid = jnp.ones(positions.shape, bool) if segments.ids is None else segments.ids != 0
    return Boundaries(valid, valid & (positions == 0), valid & (positions % segment_length == 0))


def compressive_memory(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    boundaries: Boundaries,
    memory: Memory,
    *,
    delta: bool,
    token_by_token: bool = False,
) -> tuple[Float[Array, "B T H V"], Memory]:
    """What each token's queries read from the memory before its segment, and the memory after the last token.

    q, k, v: any float dtypes, without positions; query head h reads the memory of key-value head h // (H / G).
    memory: what earlier calls left; its dtype (float32, or float64) is that of all arithmetic here.
    delta: the linear + delta update instead of the linear one.
    token_by_token: the slow form, which the other one must equal.

    Returns the reads in the memory's dtype; they are 0 on padding and in a document's first segment.
    """
    batch, length, heads, width = q.shape
    dtype = memory.past.dtype
    groups = q.astype(dtype).reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    tokens = _Tokens(groups, k.astype(dtype), v.astype(dtype), boundaries)
    if length == 1 or token_by_token:
        by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
        memory, reads = jax.lax.scan(lambda memory, token: _step(memory, token, delta), memory, by_time)
        reads = jnp.moveaxis(reads, 0, 1)
    else:
        reads, memory = _chunked(tokens, memory, delta)
    return reads.reshape(batch, length, heads, -1), memory


def features(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """sigma(x) = elu(x) + 1. Not by way of elu, whose -1 + exp(x) would round small features away."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def _weights(x):
    """sigma(x) over its largest channel: a read, which is a ratio, is the same, and cannot vanish with all of them."""
    logarithm = jnp.where(x > 0, jnp.log1p(jnp.maximum(x, 0)), x)
    return jnp.exp(logarithm - jax.lax.stop_gradient(logarithm.max(axis=-1, keepdims=True)))


def _product(formula, x, y):
    return jnp.einsum(formula, x, y, precision=jax.lax.Precision.HIGHEST)


def _inverse(normaliser):
    """1 / normaliser, and 0 where the memory is empty."""
    filled = normaliser > LEAST_NORMALIZER
    return jnp.where(filled, 1 / jnp.where(filled, normaliser, 1), 0)


def _with_one(v):
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def _keep(flag, x):
    """x in the rows (axis 0) where the flag holds, else 0."""
    return jnp.where(flag.reshape((-1,) + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def _step(memory: Memory, token: _Tokens, delta: bool) -> tuple[Memory, Float[Array, "B G R V"]]:
    """One token of each row."""
    q, k, v, at = token
    past = _keep(~at.opens, memory.past + _keep(at.starts, memory.running))
    running = _keep(~at.starts, memory.running)
    read = _product("bgrk,bgkv->bgrv", _weights(q), past)
    if delta:
        own = _product("bgk,bgkv->bgv", _weights(k), past)
        v = v - own[..., :-1] * _inverse(own[..., -1:])
    written = _product("bgk,bgv->bgkv", features(k), _with_one(v))
    running = running + _keep(at.valid, written)
    return Memory(past, running), _keep(at.valid, read[..., :-1] * _inverse(read[..., -1:]))


def _chunked(tokens: _Tokens, memory: Memory, delta: bool) -> tuple[Float[Array, "B T G R V"], Memory]:
    """Chunk by chunk: matrix products inside a chunk, one `Memory` between chunks. The last one is filled up with
    padding. Backward: differentiated through the scan, with everything inside a chunk computed again."""
    batch, length = tokens.at.valid.shape
    size = min(CHUNK, length)
    count = -(-length // size)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def body(memory, chunk):
        return _chunk(memory, chunk, delta)

    memory, reads = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), memory, jax.tree.map(split, tokens))
    reads = jnp.moveaxis(reads, 0, 1)
    return reads.reshape(batch, count * size, *reads.shape[3:])[:, :length], memory


def _solve(lower: Float[Array, "B G C C"], right: Float[Array, "B G C V"]) -> Float[Array, "B G C V"]:
    """x with (I + lower) x = right, for a strictly lower triangular matrix whose rows sum to 1 at most, not below 0.

    (I + A)^-1 = (I - A) (I + A^2) (I + A^4) ...: with such rows every power has them too, and the product of the first
    n factors is at most twice the inverse, so nothing cancels but what does in the inverse itself. (LAPACK's
    substitution, one matrix after another, takes several times as long on a CPU.)
    """
    x, power = right - _product("bgij,bgjv->bgiv", lower, right), lower
    for _ in range(1, (lower.shape[-1] - 1).bit_length()):
        power = _product("bgij,bgjk->bgik", power, power)
        x = x + _product("bgij,bgjv->bgiv", power, x)
    return x


def _chunk(memory: Memory, tokens: _Tokens, delta: bool) -> tuple[Memory, Float[Array, "B C G R V"]]:
    """Any number of boundaries may lie in a chunk. Token i reads, all of them of its own document: the past that came
    with the chunk; the running segment that came with it, if i is in a later one; and what tokens j of the chunk in
    segments before its own have written. The last makes v' the solution of a unit triangular system (delta update).
    """
    q, k, v, at = tokens
    document = jnp.cumsum(at.opens, axis=1, dtype=jnp.int32)  # 0: the one that came with the chunk
    segment = jnp.cumsum(at.starts, axis=1, dtype=jnp.int32)  # over all documents; 0: the one that came
    carried = document == 0
    after = carried & (segment > 0)
    seen = (document[:, :, None] == document[:, None, :]) & (segment[:, :, None] > segment[:, None, :])
    written = jnp.where(at.valid[:, :, None, None], features(k), 0)

    def reads(x):
        """For `weights [B, C, G, R, K]`: what is read but for the chunk's own values, as numerators and inverse
        normaliser, and the weights of those values `[B, G, R, C, C]`."""
        before = jnp.where(carried[:, :, None, None, None], _product("bigrk,bgkv->bigrv", x, memory.past), 0)
        before += jnp.where(after[:, :, None, None, None], _product("bigrk,bgkv->bigrv", x, memory.running), 0)
        scores = jnp.where(seen[:, None, None], _product("bigrk,bjgk->bgrij", x, written), 0)
        normaliser = before[..., -1:] + jnp.moveaxis(scores.sum(-1), 3, 1)[..., None]
        return before[..., :-1], _inverse(normaliser), scores

    if delta:
        before, inverse, scores = reads(_weights(k)[:, :, :, None])
        right = jnp.moveaxis(v - (before * inverse)[:, :, :, 0], 1, 2)
        lower = scores[:, :, 0] * jnp.moveaxis(inverse[:, :, :, 0], 1, 2)
        v = jnp.moveaxis(_solve(lower, right), 2, 1)
    before, inverse, scores = reads(_weights(q))
    read = (before + _product("bgrij,bjgv->bigrv", scores, v)) * inverse

    def total(chosen):
        return _product("bjgk,bjgv->bgkv", jnp.where(chosen[:, :, None, None], written, 0), _with_one(v))

    last = segment == segment[:, -1:]
    ended = (document == document[:, -1:]) & ~last
    past = _keep(carried[:, -1], memory.past + _keep(after[:, -1], memory.running)) + total(ended)
    running = _keep(segment[:, -1] == 0, memory.running) + total(last)
    return Memory(past, running), jnp.where(at.valid[:, :, None, None, None], read, 0)

"""One chunk of linear attention on a TPU with one decay for all channels of a head: the formulas of `chunked.py`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_chunks import product
from pallas_kernels.mosaic_tpu_packs import Pack


class Fixed(NamedTuple):
    """Of all chunks; one decay for each head. between: `[heads x C, C]`, 0 where i must not see j. columns: `[C, 3 heads]`,
    since, until and total, as in `chunked.Decays`. bonus: `[1, keys]`. None: not so."""

    between: Any = None
    columns: Any = None
    bonus: Any = None


class Tokens(NamedTuple):
    q: Any
    k: Any
    v: Any


# What stands in the rows of a chunk, for each head one of: since, until and total, as in `chunked.Decays`; the running
# sums of the log decays up to the token, in two parts (see `chunked._running_sums`), and those of what it reads, which
# with a bonus are others.
SINCE, UNTIL, TOTAL, COARSE, FINE, READING_COARSE, READING_FINE = range(7)


@dataclasses.dataclass(frozen=True)
class Body:
    """decay: "none", "head" (in `fixed`) or "token" (in `rows`, `[7 heads, C]`, filled up to a multiple of 8)."""

    pack: Pack
    decay: str
    scale: float
    exclusive: bool
    dtype: Any  # of the products' operands

    @property
    def name(self):
        return "linear_attention_scalar"

    def __call__(self, fixed: Fixed, state, tokens: Tokens, rows):
        pack, dtype = self.pack, self.dtype
        q, k, v = tokens
        length = q.shape[0]
        i = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
        columns = {"none": None, "head": fixed.columns, "token": None if rows is None else rows.T}[self.decay]

        def column(what, head):
            at = what * pack.heads + head
            return columns[:, at : at + 1]

        def between(head):
            if self.decay == "head":
                return fixed.between[head * length : (head + 1) * length]
            if self.decay == "none":
                return jnp.where(i > j if self.exclusive else i >= j, 1.0, 0.0)
            reading = (READING_COARSE, READING_FINE) if self.exclusive else (COARSE, FINE)
            coarse, fine = (
                column(read, head) - rows[gone * pack.heads + head : gone * pack.heads + head + 1]
                for read, gone in zip(reading, (COARSE, FINE), strict=True)
            )
            exponent = jax.lax.stop_gradient(coarse) + fine
            decays = jnp.exp(jnp.where(i > j, exponent, 0.0))
            return jnp.where(i > j if self.exclusive else i >= j, decays, 0.0)

        shared = product(q, k, (1, 1), dtype) if pack.shared else None

        def inside(head, values):
            read = pack.of_keys(head, q)
            scores = product(read, k, (1, 1), dtype) if shared is None else shared
            scores = scores * between(head)
            if self.exclusive:
                own = product(read.astype(jnp.float32) * fixed.bonus, k, (1, 1), dtype)
                scores = scores + jnp.where(i == j, own, 0.0)
            return product(scores, values, (1, 0), dtype)

        o = pack.by_head(inside, v)
        before = product(q, state, (1, 0), dtype)
        kept = v
        if self.decay != "none":
            before = before * pack.by_head(lambda head: column(SINCE, head))
            kept = v * pack.by_head(lambda head: column(UNTIL, head))
        written = pack.blocks(product(k, kept, (0, 0), dtype))
        if self.decay != "none":
            state = state * pack.by_head(lambda head: column(TOTAL, head)[:1])
        return state + written, ((o + before) * self.scale).astype(v.dtype)


def rows_of_tokens(log_decay, starts, chunk: int, heads: int, exclusive: bool):
    """`[B, packs, chunks, rows, C]` of float32 log decays `[B, T, H]`, at most 0 and finite.

    starts: `[B, T]`, tokens that must not read the state that they find; or None.
    """
    batch, length, all_heads = log_decay.shape
    g = log_decay.reshape(batch, length // chunk, chunk, all_heads // heads, heads).transpose(0, 3, 1, 4, 2)
    coarse = jax.lax.stop_gradient(jnp.round(g * 512) / 512)
    through = np.triu(np.ones((chunk, chunk), np.float32))  # up to and with the token
    after = np.tril(np.ones_like(through), -1)

    def sums(x, table):
        return jnp.einsum("bphrc,cd->bphrd", x, jnp.asarray(table), precision=jax.lax.Precision.HIGHEST)

    reading = np.triu(through, 1) if exclusive else through
    coarse_sums, fine_sums = sums(coarse, reading), sums(g - coarse, reading)
    if starts is not None:
        nothing = jnp.where(starts, as_log_decay(jnp.full((), -jnp.inf), jnp.float32), 0.0)
        coarse_sums += nothing.reshape(batch, 1, length // chunk, 1, chunk)
    total = jnp.broadcast_to(jnp.sum(g, axis=-1, keepdims=True), g.shape)
    found = [jnp.exp(coarse_sums + fine_sums), jnp.exp(sums(g, after)), jnp.exp(total)]
    found += [sums(coarse, through), sums(g - coarse, through)] if exclusive else []
    found += [coarse_sums, fine_sums]
    rows = jnp.concatenate(found, axis=3)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, -rows.shape[3] % 8), (0, 0)])


def fixed_of_heads(log_decay, chunk: int, heads: int, exclusive: bool):
    """between `[packs, heads x C, C]` and columns `[packs, C, 3 heads]` of float32 log decays `[H]`."""
    packs = log_decay.shape[0] // heads
    t = np.arange(chunk, dtype=np.float32)
    distance = t[:, None] - t - exclusive
    g = log_decay[:, None, None]
    between = jnp.where(distance >= 0, jnp.exp(g * np.maximum(distance, 0)), 0.0)
    counts = np.stack([t if exclusive else t + 1, chunk - 1 - t, np.full(chunk, chunk, np.float32)])
    columns = jnp.exp(log_decay.reshape(packs, 1, 1, heads) * counts.T[None, :, :, None])
    return between.reshape(packs, heads * chunk, chunk), columns.reshape(packs, chunk, 3 * heads)

"""One chunk of linear attention on a TPU with one decay for all channels of a head: the formulas of `chunked.py`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_chunks import LANES, product
from pallas_kernels.mosaic_tpu_packs import Pack, side_by_side, spread


class Fixed(NamedTuple):
    """Of all chunks; one decay for each head. between: `[heads x C, C]`, 0 where i must not see j. wide: `[3 heads x C, 128]`,
    since, until and total, as in `chunked.Decays`, alike in all lanes. bonus: `[1, keys]`. None: not so."""

    between: Any = None
    wide: Any = None
    bonus: Any = None


class Tokens(NamedTuple):
    q: Any
    k: Any
    v: Any


# What stands in the rows of a chunk, for each head one of: running sums of the log decays up to the token, and, with a
# bonus, those of what it reads; of float32 each in two parts (see `chunked._running_sums`). Of bfloat16 in one: what it
# loses, 5e-4 at the most extreme gates, is below the rounding of the inputs.
NEVER = -1e30  # an exponent of what is not seen


@dataclasses.dataclass(frozen=True)
class Body:
    """decay: "none", "head" (in `fixed`) or "token" (in `rows`, filled up to a multiple of 8)."""

    pack: Pack
    decay: str
    scale: float
    exclusive: bool
    dtype: Any  # of the products' operands

    @property
    def name(self):
        return "linear_attention_scalar"

    def __call__(self, blocks):
        return [self.pack_of_heads(*block) for block in blocks]

    def pack_of_heads(self, fixed: Fixed, state, tokens: Tokens, rows):
        pack, dtype = self.pack, self.dtype
        q, k, v = tokens
        length = q.shape[0]
        i = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
        columns = rows.T if self.decay == "token" else None
        parts = parts_of(dtype)

        @functools.cache
        def sums(head):
            """Running sums in parts: along the sublanes (alike in all lanes) of what is read, and of what is decayed;
            and along the lanes."""
            at = [part * pack.heads + head for part in range((1 + self.exclusive) * parts)]
            wide = [_first(jnp.broadcast_to(columns[:, n : n + 1], (length, LANES)), n, parts, pack) for n in at]
            return wide[-parts:], wide[:parts], [_first(rows[n : n + 1], n, parts, pack) for n in at[:parts]]

        def of_table(what, head):
            at = (what * pack.heads + head) * length
            return fixed.wide[at : at + length]

        @functools.cache
        def decays(head):
            """since, until and total."""
            if self.decay == "head":
                return of_table(0, head), of_table(1, head), of_table(2, head)[:1]
            reading, gone, _ = sums(head)
            until = functools.reduce(jnp.add, (g[length - 1 :] - g for g in gone))
            return jnp.exp(sum(reading)), jnp.exp(until), jnp.exp(sum(gone)[length - 1 :])

        def between(head):
            if self.decay == "head":
                return fixed.between[head * length : (head + 1) * length]
            seen = i > j if self.exclusive else i >= j
            if self.decay == "none":
                return jnp.where(seen, 1.0, 0.0)
            reading, _, gone = sums(head)
            exponent = functools.reduce(
                jnp.add, (spread(r, length) - g for r, g in zip(reading, gone, strict=True))
            )
            return jnp.exp(jnp.where(seen, exponent, NEVER))

        shared = product(q, k, (1, 1), dtype) if pack.shared else None

        @functools.cache
        def weights(head):
            read = pack.of_keys(head, q)
            scores = product(read, k, (1, 1), dtype) if shared is None else shared
            scores = scores * between(head)
            if self.exclusive:
                own = product(read.astype(jnp.float32) * fixed.bonus, k, (1, 1), dtype)
                scores = scores + jnp.where(i == j, own, 0.0)
            return scores

        states, outs = [], []
        for lanes in pack.units:
            values, old = v[:, lanes], state[:, lanes]
            o = pack.by_head(lambda head, values=values: product(weights(head), values, (1, 0), dtype), lanes)
            before = product(q, old, (1, 0), dtype)
            if self.decay != "none":
                width = lanes.stop - lanes.start
                since, until, total = (
                    pack.by_head(lambda head, n=n: spread(decays(head)[n], width), lanes) for n in range(3)
                )
                before, values, old = before * since, values * until, old * total
            states.append(old + pack.blocks(product(k, values, (0, 0), dtype), lanes))
            outs.append(((o + before) * self.scale).astype(v.dtype))
        return side_by_side(states), side_by_side(outs)


def rows_of_tokens(log_decay, starts, chunk: int, heads: int, exclusive: bool, parts: int):
    """`[B, packs, chunks, rows, C]` of float32 log decays `[B, T, H]`, at most 0 and finite.

    starts: `[B, T]`, tokens that must not read the state that they find; or None.
    """
    batch, length, all_heads = log_decay.shape
    g = log_decay.reshape(batch, length // chunk, chunk, all_heads // heads, heads).transpose(0, 3, 1, 4, 2)
    coarse = jax.lax.stop_gradient(jnp.round(g * 512) / 512)
    through = np.triu(np.ones((chunk, chunk), np.float32))  # up to and with the token

    def sums(table):
        each = (g,) if parts == 1 else (coarse, g - coarse)
        return [
            jnp.einsum("bphrc,cd->bphrd", x, jnp.asarray(table), precision=jax.lax.Precision.HIGHEST) for x in each
        ]

    found = sums(through)
    if exclusive:
        reading = sums(np.triu(through, 1))
        if starts is not None:
            nothing = jnp.where(starts, as_log_decay(jnp.full((), -jnp.inf), np.dtype(np.float32)), 0.0)
            reading[0] += nothing.reshape(batch, 1, length // chunk, 1, chunk)
        found += reading
    rows = jnp.concatenate(found, axis=3)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, -rows.shape[3] % 8), (0, 0)])


def fixed_of_heads(log_decay, chunk: int, heads: int, exclusive: bool):
    """between `[packs, heads x C, C]` and wide `[packs, 3 heads x C, 128]` of float32 log decays `[H]`."""
    packs = log_decay.shape[0] // heads
    t = np.arange(chunk, dtype=np.float32)
    distance = (t[:, None] - t - exclusive)[None]
    g = log_decay[:, None, None]
    between = jnp.where(distance >= 0, jnp.exp(g * np.maximum(distance, 0)), 0.0)
    counts = np.stack([t if exclusive else t + 1, chunk - 1 - t, np.full(chunk, chunk, np.float32)])
    decays = jnp.exp(log_decay.reshape(packs, 1, heads, 1) * counts[None, :, None])
    wide = jnp.broadcast_to(decays.reshape(packs, 3 * heads * chunk, 1), (packs, 3 * heads * chunk, LANES))
    return between.reshape(packs, heads * chunk, chunk), wide


def parts_of(dtype) -> int:
    return 2 if dtype == jnp.float32 else 1


def _first(x, n, parts, pack):
    """Without a gradient, if it is the first of two parts."""
    return jax.lax.stop_gradient(x) if parts == 2 and n // pack.heads % 2 == 0 else x

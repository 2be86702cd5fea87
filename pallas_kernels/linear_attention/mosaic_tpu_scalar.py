"""One chunk of linear attention on a TPU with one decay for all channels of a head: the formulas of `chunked.py`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_chunks import LANES, product
from pallas_kernels.mosaic_tpu_gates import Gates
from pallas_kernels.mosaic_tpu_gates import rows_of_tokens as gated_rows
from pallas_kernels.mosaic_tpu_packs import Pack, side_by_side, spread


class Fixed(NamedTuple):
    """What all chunks have in common. bonus: `[1, keys]`. Of one decay for each head: between, `[heads x C, C]`, 0
    where i must not see j; wide, `[3 heads x C, 128]`, since, until and total (see `chunked.Decays`), alike in all
    lanes."""

    between: Any = None
    wide: Any = None
    bonus: Any = None


class Tokens(NamedTuple):
    q: Any
    k: Any
    v: Any


@dataclasses.dataclass(frozen=True)
class Body:
    """decay: "none", "head" (in `fixed`) or "token" (in `rows`, see `Gates`)."""

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
        seen = i > j if self.exclusive else i >= j
        gates = Gates(rows, pack.heads, 1 + self.exclusive, dtype) if self.decay == "token" else None

        def of_table(what, head):
            at = (what * pack.heads + head) * length
            return fixed.wide[at : at + length]

        def decays(head):
            """since, until and total."""
            if self.decay == "token":
                return gates.decays(head)
            return of_table(0, head), of_table(1, head), of_table(2, head)[:1]

        def between(head):
            if self.decay == "token":
                return gates.between(head, seen)
            if self.decay == "none":
                return jnp.where(seen, 1.0, 0.0)
            return fixed.between[head * length : (head + 1) * length]

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
                before, values, old = before * since, values.astype(jnp.float32) * until, old * total
            states.append(old + pack.blocks(product(k, values, (0, 0), dtype), lanes))
            outs.append(((o + before) * self.scale).astype(v.dtype))
        return side_by_side(states), side_by_side(outs)


def rows_of_tokens(log_decay, starts, chunk: int, heads: int, exclusive: bool, dtype):
    """What `Gates` are made from. starts: `[B, T]`, tokens that must not read the state that they find; or None."""
    through = np.triu(np.ones((chunk, chunk), np.float32))  # up to and with the token
    tables = [through, np.triu(through, 1)] if exclusive else [through]
    barred = None
    if starts is not None:
        barred = jnp.where(starts, as_log_decay(jnp.full((), -jnp.inf), np.dtype(np.float32)), 0.0)
    return gated_rows(log_decay, chunk, heads, dtype, tables, barred)


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

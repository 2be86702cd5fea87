"""Decays between the tokens of a chunk on a TPU, one for all channels of a head: differences of running sums.

The sums are made outside of the kernel and lie along the lanes of a few rows. What is needed along the sublanes is
spread over the lanes once for each head (that takes a unit of the chip seven cycles for each register); all else comes
from it by additions and exponentials.

One float32 sum will not do for float32 inputs: once a gate of -100 has gone into it, differences of it no longer know a
gate of -1e-6. So a log decay is cut into a multiple of 1/512, of which sums are exact, and a small rest. For bfloat16
inputs it will: the difference is off by 1e-3 at most, with a chunk of nothing but such gates, and inputs by 4e-3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic_tpu_chunks import LANES
from pallas_kernels.mosaic_tpu_packs import spread

NEVER = -1e30  # an exponent of what is not seen


def rows_of_tokens(log_decay, chunk: int, heads: int, dtype, tables: list[np.ndarray], barred=None):
    """`[B, packs, T / chunk, rows, n]` from float32 log decays `[B, T, H]`, at most 0 and finite.

    tables: 0/1 `[chunk, n]`, which log decays to sum up: the first for what is decayed, the last for what reads (one
    may be both). barred: `[B, T]`, what to add to the sums of what reads (n = chunk), or None. For each table there
    is a row for each part and head; filled up to a multiple of 8.
    """
    batch, length, all_heads = log_decay.shape
    g = log_decay.reshape(batch, length // chunk, chunk, all_heads // heads, heads).transpose(0, 3, 1, 4, 2)
    coarse = jax.lax.stop_gradient(jnp.round(g * 512) / 512)
    parts = (g,) if parts_of(dtype) == 1 else (coarse, g - coarse)
    found = [
        [jnp.einsum("bphrc,cd->bphrd", x, jnp.asarray(table), precision=jax.lax.Precision.HIGHEST) for x in parts]
        for table in tables
    ]
    if barred is not None:
        found[-1][0] += barred.reshape(batch, 1, length // chunk, 1, chunk)
    rows = jnp.concatenate([x for sums in found for x in sums], axis=3)
    return jnp.pad(rows, [(0, 0)] * 3 + [(0, -rows.shape[3] % 8), (0, 0)])


def parts_of(dtype) -> int:
    return 2 if dtype == jnp.float32 else 1


class Gates:
    """Of a chunk, from its rows `[rows, n]`, of as many `tables` as they were made from."""

    def __init__(self, rows, heads: int, tables: int, dtype):
        self.rows, self.columns = rows, rows.T
        self.heads, self.tables, self.parts = heads, tables, parts_of(dtype)
        self.sums = functools.cache(self._sums)
        self.decays = functools.cache(self._decays)

    def _sums(self, head):
        """In parts: of what reads, and of what is decayed, `[n, 128]` (alike in all lanes); of the latter `[1, n]`."""
        wide, lying = [], []
        for number in range(self.tables * self.parts):
            at = number * self.heads + head
            column = self.columns[:, at : at + 1]
            wide.append(jnp.broadcast_to(column, (column.shape[0], LANES)))
            lying.append(self.rows[at : at + 1])
        return wide[-self.parts :], wide[: self.parts], lying[: self.parts]

    def _decays(self, head):
        """From the state before the chunk to what reads, from what writes to the state after, `[n, 128]`; from state to
        state, `[1, 128]`."""
        reading, gone, _ = self.sums(head)
        last = gone[0].shape[0] - 1
        until = functools.reduce(jnp.add, (g[last:] - g for g in gone))
        return jnp.exp(sum(reading)), jnp.exp(until), jnp.exp(sum(g[last:] for g in gone))

    def between(self, head, seen):
        """From what writes (along the lanes) to what reads, where it is seen; else 0."""
        reading, _, gone = self.sums(head)
        parts = (spread(r, g.shape[1]) - g for r, g in zip(reading, gone, strict=True))
        return jnp.exp(jnp.where(seen, functools.reduce(jnp.add, parts), NEVER))

    def lying_until(self, head):
        """From what writes (along the lanes) to the state after, `[1, n]`."""
        _, _, gone = self.sums(head)
        return jnp.exp(functools.reduce(jnp.add, (g[:, -1:] - g for g in gone)))

    def lying_since(self, head):
        """From the state before to what reads (along the lanes), `[1, n]`."""
        first = (self.tables - 1) * self.parts
        rows = (self.rows[(first + part) * self.heads + head :][:1] for part in range(self.parts))
        return jnp.exp(functools.reduce(jnp.add, rows))

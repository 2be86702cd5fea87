"""Decays of linear attention with one for all channels of a head, as a TPU's kernel reads them from references.

They lie in a table for all chunks (one decay for each head) or come from running sums along the lanes of a few rows
(one for each token, see `mosaic_tpu_gates`). Those have to lie along the sublanes too: the rows are turned once, and
the column of a head is spread over the lanes where it is needed, a few tokens at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_chunks import LANES
from pallas_kernels.mosaic_tpu_gates import parts_of
from pallas_kernels.mosaic_tpu_gates import rows_of_tokens as gated_rows
from pallas_kernels.mosaic_tpu_packs import spread

LOG2E = 1.4426950408889634
SUBLANES = 8


class Decays:
    """Of the packs of heads of a step. columns: `[step, tiles of lanes, C, 128]`, scratch."""

    def __init__(self, chunk, fixed, rows, columns):
        self.chunk, self.fixed, self.rows, self.columns = chunk, fixed, rows, columns
        self.parts = parts_of(chunk.dtype)
        self.tables = 1 + chunk.exclusive
        # Of one part, sums may be scaled before differences are taken; of two, differences have to be exact.
        self.scale, self.exp = (LOG2E, jnp.exp2) if self.parts == 1 else (1.0, jnp.exp)

    @property
    def kind(self):
        return self.chunk.decay

    def turn(self, pack):
        """Writes the columns of a pack."""
        if self.kind != "token":
            return
        count = self.rows.shape[1]
        for tile, start in enumerate(range(0, count, LANES)):
            width = min(LANES, count - start)
            self.columns[pack, tile, :, :width] = (self.rows[pack, start : start + width] * self.scale).T

    def of_block(self, pack, first, block):
        """Of some tokens (lines) and the heads from `first` on that share lanes: between, a list of `[., C]`; since and
        until, `[., lanes]`. None stands for no decay at all."""
        heads = range(self.chunk.together)
        if self.kind == "none":
            return [None for _ in heads], None, None
        if self.kind == "head":
            betweens = [self.fixed.between[pack, self.rows_of_table(0, first + n, block)] for n in heads]
            return betweens, *(self.of_table(pack, first, what, block) for what in range(2))
        betweens, readings, lefts = [], [], []
        for n in heads:
            reading, gone = self.sums(pack, first + n, block)
            betweens.append(self.exp(jnp.minimum(self.passed(pack, first + n, reading), 0.0)))
            readings.append(_sum(reading))
            lefts.append(self.left(pack, first + n, gone))
        return betweens, self.exp(self.by_head(readings)), self.exp(self.by_head(lefts))

    def between(self, pack, head, block):
        """Of some tokens (lines) and one head, `[., C]`; of tokens that are not seen anything up to 1."""
        if self.kind == "none":
            return None
        if self.kind == "head":
            return self.fixed.between[pack, self.rows_of_table(0, head, block)]
        reading, _ = self.sums(pack, head, block)
        return self.exp(jnp.minimum(self.passed(pack, head, reading), 0.0))

    def of_keys(self, pack, block):
        """since and until of some tokens and all heads of a pack, each in the lanes of its keys; or None."""
        heads, of_pack = range(self.chunk.pack.heads), (self.chunk.pack.key, self.chunk.pack.keys)
        if self.kind == "none":
            return None, None
        if self.kind == "head":
            tables = ([self.fixed.wide[pack, self.rows_of_table(what, h, block)] for h in heads] for what in range(2))
            return tuple(self.by_head(of_heads, *of_pack) for of_heads in tables)
        sums = [self.sums(pack, h, block) for h in heads]
        readings = [_sum(reading) for reading, _ in sums]
        lefts = [self.left(pack, h, gone) for h, (_, gone) in zip(heads, sums, strict=True)]
        return tuple(self.exp(self.by_head(of_heads, *of_pack)) for of_heads in (readings, lefts))

    def sums(self, pack, head, block):
        """In parts: of what reads and of what is decayed, `[., 128]`, alike in all lanes."""
        sums = [self.column(pack, number, head, block) for number in range(self.tables * self.parts)]
        return sums[-self.parts :], sums[: self.parts]

    def passed(self, pack, head, reading):
        """From what is decayed to what reads; above 0 it is between tokens that do not see one another."""
        lying = (self.row(pack, number, head) for number in range(self.parts))
        return _sum([spread(r, g.shape[1]) - g for r, g in zip(reading, lying, strict=True)])

    def left(self, pack, head, gone):
        return _sum([last - g for last, g in zip(self.last(pack, head), gone, strict=True)])

    def of_table(self, pack, first, what, block):
        heads = range(first, first + self.chunk.together) if isinstance(first, int) else (
            first + n for n in range(self.chunk.together)
        )
        return self.by_head([self.fixed.wide[pack, self.rows_of_table(what, head, block)] for head in heads])

    def total(self, pack, first):
        """From state to state, `[1, lanes]`."""
        heads = range(self.chunk.together)
        if self.kind == "head":
            return self.of_table(pack, first, 2, slice(0, SUBLANES))[:1]
        return self.by_head([self.exp(_sum(self.last(pack, first + n))) for n in heads])

    def last(self, pack, head):
        length = self.rows.shape[2]
        end = slice(length - SUBLANES, length)
        return [self.column(pack, number, head, end)[-1:] for number in range(self.parts)]

    def at(self, number, head):
        return number * self.chunk.pack.heads + head

    def row(self, pack, number, head):
        return self.rows[pack, pl.ds(self.at(number, head), 1)] * self.scale

    def column(self, pack, number, head, block):
        at = self.at(number, head)
        tile, lane = (0, at) if self.columns.shape[1] == 1 else (at // LANES, at % LANES)
        found = self.columns[pack, tile, block]
        return jnp.take_along_axis(found, jnp.full(found.shape, lane, jnp.int32), axis=1)

    def rows_of_table(self, what, head, block):
        """Of `fixed.wide`, or with what = 0 of `fixed.between`."""
        length = self.chunk.length
        start = (what * self.chunk.pack.heads + head) * length + block.start
        return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, SUBLANES), block.stop - block.start)

    def by_head(self, of_heads, each=None, width=None):
        """One for each head, alike in all lanes, to one with, in the lanes of a head, its own. each: lanes of a head,
        by default of its values; width: of all, by default of a tile of values."""
        each = self.chunk.pack.value if each is None else each
        of_heads = [spread(x, self.chunk.lanes if width is None else width) for x in of_heads]
        found = of_heads[0]
        for n, x in enumerate(of_heads[1:], 1):
            lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            found = jnp.where(lane >= n * each, x, found)
        return found


def rows_of_tokens(log_decay, starts, chunk: int, heads: int, exclusive: bool, dtype):
    """What `Decays` are made from. starts: `[B, T]`, tokens that must not read the state that they find; or None."""
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


def _sum(parts):
    return functools.reduce(jnp.add, parts)

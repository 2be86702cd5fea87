"""A chunk of linear attention on a TPU with a decay for each key channel, forward, over references.

A TPU's registers hold a few of these matrices and no more, and its compiler starts whatever it can as soon as it can:
so each loop does little, and leaves it in fast memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import mosaic_tpu_vector_backward as vector_backward
from pallas_kernels.linear_attention.mosaic_tpu_vector_factors import (
    Factors,
    Tokens,
    all_units,
    blocks_of_heads,
    dot,
    factors_scratch,
    make_factors,
    of_head,
    part,
    unit_of,
    unit_of_keys,
)
from pallas_kernels.linear_attention.mosaic_tpu_vector_scores import scores_of_pack
from pallas_kernels.mosaic_tpu_blocks import Blocks
from pallas_kernels.mosaic_tpu_chunks import LANES, divisor
from pallas_kernels.mosaic_tpu_packs import Pack, spread

WIDE = 256  # lanes of values at once: of the matrix units of a v6e
PACKS = 2  # narrow ones at once, so that one has something to do while the other waits for its products


@dataclasses.dataclass(frozen=True)
class Vector:
    """A `Chunk`.

    fixed: the bonus `[1, keys]`, or None. rows: None, or `[8, C]`: whether a token reads the state and the tokens
    before it (1) or its own value alone (0)."""

    pack: Pack
    scale: float
    exclusive: bool
    dtype: Any  # of the products' operands

    @property
    def name(self):
        return "linear_attention_vector"

    def output(self, block):
        _, _, tokens, _ = block
        return jax.ShapeDtypeStruct(tokens.v.shape, tokens.v.dtype)

    def scratch(self, block, step, *, backward):
        length = block[2].q.shape[0]
        factors = factors_scratch(self, length, step, backward)
        if backward:
            return [*factors, *vector_backward.scratch(self, length, step)]
        return [*factors, pltpu.VMEM((step, length, self.pack.heads * length), self.dtype)]

    def forward(self, fixed, state, tokens, rows, o, *scratch):
        pack, (step, keys, values) = self.pack, state.shape
        *factors, scores = scratch
        factors = Factors(*factors)
        alone = Blocks()
        make_factors(self, step, tokens, rows, factors, alone)
        unit = unit_of_keys(pack)
        units = keys // unit

        at_once = divisor(step, PACKS if units == 1 else 1)

        @pl.loop(0, step // at_once)
        def _(n):
            packs = [n * at_once + m for m in range(at_once)]
            found = [scores_of_pack(self, p, units, fixed, tokens, factors) for p in packs]
            for p, x in zip(packs, found, strict=True):
                scores[p] = x.astype(scores.dtype)
                for m in [p * units + m for m in range(units)]:
                    factors.turned[m] = factors.until[m].T
                    factors.wide[m] = jnp.broadcast_to(factors.total[m, :1], (LANES, unit)).T

        width = WIDE if values % WIDE == 0 else unit_of(values)
        count = values // width
        at_once = divisor(step * count, PACKS if units == 1 and width < WIDE else 1)

        @pl.loop(0, step * count // at_once)
        def _(n):
            turns = [n * at_once + m for m in range(at_once)]
            shared = width, state, tokens.v, o, factors, scores
            for store in [self._values(turn // count, turn % count, *shared) for turn in turns]:
                store()

    def _values(self, p, n, width, state, v, o, factors, scores):
        """Some lanes of values of a pack. Returns what stores them: of several, all load before one stores, since the
        compiler does not know that they are apart."""
        pack, (_, keys, values) = self.pack, state.shape
        unit = unit_of_keys(pack)
        units = range(keys // unit)
        lanes, inner = part(p * (values // width) + n, width, o.shape[1]), part(n, width, values)
        v, old = v[:, lanes].astype(self.dtype), state[p, :, inner]
        below = [of_head(v, head, pack, n) for head in range(pack.heads)]
        below = v if len(below) == 1 else jnp.concatenate(below)
        since = all_units(factors.since, p, len(units))
        if keys % LANES == 0 and scores.shape[2] % LANES == 0:  # one product, which takes fewer registers
            read = dot(
                jnp.concatenate([since, scores[p]], axis=1), jnp.concatenate([old.astype(self.dtype), below]), (1, 0)
            )
        else:
            read = dot(since, old.astype(self.dtype), (1, 0)) + dot(scores[p], below, (1, 0))
        read, now = read.astype(o.dtype), []
        for m in units:
            written = blocks_of_heads(dot(factors.turned[p * len(units) + m], v, (1, 0)), pack, n * width)
            decay = spread(factors.wide[p * len(units) + m], width)
            now.append(decay * old[m * unit : (m + 1) * unit] + written)

        def store():
            o[:, lanes] = read
            for m in units:
                state[p, m * unit : (m + 1) * unit, inner] = now[m]

        return store

    def backward(self, *references):
        vector_backward.backward(self, *references)


def rows_of_tokens(starts, chunk: int, packs: int):
    """`[B, packs, chunks, 8, C]`: 0 for tokens `[B, T]` that must not read the state that they find."""
    batch, length = starts.shape
    rows = jnp.where(starts, 0.0, 1.0).reshape(batch, 1, length // chunk, 1, chunk)
    return jnp.broadcast_to(rows, (batch, packs, length // chunk, 8, chunk))

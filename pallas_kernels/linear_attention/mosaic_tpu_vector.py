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
    scores_of_pack,
    unit_of,
    unit_of_keys,
)
from pallas_kernels.mosaic_tpu_chunks import LANES
from pallas_kernels.mosaic_tpu_packs import Pack, spread


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
        make_factors(self, step, fixed, tokens, rows, factors)
        unit = unit_of_keys(pack)
        units = keys // unit

        @pl.loop(0, step)
        def _(p):
            scores[p] = scores_of_pack(self, p, units, factors).astype(scores.dtype)
            for n in range(units):
                factors.turned[p * units + n] = factors.until[p * units + n].T
                total = factors.total[p * units + n, :1]
                factors.wide[p * units + n] = jnp.broadcast_to(total, (LANES, unit)).T

        width = unit_of(values)
        count = values // width

        @pl.loop(0, step * count)
        def _(n):
            p, lanes, inner = n // count, part(n, width, o.shape[1]), part(n % count, width, values)
            v = tokens.v[:, lanes].astype(self.dtype)
            old = state[p, :, inner]
            below = [of_head(v, head, pack, n % count) for head in range(pack.heads)]
            below = v if len(below) == 1 else jnp.concatenate(below)
            read = dot(all_units(factors.since, p, units), old.astype(self.dtype), (1, 0))
            now = []
            for m in range(units):
                written = blocks_of_heads(dot(factors.turned[p * units + m], v, (1, 0)), pack, n % count * width)
                now.append(spread(factors.wide[p * units + m], width) * old[m * unit : (m + 1) * unit] + written)
            o[:, lanes] = (read + dot(scores[p], below, (1, 0))).astype(o.dtype)
            for m in range(units):
                state[p, m * unit : (m + 1) * unit, inner] = now[m]

    def backward(self, *references):
        vector_backward.backward(self, *references)


def rows_of_tokens(starts, chunk: int, packs: int):
    """`[B, packs, chunks, 8, C]`: 0 for tokens `[B, T]` that must not read the state that they find."""
    batch, length = starts.shape
    rows = jnp.where(starts, 0.0, 1.0).reshape(batch, 1, length // chunk, 1, chunk)
    return jnp.broadcast_to(rows, (batch, packs, length // chunk, 8, chunk))

"""The chunk of the delta rule with a decay for each key channel on a TPU, over references: the formulas of `chunked.py`.

Stage by stage for all packs of a step, each by itself: within one stage the compiler takes as many values into registers
as it can, so that two of them together spill.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.delta_rule import mosaic_tpu_vector_tables as tables
from pallas_kernels.delta_rule.mosaic_tpu_inverse import invert
from pallas_kernels.delta_rule.mosaic_tpu_vector_tables import CHUNK, apart, lanes_of, sets_of
from pallas_kernels.mosaic_tpu_chunks import product
from pallas_kernels.mosaic_tpu_packs import Pack


@dataclasses.dataclass(frozen=True)
class Vector:
    """A `Chunk`."""

    pack: Pack
    scale: float
    dtype: Any  # of the products' operands

    name = "delta_rule_vector"

    def output(self, block):
        return block[2].v

    def scratch(self, block, step, *, backward):
        return [tables.scratch(self.pack, step, self.dtype, backward=backward)]

    def forward(self, fixed, state, tokens, rows, o, refs):
        self.prepare(tokens, refs)

        @pl.loop(0, state.shape[0])
        def _(number):
            self.results(number, state, tokens.v, o, refs)

    def backward(self, fixed, before, tokens, rows, d_state, d_o, d_fixed, d_tokens, d_rows, refs):
        raise NotImplementedError

    def prepare(self, tokens, refs):
        tables.decay_within_spans(tokens, self.pack, refs)
        tables.decay_across_spans(tokens, self.pack, refs)
        tables.score(tokens, self.pack, refs, self.dtype)
        invert(refs["lower"], refs["lower"], self.dtype)

    def results(self, number, state, v, o, refs):
        pack, dtype = self.pack, self.dtype
        reading, writing = refs["ends"][number, 0], refs["ends"][number, 1]
        for unit in pack.units:
            at, total = lanes_of(number, pack.values, unit), across(refs["total"][number, :1], unit.stop - unit.start)
            values, old = v[:, at], state[number, :, unit]
            found = product(reading, old, (1, 0), dtype) + self.tabled(refs["reads"], number, values, unit)
            u = self.solved(refs["lower"], number, found[:CHUNK], unit).astype(v.dtype)
            found = found[CHUNK:] + self.tabled(refs["of_writes"], number, u, unit)
            o[:, at] = (found * self.scale).astype(o.dtype)
            written = product(writing, jnp.concatenate([u, values]), (0, 0), dtype)
            state[number, :, unit] = old * total + pack.blocks(written, unit)

    def tabled(self, table, number, x, unit):
        """Tables of all heads by what their heads have in `x`."""
        sets = sets_of(self.pack)
        parts = (
            product(table[number * sets + one], apart(x, one, self.pack.value, unit.start), (1, 0), self.dtype)
            for one in range(sets)
        )
        return sum(parts)

    def solved(self, inverse, number, x, unit):
        """In more than bfloat16: see `mosaic_tpu_chunk.solve`."""
        sets, dtype = sets_of(self.pack), self.dtype
        parts = [x] if dtype == jnp.float32 else split(x)
        found = 0.0
        for one in range(sets):
            matrix = inverse[number * sets + one]
            first, *rest = (apart(part, one, self.pack.value, unit.start) for part in parts)
            if not rest:
                found += product(matrix, first, (1, 0), dtype)
                continue
            matrix = jnp.concatenate(split(matrix))
            both = product(matrix, first, (1, 0), dtype)
            found += both[:CHUNK] + (both[CHUNK:] + product(matrix[:CHUNK], rest[0], (1, 0), dtype))
        return found


def split(x):
    """The first 16 bits of a float32 as two bfloat16."""
    first = x.astype(jnp.bfloat16)
    return [first, (x - first.astype(jnp.float32)).astype(jnp.bfloat16)]


def across(row, lanes):
    """`[1, n]` as a column, alike in as many lanes."""
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T

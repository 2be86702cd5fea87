"""The chunk of the delta rule with a decay for each key channel on a TPU, over references: the formulas of `chunked.py`.

Stage by stage for all packs of a step, each by itself: within one stage the compiler takes as many values into registers
as it can, so that two of them together spill.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.delta_rule import mosaic_tpu_vector_backward as gradients
from pallas_kernels.delta_rule import mosaic_tpu_vector_tables as tables
from pallas_kernels.delta_rule.mosaic_tpu_inverse import invert
from pallas_kernels.delta_rule.mosaic_tpu_vector_tables import CHUNK, across, apart, blocks, keep_lanes, lanes_of, sets_of, split
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
        refs = tables.scratch(self.pack, step, self.dtype, backward=backward)
        return [refs | gradients.scratch(self.pack, step, self.dtype) if backward else refs]

    def forward(self, fixed, state, tokens, rows, o, refs):
        self.prepare(tokens, refs)

        @pl.loop(0, state.shape[0])
        def _(number):
            self.results(number, state, tokens.v, o, refs)

    def backward(self, fixed, before, tokens, rows, d_state, d_o, d_fixed, d_tokens, d_rows, refs):
        self.prepare(tokens, refs)
        pack, dtype, packs = self.pack, self.dtype, range(d_state.shape[0])

        @pl.loop(0, len(packs))
        def _(number):
            self.solution(number, before, tokens.v, refs)

        @pl.loop(0, len(packs))
        def _(number):
            self.of_values(number, d_state, d_o, d_tokens.v, refs)

        @pl.loop(0, len(packs))
        def _(number):
            gradients.of_states(pack, dtype, number, before, d_state, refs)

        for levels in (range(2), range(2, 6)):

            @pl.loop(0, len(packs))
            def _(number, levels=levels):
                gradients.of_pairs(pack, dtype, number, levels, refs)

        for kind in range(2):

            @pl.loop(0, len(packs))
            def _(number, kind=kind):
                gradients.of_vectors(pack, dtype, number, kind, refs)

        @pl.loop(0, len(packs))
        def _(number):
            @pl.loop(0, CHUNK // tables.SPAN)
            def _(at):
                gradients.of_tokens(pack, number, at, tokens, d_tokens, refs)

        @pl.loop(0, len(packs))
        def _(number):
            gradients.of_log_decay(pack, dtype, number, tokens, d_tokens, refs)

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
            state[number, :, unit] = old * total + blocks(number, written, pack, unit)

    def solution(self, number, before, v, refs):
        """What `results` writes, into `refs["written"]`."""
        for unit in self.pack.units:
            values = v[:, lanes_of(number, self.pack.values, unit)]
            found = product(refs["ends"][number, 0, :CHUNK], before[number, :, unit], (1, 0), self.dtype)
            found = found + self.tabled(refs["reads"].at[:, :CHUNK], number, values, unit)
            u = self.solved(refs["lower"], number, found, unit)
            refs["written"][number, :CHUNK, unit] = u.astype(values.dtype)
            refs["written"][number, CHUNK:, unit] = values

    def of_values(self, number, d_state, d_o, d_v, refs):
        """Cotangents of what is written, and of the right side of the system."""
        for unit in self.pack.units:
            at = lanes_of(number, self.pack.values, unit)
            of_o = d_o[:, at].astype(jnp.float32) * self.scale
            found = product(refs["ends"][number, 1], d_state[number, :, unit], (1, 0), self.dtype)
            of_u = found[:CHUNK] + self.tabled(refs["of_writes"], number, of_o, unit, transposed=True)
            right = self.solved(refs["lower"], number, of_u, unit, transposed=True)
            read = jnp.concatenate([right, of_o]).astype(self.dtype)
            refs["read"][number, :, unit] = read
            of_v = found[CHUNK:] + self.tabled(refs["reads"], number, read, unit, transposed=True)
            d_v[:, at] = of_v.astype(d_v.dtype)

    def tabled(self, table, number, x, unit, *, transposed=False):
        """Tables of all heads by what their heads have in `x`."""
        found, sets = 0.0, sets_of(self.pack)
        for one in range(sets):
            matrix = table[number * sets + one]
            if transposed:
                found += self.together(number, product(matrix, x, (0, 0), self.dtype), one, unit)
            else:
                found += product(matrix, apart(number, x, one, self.pack.value, unit.start), (1, 0), self.dtype)
        return found

    def together(self, number, x, one, unit):
        """The way back from `apart`."""
        heads = (x[head * CHUNK : (head + 1) * CHUNK] for head in range(2))
        width = self.pack.value
        return sum(keep_lanes(number, x, (2 * one + head) * width - unit.start, width) for head, x in enumerate(heads))

    def solved(self, inverse, number, x, unit, *, transposed=False):
        """In more than bfloat16: see `mosaic_tpu_chunk.solve`."""
        if self.dtype == jnp.float32:
            return self.tabled(inverse, number, x, unit, transposed=transposed)
        found, sets = 0.0, sets_of(self.pack)
        parts = split(x)
        for one in range(sets):
            matrix = split(inverse[number * sets + one])
            if transposed:
                (m, m_rest), (y, y_rest) = matrix, parts
                both = product(m, y, (0, 0), self.dtype)
                both = both + (product(m_rest, y, (0, 0), self.dtype) + product(m, y_rest, (0, 0), self.dtype))
                found += self.together(number, both, one, unit)
            else:
                y, y_rest = (apart(number, part, one, self.pack.value, unit.start) for part in parts)
                both = product(jnp.concatenate(matrix), y, (1, 0), self.dtype)
                found += both[:CHUNK] + (both[CHUNK:] + product(matrix[0], y_rest, (1, 0), self.dtype))
        return found

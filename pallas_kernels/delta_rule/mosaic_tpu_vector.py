"""The chunk of the delta rule with a decay for each key channel on a TPU, over references: as in `chunked.py`.

Stage by stage, each of them for all packs of a step. A turn of a loop is a block of instructions that is scheduled by
itself: the compiler begins all that it can within one, whether there are registers for it or not. So a turn is some
hundred instructions long, of one pack, or of two in lockstep where their values fit into the registers, as one alone
waits for its own products.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.delta_rule import mosaic_tpu_vector_backward as gradients
from pallas_kernels.delta_rule import mosaic_tpu_vector_tables as tables
from pallas_kernels.delta_rule.mosaic_tpu_inverse import invert
from pallas_kernels.delta_rule.mosaic_tpu_vector_tables import (
    CHUNK,
    HALVES,
    SPAN,
    across,
    apart,
    blocks,
    lanes_of,
    places,
    sets_of,
    split,
    together,
)
from pallas_kernels.mosaic_tpu_blocks import in_blocks
from pallas_kernels.mosaic_tpu_chunks import LANES, product
from pallas_kernels.mosaic_tpu_packs import Pack

PACKS = 4  # in a step of the grid: two turns of two


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
        packs = state.shape[0]
        self.prepare(packs, tokens, refs)
        in_blocks(packs, 2, self.results, state, tokens.v, o, refs)

    def backward(self, fixed, before, tokens, rows, d_state, d_o, d_fixed, d_tokens, d_rows, refs):
        packs, pack = d_state.shape[0], self.pack
        self.prepare(packs, tokens, refs)
        in_blocks(packs, 2, self.solution, before, tokens.v, refs)
        in_blocks(packs, 1, self.of_values, d_state, d_o, d_tokens.v, refs)
        in_blocks(packs, 2, gradients.of_states, before, d_state, pack, refs)
        in_blocks(packs, 1, gradients.of_pairs, range(2), pack, refs)
        in_blocks(packs, 2, gradients.of_pairs, range(2, len(HALVES)), pack, refs)
        in_blocks(packs, 2, gradients.of_vectors, 0, pack, refs)
        in_blocks(packs, 2, gradients.of_vectors, 1, pack, refs)
        part_by_part(packs, CHUNK // SPAN, gradients.of_tokens, tokens, d_tokens, pack, refs)
        in_blocks(packs, 1, gradients.of_log_decay, tokens.log_decay, d_tokens.log_decay, pack, refs)

    def prepare(self, packs, tokens, refs):
        tables.number_places(refs)
        part_by_part(packs, CHUNK // SPAN, tables.decay_within_spans, tokens, self.pack, refs)
        part_by_part(packs, 2, tables.decay_across_spans, tokens, self.pack, refs)
        in_blocks(packs, 1, tables.score, tokens, self.pack, refs)
        invert(refs["lower"], refs["inverse"], self.dtype)

    def results(self, number, state, v, o, refs):
        pack, dtype = self.pack, self.dtype
        (reading, writing), total = both_ends(refs, number), refs["total"][number, :1]
        for unit in pack.units:
            at = lanes_of(number, pack.values, unit)
            values, old = v[:, at], state[number, :, unit]
            found = product(reading, old, (1, 0), dtype) + self.of_k(number, values, unit, refs)
            u = self.solved(number, found[:CHUNK], unit, refs).astype(v.dtype)
            found = found[CHUNK:] + self.of_b(number, u, unit, refs)
            o[:, at] = (found * self.scale).astype(o.dtype)
            written = product(writing, jnp.concatenate([u, values]), (0, 0), dtype)
            written = blocks(places(refs, old.shape[1])[1], written, pack, unit)
            state[number, :, unit] = old * across(total, old.shape[1]) + written

    def solution(self, number, before, v, refs):
        """U and V of `results`."""
        for unit in self.pack.units:
            values = v[:, lanes_of(number, self.pack.values, unit)]
            found = product(refs["ends"][number, 0, 0], before[number, :, unit], (1, 0), self.dtype)
            found += self.of_sets(number, lambda at: refs["tables"][at, 0], values, unit, refs, False)
            u = self.solved(number, found, unit, refs)
            refs["written"][number, :, unit] = jnp.concatenate([u.astype(values.dtype), values])

    def of_values(self, number, d_state, d_o, d_v, refs):
        """Cotangents of what is written, and of the right side of the system."""
        _, writing = both_ends(refs, number)
        for unit in self.pack.units:
            at = lanes_of(number, self.pack.values, unit)
            of_o = (d_o[:, at].astype(jnp.float32) * self.scale).astype(self.dtype)
            found = product(writing, d_state[number, :, unit], (1, 0), self.dtype)
            of_u = found[:CHUNK] + self.of_b(number, of_o, unit, refs, transposed=True)
            right = self.solved(number, of_u, unit, refs, transposed=True)
            read = jnp.concatenate([right.astype(self.dtype), of_o])
            refs["read"][number, :, unit] = read
            of_v = found[CHUNK:] + self.of_k(number, read, unit, refs, transposed=True)
            d_v[:, at] = of_v.astype(d_v.dtype)

    def of_k(self, number, x, unit, refs, *, transposed=False):
        """What a and q read of k's, from V; or back."""
        both = (2 * CHUNK, LANES)
        return self.of_sets(number, lambda at: refs["tables"][at, :2].reshape(both), x, unit, refs, transposed)

    def of_b(self, number, x, unit, refs, *, transposed=False):
        """What q reads of b's, from U; or back."""
        return self.of_sets(number, lambda at: refs["tables"][at, 2], x, unit, refs, transposed)

    def solved(self, number, x, unit, refs, *, transposed=False):
        """By the inverse; in more than bfloat16, as what it rounds away grows where keys are alike."""
        if self.dtype == jnp.float32:
            return self.of_sets(number, lambda at: refs["inverse"][at], x, unit, refs, transposed)
        first, rest = split(x)

        def inverse(part):
            return lambda at: split(refs["inverse"][at])[part]

        parts = ((inverse(0), first), (inverse(1), first), (inverse(0), rest))
        return sum(self.of_sets(number, table, x, unit, refs, transposed) for table, x in parts)

    def of_sets(self, number, table, x, unit, refs, transposed):
        """Products of tables of all heads with what is those heads' of x. table: of a set."""
        sets, width, found, lane = sets_of(self.pack), self.pack.value, 0.0, places(refs, x.shape[1])[1]
        for one in range(sets):
            matrix = table(number * sets + one)
            if transposed:
                of_both = product(matrix, x, (0, 0), self.dtype)
                found += together(lane, of_both, one, width, unit.start)
            else:
                found += product(matrix, apart(lane, x, one, width, unit.start), (1, 0), self.dtype)
        return found


def both_ends(refs, number):
    ends = refs["ends"][number]
    return ends.reshape(2, 2 * CHUNK, ends.shape[-1])


def part_by_part(packs: int, parts: int, visit: Callable[..., None], *arguments) -> None:
    """visit(pack, part, *arguments), two parts in lockstep."""

    def of_pack(number):
        def turn(n):
            visit(number, 2 * n, *arguments)
            visit(number, 2 * n + 1, *arguments)

        if parts == 2:
            turn(0)
        else:
            pl.loop(0, parts // 2)(turn)

    in_blocks(packs, 1, of_pack)

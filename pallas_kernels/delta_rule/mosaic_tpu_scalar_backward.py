"""The gradients of a chunk of the delta rule with one decay a head, or none, on a TPU, over references, in stages.

With R = [q; a] and W = [k; b], the scores A = (R W^T) * G for decays G, R' and W' decayed since the state S before the
chunk and until the state after it, w that of the state itself, L the part of A that a has with b, and Y = [v; u]:

    r = A_ak v + a' S,  u = (I - L)^-1 r,  o = A_q Y + q' S,  S_after = w S + W'^T Y.

From the cotangents do and dS, those of what the state reads and of everything written are

    dY = W' dS + A_q^T do,  dr = (I - L)^-T du,  dv = (W' dS)_v + A_k^T dB  with  dB = [do; dr],
    dS_before = w dS + R'^T dB,  dA = dB Y^T,  dR' = dB S^T,  dW' = Y dS^T,
    dR = (dA * G) W + dR' * decays,  dW = (dA * G)^T R + dW' * decays,

and the logarithms of decays get dA * A, dR' * R', dW' * W' and w dS * S.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule.mosaic_tpu_scalar_scratch import Backward, backward_shapes
from pallas_kernels.delta_rule.mosaic_tpu_stages import (
    UNITS,
    blocks,
    by_head,
    by_keys,
    by_keys_below,
    few_packs,
    heads_of,
    in_units,
)
from pallas_kernels.delta_rule.mosaic_tpu_tables import (
    Tables,
    between,
    bind,
    make_tables,
    place_of,
    reading,
    shapes_of_tables,
    solve,
    sums_lying,
    tall_product,
    whole_of,
    writing,
)
from pallas_kernels.mosaic_tpu_blocks import in_blocks, part
from pallas_kernels.mosaic_tpu_chunks import LANES, product


def run(chunk, before, tokens, rows, d_state, d_o, d_tokens, d_rows, scratch) -> None:
    """See `Chunk.backward`."""
    step, keys, values = before.shape
    length = d_o.shape[0]
    tables, rest = bind(shapes_of_tables(chunk, step, length, keys), scratch)
    own, _ = bind(backward_shapes(chunk, step, length, keys, values), rest)
    of = _Stages(chunk, before, tokens, rows, d_state, d_o, d_tokens, d_rows, tables, own, step, length, keys)
    few = few_packs(keys)
    make_tables(chunk, tokens, rows, tables, of.decays)
    in_blocks(step, 2 * few, of.transposed)
    in_units(chunk.pack, step, UNITS, of.right)
    in_units(chunk.pack, step, UNITS, of.solution)
    in_units(chunk.pack, step, UNITS, of.written)
    in_units(chunk.pack, step, UNITS, of.read)
    in_blocks(step, 2 * few, of.since)
    in_blocks(step, 2 * few, of.until)
    in_blocks(step, few, of.scores)
    in_units(chunk.pack, step, UNITS, of.state)
    in_units(chunk.pack, step, UNITS, of.kept)
    in_blocks(step, few, of.readers)
    in_blocks(step, few, of.writers)
    if chunk.decay == "scalar":
        in_blocks(step, 1, of.rows)


class _Stages(NamedTuple):
    chunk: Any
    before: Any
    tokens: Any
    gates: Any
    d_state: Any
    d_o: Any
    d_tokens: Any
    d_rows: Any
    tables: Tables
    own: Backward
    step: int
    length: int
    keys: int

    @property
    def pack(self):
        return self.chunk.pack

    def product(self, a, b, axes):
        return product(a, b, axes, self.chunk.dtype)

    def at(self, one, head):
        return one * self.pack.heads + head

    def decays(self, one, gates):
        own, pack, dtype = self.own, self.pack, self.chunk.dtype
        read, write = reading(self.tokens, one, self.keys).T, writing(self.tokens, one, self.keys)
        if gates is not None:
            read = read.astype(jnp.float32) * by_keys_below(pack, gates.lying_since)
            write = (write.astype(jnp.float32) * by_keys(pack, lambda head: gates.decays(head)[1])).astype(dtype)
            for head in range(pack.heads):
                own.reader[self.at(one, head)], own.writer[self.at(one, head)], _ = gates.decays(head)
                own.of_whole[self.at(one, head)] = jnp.zeros((1, LANES), jnp.float32)
        own.since[one], own.until[one] = read.astype(dtype), write

    def transposed(self, one):
        length = self.length
        for head in range(self.pack.heads):
            at = self.at(one, head)
            self.own.scores[at] = self.tables.scores[at].T
            parts = self.tables.inverse.shape[1] // length
            for n in range(parts):
                rows = part(n, length)
                self.own.inverse[at, rows] = self.tables.inverse[at, rows].T

    def right(self, unit):
        length = self.length
        v = self.tokens.v[:, unit.lanes]
        found = self.product(self.tables.since[unit.one, length:], self.before[unit.one, :, unit.own], (1, 0))

        def of_values(head):
            return self.product(self.tables.scores[self.at(unit.one, head), length:, :length], v, (1, 0))

        self.own.right[:, unit.lanes] = found + by_head(self.pack, of_values, unit)

    def solution(self, unit):
        right = self.own.right[:, unit.lanes]
        u = by_head(self.pack, lambda head: self.solve(self.tables.inverse, unit, head, right), unit)
        self.own.u[:, unit.lanes] = u.astype(self.chunk.dtype)

    def solve(self, inverse, unit, head, right):
        return solve(inverse[self.at(unit.one, head)], right, self.chunk.dtype)

    def written(self, unit):
        """The cotangents of what is written: from the state; and of u, from what q reads of it."""
        own, length = self.own, self.length
        found = self.product(own.until[unit.one], self.d_state[unit.one, :, unit.own], (1, 0))
        own.of_v[:, unit.lanes] = found[:length]
        d_o = (self.d_o[:, unit.lanes].astype(jnp.float32) * self.chunk.scale).astype(self.chunk.dtype)
        own.read[:length, unit.lanes] = d_o

        def of_outputs(head):
            return self.product(own.scores[self.at(unit.one, head), length:, :length], d_o, (1, 0))

        own.of_u[:, unit.lanes] = found[length:] + by_head(self.pack, of_outputs, unit)

    def read(self, unit):
        """The cotangents of r."""
        of_u = self.own.of_u[:, unit.lanes]
        found = by_head(self.pack, lambda head: self.solve(self.own.inverse, unit, head, of_u), unit)
        self.own.read[self.length :, unit.lanes] = found.astype(self.chunk.dtype)

    def since(self, one):
        read = self.own.read[:, self.values(one)]
        self.own.of_since[one] = self.product(read, self.before[one], (1, 1))

    def until(self, one):
        self.own.of_until[one] = self.product(self.written_by(one), self.d_state[one], (1, 1))

    def written_by(self, one):
        values = self.values(one)
        return jnp.concatenate([self.tokens.v[:, values], self.own.u[:, values]])

    def values(self, one):
        return part(one, self.pack.values)

    def scores(self, one):
        own, tables = self.own, self.tables
        for head in range(self.pack.heads):
            at = self.at(one, head)
            read = self.pack.of_values(head, own.read[:, self.values(one)])
            found = self.product(read, self.written_by(one), (1, 1))
            if tables.whole is not None:
                logs = found * tables.scores[at].astype(jnp.float32)
                own.of_readers[at] = sums_lying(logs, self.chunk.dtype)[:1]
                own.of_writers[at] = jnp.sum(logs, axis=0, keepdims=True)
            found = found * between(tables, at)[...]
            found = found.astype(self.chunk.dtype)
            own.of_scores[at], own.of_scores_lying[at] = found, found.T

    def state(self, unit):
        """With one product for the values and the state."""
        own, length, heads = self.own, self.length, heads_of(self.pack, unit)
        scores = [own.scores[self.at(unit.one, head), :length] for head in heads]
        left = jnp.concatenate([*scores, own.since[unit.one]])
        found = tall_product(left, own.read[:, unit.lanes], self.chunk.dtype)

        def of_head(head):
            return found[(head - heads[0]) * length : (head - heads[0] + 1) * length]

        d_v = own.of_v[:, unit.lanes] + by_head(self.pack, of_head, unit)
        self.d_tokens.v[:, unit.lanes] = d_v.astype(self.d_tokens.v.dtype)
        own.state[:, unit.lanes] = blocks(self.pack, found[len(heads) * length :], unit)

    def kept(self, unit):
        """In a stage of its own, as the products are a long time in coming. The logarithm's cotangent is not by the
        decay itself yet."""
        found, added = self.d_state[unit.one, :, unit.own], self.own.state[:, unit.lanes]
        if self.tables.whole is None:
            self.d_state[unit.one, :, unit.own] = found + added
            return
        self.d_state[unit.one, :, unit.own] = found * whole_of(self.pack, self.tables, unit) + added
        logs = jnp.sum(found * self.before[unit.one, :, unit.own].astype(jnp.float32), axis=0, keepdims=True)
        for head in heads_of(self.pack, unit):
            own = logs
            if self.pack.heads > 1:
                lane = jax.lax.broadcasted_iota(jnp.int32, logs.shape, 1) + unit.own.start
                own = jnp.where(lane // self.pack.value == head, logs, 0.0)
            self.own.of_whole[self.at(unit.one, head)] += jnp.sum(own, axis=1, keepdims=True)

    def readers(self, one):
        own, of = self.own, self.d_tokens
        write = writing(self.tokens, one, self.keys)
        self.side(one, write, own.of_since[one], own.reader, own.of_scores, of.q, of.a)

    def writers(self, one):
        own, of = self.own, self.d_tokens
        read = reading(self.tokens, one, self.keys)
        self.side(one, read, own.of_until[one], own.writer, own.of_scores_lying, of.k, of.b)

    def side(self, one, other, found, decays, of_scores, first, second):
        """Of what reads, or of what writes: its gradients by the states, and by the scores with the other side."""
        if decays is not None:
            found = found * by_keys(self.pack, lambda head: decays[self.at(one, head)])
        for head in range(self.pack.heads):
            found += self.product(of_scores[self.at(one, head)], self.pack.of_keys(head, other), (1, 0))
        self.store(one, found, first, second)

    def store(self, one, found, first, second):
        own = part(one, self.keys)
        first[:, own], second[:, own] = (
            found[: self.length].astype(first.dtype),
            found[self.length :].astype(second.dtype),
        )

    def rows(self, one):
        own, pack = self.own, self.pack
        since = own.of_since[one] * self.tables.since[one].astype(jnp.float32)
        until = own.of_until[one] * own.until[one].astype(jnp.float32)
        since, until = (sums_lying(x, self.chunk.dtype, pack.heads, pack.key) for x in (since, until))
        not_last = jnp.zeros((1, 2 * self.length - 1), jnp.float32)
        self.d_rows[one] = jnp.zeros(self.d_rows.shape[1:], jnp.float32)
        for head in range(pack.heads):
            at = self.at(one, head)
            writer = until[head : head + 1]
            total = jnp.sum(writer, axis=1, keepdims=True) + (own.of_whole[at] * self.tables.whole[at])[:, :1]
            gone = jnp.concatenate([not_last, total], axis=1) - writer - own.of_writers[at]
            for table, row in enumerate((gone, since[head : head + 1] + own.of_readers[at])):
                place = place_of(table, head, pack.heads, self.chunk.dtype)
                self.d_rows[one, place : place + 1] = row

"""One chunk of the delta rule on a TPU: the formulas of `chunked.py`.

What reads, a and q, stands below one another in one matrix of 2 C rows; so do what writes, b and k, and what is
written, u and v. Then one product makes all four tables of scores, and the sums over b u and k v are one product each.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic_tpu_chunks import product
from pallas_kernels.mosaic_tpu_gates import Gates
from pallas_kernels.mosaic_tpu_gates import rows_of_tokens as gated_rows
from pallas_kernels.mosaic_tpu_halving import part_at, parting, second_halves, with_second_halves
from pallas_kernels.mosaic_tpu_packs import Pack, side_by_side, spread


class Tokens(NamedTuple):
    """log_decay: one for each channel, or None."""

    q: Any
    k: Any
    v: Any
    a: Any
    b: Any
    log_decay: Any


@dataclasses.dataclass(frozen=True)
class Body:
    """decay: "none" or "scalar" (in `rows`, see `Gates`)."""

    pack: Pack
    decay: str
    scale: float
    dtype: Any  # of the products' operands

    @property
    def name(self):
        return f"delta_rule_{self.decay}"

    def __call__(self, blocks):
        scalar = self.decay == "scalar"
        gates = [Gates(rows, self.pack.heads, 2, self.dtype) if scalar else None for *_, rows in blocks]
        scored = [self.scores(tokens, of_pack) for (_, _, tokens, _), of_pack in zip(blocks, gates, strict=True)]
        # All heads of all packs together, as one alone would wait for its products
        length, heads = blocks[0][2].v.shape[0], self.pack.heads
        lower = [jax.lax.stop_gradient(table[:length, :length]) for tables, *_ in scored for table in tables]
        inverses = unit_inverses(lower, self.dtype)
        return [
            self.results(state, tokens.v, of_pack, inverses[number * heads : (number + 1) * heads], *found)
            for number, ((_, state, tokens, _), of_pack, found) in enumerate(zip(blocks, gates, scored, strict=True))
        ]

    def scores(self, tokens, gates):
        """The tables of each head; what reads the state before the chunk, and what writes the one after it."""
        reading, writing = jnp.concatenate([tokens.a, tokens.q]), jnp.concatenate([tokens.b, tokens.k])
        return self.scalar_tables(reading, writing, gates), reading, writing

    def results(self, state, v, gates, inverses, tables, since, until):
        length = v.shape[0]
        # Of what a reads, with the inverse of its system; and of what q reads
        tables = [
            ((table[:length], inverse), table[length:]) for table, inverse in zip(tables, inverses, strict=True)
        ]
        by_units = [
            self.unit(lanes, tables, state[:, lanes], v[:, lanes], since, until, gates)
            for lanes in self.pack.units
        ]
        states, outs = zip(*by_units, strict=True)
        return side_by_side(states), side_by_side(outs)

    def unit(self, lanes, tables, state, v, since, until, gates):
        """Some lanes of the state and the outputs."""
        pack, dtype, length = self.pack, self.dtype, v.shape[0]
        before = product(since, state, (1, 0), dtype)
        if gates is not None:
            width = lanes.stop - lanes.start
            to_reading, to_end, whole = (
                pack.by_head(lambda head, n=n: spread(gates.decays(head)[n], width), lanes) for n in range(3)
            )
            before = before * to_reading

        # What the tokens read before they write
        both = jnp.concatenate([jnp.zeros_like(v), v])

        def solution(head):
            lower, inverse = tables[head][0]
            right = before[:length] + product(lower, both, (1, 0), dtype)
            return solve(lower, inverse, right, dtype)

        u = pack.by_head(solution, lanes)
        written = jnp.concatenate([u.astype(v.dtype), v])
        o = before[length:] + pack.by_head(lambda head: product(tables[head][1], written, (1, 0), dtype), lanes)
        # The state after it
        if gates is not None:
            written, state = written.astype(jnp.float32) * to_end, state * whole
        state = state + pack.blocks(product(until, written, (0, 0), dtype), lanes)
        return state, (o * self.scale).astype(v.dtype)

    def scalar_tables(self, reading, writing, gates):
        """Of each head `[2 C, 2 C]`."""
        length = reading.shape[0] // 2
        reader, i, j = _place(length, (2 * length, 2 * length))
        seen = (i > j) | ((i == j) & reader)
        found = []
        for head in range(self.pack.heads):
            scores = product(self.pack.of_keys(head, reading), writing, (1, 1), self.dtype)
            found.append(jnp.where(seen, scores, 0.0) if gates is None else scores * gates.between(head, seen))
        return found


def _place(length, shape):
    """Of the entries of tables below one another: whether it is q that reads; the token that reads, that writes."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return row & length != 0, row & (length - 1), column & (length - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve(lower, inverse, right, dtype):
    """x with (I - lower) x = right, for a strictly lower triangular matrix, followed by columns that are not read; its
    inverse, for which there is no gradient of its own, is at hand. In more than bfloat16, as what it rounds away grows
    where keys are alike: gradients were off by 13% of the largest, with it by 2%."""
    return _exact(inverse, right, (1, 0), dtype)


def _solve_fwd(lower, inverse, right, dtype):
    solution = _exact(inverse, right, (1, 0), dtype)
    return solution, (lower, inverse, solution)


def _solve_bwd(dtype, kept, cotangent):
    lower, inverse, solution = kept
    of_right = _exact(inverse, cotangent, (0, 0), dtype)
    solution = jnp.concatenate([solution, jnp.zeros_like(solution)])
    of_lower = product(of_right, solution, (1, 1), dtype)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, of_lower.shape, axis) for axis in (0, 1))
    return jnp.where(i > j, of_lower, 0.0), jnp.zeros_like(inverse), of_right


solve.defvjp(_solve_fwd, _solve_bwd)


def unit_inverses(matrices, dtype):
    """(I - lower)^-1 of each by halves, as `blocks.unit_inverse`: X of blocks twice as long is X + X M X, where M is
    what lies below the diagonal between the halves of each. All of them halving by halving, as one alone would wait for
    its products."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, matrices[0].shape, axis) for axis in (0, 1))
    pairs = parting(i, j)
    inverses = [jnp.where(i == j, 1.0, jnp.where(part_at(pairs, 1), x, 0.0)) for x in matrices]
    size = 2
    while size < i.shape[0]:
        below = [jnp.where(part_at(pairs, size), x, 0.0) for x in matrices]
        rows = [second_halves(x, size) for x in inverses]
        below = [_exact(x, m, (1, 0), dtype) for x, m in zip(rows, below, strict=True)]
        below = [_exact(m, x, (1, 0), dtype) for x, m in zip(inverses, below, strict=True)]
        inverses = [
            with_second_halves(x, row + m, size) for x, row, m in zip(inverses, rows, below, strict=True)
        ]
        size *= 2
    return inverses


def _exact(a, b, axes, dtype):
    """A product of float32 matrices. Where the inputs are bfloat16, of their first 16 bits, by three products."""
    if dtype == jnp.float32:
        return product(a, b, axes, dtype)
    (a, of_a), (b, of_b) = _split(a), _split(b)
    return product(a, b, axes, dtype) + (product(a, of_b, axes, dtype) + product(of_a, b, axes, dtype))


def _split(x):
    first = x.astype(jnp.bfloat16)
    return first, (x - first.astype(jnp.float32)).astype(jnp.bfloat16)


def rows_of_tokens(log_decay, chunk: int, heads: int, dtype):
    """What `Gates` are made from. Along the lanes the C tokens twice: what reads is a and q, what writes b and k."""
    through = np.triu(np.ones((chunk, chunk), np.float32))  # up to and with the token
    tables = [np.concatenate(pair, axis=1) for pair in ((through, through), (np.triu(through, 1), through))]
    return gated_rows(log_decay, chunk, heads, dtype, tables)

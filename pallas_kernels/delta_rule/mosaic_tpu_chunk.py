"""One chunk of the delta rule with one decay a channel on a TPU: the formulas of `chunked.py`.

What reads, a and q, stands below one another in one matrix of 2 C rows; so do what writes, b and k, and what is
written, u and v. Then one product makes all four tables of scores, and the sums over b u and k v are one product each.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_chunks import product
from pallas_kernels.mosaic_tpu_halving import (
    halvings,
    part_at,
    parting,
    second_halves,
    to_middle,
    with_second_halves,
)
from pallas_kernels.mosaic_tpu_packs import Pack, side_by_side


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
    """A function for `Pure`."""

    pack: Pack
    scale: float
    dtype: Any  # of the products' operands

    @property
    def name(self):
        return "delta_rule_vector"

    def __call__(self, blocks):
        scored = [self.scores(tokens) for _, _, tokens, _ in blocks]
        # All heads of all packs together, as one alone would wait for its products
        length, heads = blocks[0][2].v.shape[0], self.pack.heads
        lower = [jax.lax.stop_gradient(table[:length, :length]) for tables, *_ in scored for table in tables]
        inverses = unit_inverses(lower, self.dtype)
        return [
            self.results(state, tokens.v, inverses[number * heads : (number + 1) * heads], *found)
            for number, ((_, state, tokens, _), found) in enumerate(zip(blocks, scored, strict=True))
        ]

    def results(self, state, v, inverses, tables, since, until, total):
        length = v.shape[0]
        # Of what a reads, with the inverse of its system; and of what q reads
        tables = [
            ((table[:length], inverse), table[length:]) for table, inverse in zip(tables, inverses, strict=True)
        ]
        by_units = [
            self.unit(lanes, tables, state[:, lanes], v[:, lanes], since, until, total)
            for lanes in self.pack.units
        ]
        states, outs = zip(*by_units, strict=True)
        return side_by_side(states), side_by_side(outs)

    def unit(self, lanes, tables, state, v, since, until, total):
        """Some lanes of the state and the outputs."""
        pack, dtype, length = self.pack, self.dtype, v.shape[0]
        before = product(since, state, (1, 0), dtype)

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
        state = state * total + pack.blocks(product(until, written, (0, 0), dtype), lanes)
        return state, (o * self.scale).astype(v.dtype)

    def scores(self, tokens):
        """The tables of each head, `[2 C, 2 C]`; the reading and the writing vectors as they meet the state before and
        after the chunk, and the decay of the state, `[keys, 1]`."""
        reading, writing = jnp.concatenate([tokens.a, tokens.q]), jnp.concatenate([tokens.b, tokens.k])
        heads, length = self.pack.heads, tokens.v.shape[0]
        log_decay = as_log_decay(tokens.log_decay, np.dtype(np.float32))
        own = self.heads_below(reading)
        size = (own.shape[0], 2 * length)
        reader, i, j = _place(length, size)
        scores = jnp.where((i == j) & reader, product(own, writing, (1, 1), self.dtype), 0.0)
        # q reads after the decay of its own token
        token = jnp.exp(log_decay)
        read = reading.astype(jnp.float32) * jnp.concatenate([jnp.ones_like(token), token])
        stacked, writing = self.heads_below(read), writing.astype(jnp.float32)
        pairs = parting(i, j)
        for half, sums in halvings(log_decay, exclusive=True):
            if half < length:
                decay = to_middle(sums, half)
                both = jnp.concatenate([second_halves(decay, half)] * (2 * heads))
                later = second_halves(stacked, half) * both
                found = product(later, writing * jnp.concatenate([decay] * 2), (1, 1), self.dtype)
                parts = part_at(second_halves(pairs, half), half)
                scores = with_second_halves(scores, jnp.where(parts, found, second_halves(scores, half)), half)
        tables = [scores[head * 2 * length : (head + 1) * 2 * length] for head in range(heads)]
        since = read * jnp.concatenate([jnp.exp(sums.reading)] * 2)
        until = writing * jnp.concatenate([jnp.exp(sums.rest)] * 2)
        return tables, since, until, jnp.exp(sums.total).T[:, :1]

    def heads_below(self, x):
        heads = [self.pack.of_keys(head, x) for head in range(self.pack.heads)]
        return heads[0] if len(heads) == 1 else jnp.concatenate(heads)


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

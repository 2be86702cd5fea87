"""A chunk of linear attention on a TPU with a decay for each key channel, backward: see `mosaic_tpu_vector`.

With D_ij the cotangent of what token i reads of token j's value, i > j, and D_ji the same, those of the factors x of a
halving are, both of what reads and of what writes,

    dx = (D where the pairs part there) x

A log decay scales what is written up to its token and read after it: its gradient is q dq less k dk of all later
tokens, and what is left of that after the chunk. No way back through sums is needed, and where nothing later has a
cotangent it is exactly 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.mosaic_tpu_scalar_parts import in_lockstep
from pallas_kernels.linear_attention.mosaic_tpu_vector_factors import (
    ROWS,
    SUBLANES,
    Factors,
    all_units,
    at_once,
    blocks_of_heads,
    dot,
    make_factors,
    nought,
    of_head,
    part,
    select_seconds,
    unit_of,
    unit_of_keys,
)
from pallas_kernels.linear_attention.mosaic_tpu_vector_scores import scores_of_pack
from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_blocks import Blocks
from pallas_kernels.mosaic_tpu_chunks import LANES
from pallas_kernels.mosaic_tpu_packs import spread


class Scratch(NamedTuple):
    """scores: `[step, C (i), heads x C (j)]`, what is read at i of j (turned: turned). parting: `[step, halvings, C,
    heads x C]`, D where the pairs part. own: `[step, 2, C, heads x C]`, what is in D below the diagonal, and above it.
    dq, dk: `[units, C, unit]`. after: `[units, 8, unit]`, of the log decays, from what comes after. decayed: `[step,
    keys, .]`, the state before the chunk times the cotangent of that after it, in part summed over the values. later:
    which tokens are not sooner."""

    scores: Any
    turned: Any
    parting: Any
    own: Any
    dq: Any
    dk: Any
    after: Any
    decayed: Any
    later: Any


def scratch(chunk, length, step):
    unit, heads, halvings = unit_of_keys(chunk.pack), chunk.pack.heads, length.bit_length() - 1
    units = step * chunk.pack.keys // unit
    return list(
        Scratch(
            scores=pltpu.VMEM((step, length, heads * length), chunk.dtype),
            turned=pltpu.VMEM((step, heads * length, length), chunk.dtype),
            parting=pltpu.VMEM((step, halvings, length, heads * length), chunk.dtype),
            own=pltpu.VMEM((step, 2, length, heads * length), jnp.float32),
            dq=pltpu.VMEM((units, length, unit), jnp.float32),
            dk=pltpu.VMEM((units, length, unit), jnp.float32),
            after=pltpu.VMEM((units, SUBLANES, unit), jnp.float32),
            decayed=pltpu.VMEM((step, chunk.pack.keys, unit_of(chunk.pack.values)), jnp.float32),
            later=pltpu.VMEM((ROWS, ROWS if chunk.dtype == jnp.float32 else 2 * ROWS), chunk.dtype),
        )
    )


def backward(chunk, fixed, before, tokens, rows, d_state, d_o, d_fixed, d_tokens, d_rows, *references):
    factors, mine = Factors(*references[: len(Factors._fields)]), Scratch(*references[len(Factors._fields) :])
    pack, (step, keys, values) = chunk.pack, d_state.shape
    unit, width = unit_of_keys(pack), unit_of(values)
    units, count = keys // unit, values // width
    length, halvings = tokens.q.shape[0], factors.parts.shape[0]
    if d_rows is not None:
        d_rows[...] = jnp.zeros_like(d_rows)

    @pl.when(pl.program_id(2) == 0)
    def _():
        row, column = (jax.lax.broadcasted_iota(jnp.int32, mine.later.shape, axis) for axis in (0, 1))
        mine.later[...] = jnp.where((column & (ROWS - 1)) >= row, 1.0, 0.0).astype(mine.later.dtype)

    alone = Blocks()
    make_factors(chunk, step, tokens, rows, factors, alone)

    def scores(p):
        mine.scores[p] = scores_of_pack(chunk, p, units, fixed, tokens, factors).astype(chunk.dtype)
        for n in range(units):
            factors.turned[p * units + n] = factors.since[p * units + n].T
            total = factors.total[p * units + n, :1]
            factors.wide[p * units + n] = jnp.broadcast_to(total, (LANES, unit)).T

    def cotangents(p):
        mine.turned[p] = mine.scores[p].T
        mine.own[p, 0], mine.own[p, 1] = _cotangents_of_scores(chunk, tokens.v, d_o, part(p, values, step * values))

    def parting(n):
        _part(n // (length // ROWS), part(n % (length // ROWS), ROWS, length), n % (length // ROWS) * ROWS, mine)

    def of_states(n):
        p = n // units
        lanes, inner = part(p, values, step * values), part(n % units, unit, keys)
        old, now = before[p, inner, :], d_state[p, inner, :]
        dq = dot(d_o[:, lanes].astype(chunk.dtype), old.astype(chunk.dtype), (1, 1)) * factors.ends[0, n]
        dk = dot(tokens.v[:, lanes].astype(chunk.dtype), now.astype(chunk.dtype), (1, 1)) * factors.ends[1, n]
        k = tokens.k[:, part(n, unit, step * keys)].astype(jnp.float32)
        mine.after[n] = jnp.broadcast_to(jnp.sum(k * dk, axis=0, keepdims=True), mine.after.shape[1:])
        mine.dq[n], mine.dk[n] = dq, dk

    def of_values(n):
        p, lanes, inner = n // count, part(n, width, step * values), part(n % count, width, values)
        cotangent, now = d_o[:, lanes].astype(chunk.dtype), d_state[p, :, inner]
        decayed = before[p, :, inner].astype(jnp.float32) * now
        decayed = decayed if n % count == 0 else decayed + mine.decayed[p]
        written = dot(all_units(factors.until, p, units), now.astype(chunk.dtype), (1, 0))
        states = []
        for m in range(units):
            read = blocks_of_heads(dot(factors.turned[p * units + m], cotangent, (1, 0)), pack, n % count * width)
            states.append(spread(factors.wide[p * units + m], width) * now[m * unit : (m + 1) * unit] + read)
        each = dot(mine.turned[p], cotangent, (1, 0))
        for head in range(pack.heads):
            written = written + of_head(each[head * length : (head + 1) * length], head, pack, n % count)
        d_tokens.v[:, lanes] = written.astype(d_tokens.v.dtype)
        mine.decayed[p] = decayed
        for m in range(units):
            d_state[p, m * unit : (m + 1) * unit, inner] = states[m]

    def of_factors(n):
        _of_factors(chunk, n, units, factors, mine)

    in_lockstep(alone, 2, step, [(scores, 0)])
    in_lockstep(alone, 2, step, [(cotangents, 0)])
    in_lockstep(alone, 1, step * length // ROWS, [(parting, 0)])
    in_lockstep(alone, at_once(pack), step * units, [(of_states, 0)])
    in_lockstep(alone, at_once(pack), step * count, [(of_values, 0)])
    in_lockstep(alone, at_once(pack), step * units, [(of_factors, 0)])
    for start in reversed(range(0, length, ROWS)):

        def of_tokens(n, at=slice(start, start + ROWS)):
            lanes = part(n, unit, step * keys)
            _of_tokens(chunk, n, units, at, lanes, fixed, tokens, rows, d_fixed, d_tokens, factors, mine)

        in_lockstep(alone, 1, step * units, [(of_tokens, 0)])


def _cotangents_of_scores(chunk, v, d_o, lanes):
    """What is in D below the diagonal, and what is above it."""
    pack = chunk.pack
    v, d_o = v[:, lanes].astype(chunk.dtype), d_o[:, lanes].astype(chunk.dtype)
    if pack.heads == 1:
        read = dot(d_o, v, (1, 1))
        written = read.T
    else:
        of_v, of_o = (jnp.concatenate([of_head(x, head, pack, 0) for head in range(pack.heads)]) for x in (v, d_o))
        read, written = dot(d_o, of_v, (1, 1)), dot(v, of_o, (1, 1))
    return read, written


def _part(p, at, start, mine):
    """D by halvings, some tokens of it."""
    _, halvings, length, lanes = mine.parting.shape
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (ROWS, lanes), axis) for axis in (0, 1))
    row, column = row + start, (column & (length - 1)) + nought(start)
    both, pairs = jnp.where(row > column, mine.own[p, 0, at], mine.own[p, 1, at]), row ^ column
    for number in range(halvings):
        size = 1 << number
        mine.parting[p, number, at] = jnp.where(pairs & -size == size, both, 0.0).astype(mine.parting.dtype)


def _of_factors(chunk, n, units, factors, mine):
    """Adds to the cotangents of queries and keys those of the factors of all halvings."""
    p, halvings, heads = n // units, factors.parts.shape[0], chunk.pack.heads
    dq = dk = jnp.zeros(mine.dq.shape[1:], jnp.float32)
    for number in range(halvings):
        size = 1 << number
        below = factors.parts[number, n] if heads == 1 else factors.below[number, n]
        dx = dot(mine.parting[p, number], below, (1, 0)) * factors.decays[number, n]
        if size < SUBLANES:
            dq, dk = dq + select_seconds(size, dx, 0.0), dk + select_seconds(size, 0.0, dx)
        else:
            of_q, of_k = [], []
            for start in range(0, dx.shape[0], 2 * size):
                first, second = slice(start, start + size), slice(start + size, start + 2 * size)
                of_q += [dq[first], dq[second] + dx[second]]
                of_k += [dk[first] + dx[first], dk[second]]
            dq, dk = jnp.concatenate(of_q), jnp.concatenate(of_k)
    mine.dq[n] += dq
    mine.dk[n] += dk
    of_state = jnp.sum(mine.decayed[p, part(n % units, dq.shape[1], mine.decayed.shape[1])].T, axis=0, keepdims=True)
    mine.after[n] += factors.total[n] * of_state


def _of_tokens(chunk, n, units, at, lanes, fixed, tokens, rows, d_fixed, d_tokens, factors, mine):
    p, heads, length = n // units, chunk.pack.heads, tokens.q.shape[0]
    own = tokens.q[at, lanes].astype(jnp.float32) * chunk.scale
    mask = None if rows is None else rows[p].T[at, :1]
    q, k = own if mask is None else own * mask, tokens.k[at, lanes].astype(jnp.float32)
    dq, dk = mine.dq[n, at], mine.dk[n, at]
    sooner = q * dq
    # of the log decays
    found = dot(mine.later[...], _in_two(sooner - k * dk, chunk.dtype), (1, 0)) + mine.after[n, :1]
    mine.after[n] = jnp.broadcast_to(found[:1], mine.after.shape[1:])
    log_decay = tokens.log_decay[at, lanes].astype(jnp.float32)
    moved = log_decay > as_log_decay(jnp.full((), -jnp.inf), np.dtype(np.float32))
    found = jnp.where(moved, found - sooner if chunk.exclusive else found, 0.0)
    d_tokens.log_decay[at, lanes] = found.astype(d_tokens.log_decay.dtype)
    # of what a token reads of itself
    of_own, diagonal = mine.own[p, 0, at] * factors.pairs[factors.parts.shape[0], at], None
    for head in range(heads):
        each = jnp.sum(of_own[:, head * length : (head + 1) * length], axis=1, keepdims=True)
        each = jnp.broadcast_to(each, q.shape)
        if head > 0:
            lane = jax.lax.broadcasted_iota(jnp.int32, q.shape, 1)
            each = jnp.where(lane >= head * chunk.pack.key, each, diagonal)
        diagonal = each
    of_keys = diagonal * k
    dq = dq if mask is None else dq * mask
    if fixed is None:
        dq, dk = dq + of_keys, dk + diagonal * own
    else:
        inner = part(n % units, q.shape[1], chunk.pack.keys)
        bonus = fixed[p, :, inner]
        dq, dk = dq + of_keys * bonus, dk + diagonal * own * bonus
        d_fixed[p, :, inner] += jnp.sum(of_keys * own, axis=0, keepdims=True)
    d_tokens.q[at, lanes] = (dq * chunk.scale).astype(d_tokens.q.dtype)
    d_tokens.k[at, lanes] = dk.astype(d_tokens.k.dtype)


def _in_two(x, dtype):
    """Operands of a product with a table of 0 and 1 twice side by side: x in two parts, if not in float32."""
    if dtype == jnp.float32:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    coarse = jax.lax.bitcast_convert_type(bits & -(1 << 16), jnp.float32)
    return jnp.concatenate([coarse, x - coarse]).astype(dtype)

"""The gradients of a chunk of the delta rule with a decay for each key channel on a TPU, over references.

With R = (a; q) of what reads, each decayed from the start of the chunk, W = (b; k) of what writes, decayed to its end, the
table M = (M_a; M_q) of all pairs, and (U; V) what is written,

    (I - M_ab) U = A S + M_ak V          O = Q S + M_q (U; V)          S' = total S + W^T (U; V)

and with Y the cotangent of the right side of the system,

    dU = M_qb^T dO + B dS'      Y = (I - M_ab)^-T dU      dV = M_ak^T Y + M_qk^T dO + K dS'      dM = (Y; dO) (U; V)^T
    dR = (Y; dO) S^T            dW = (U; V) dS'^T         dS = total dS' + R^T (Y; dO)

The table's gradient goes back through the same products by halves that made it: what takes turns in the rows of `pairs`
takes turns here, so that each of them is one product of 64 rows.

A log decay scales what is written before it and read after it, so its gradient is a sum over tokens, in each channel:
of a da and q dq of what reads later, less b db and k dk of what is written from then on and read in this chunk, plus those of
what was written before and is read after the chunk, and of the state that goes through. Nothing is subtracted that did
not come later: where nothing later has a cotangent it is exactly 0.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_rule.mosaic_tpu_vector_tables import (
    CHUNK,
    HALVES,
    LANES,
    ROWS,
    SPAN,
    across,
    apart,
    blocks,
    lanes_of,
    places,
    registers,
    sets_of,
    split,
    swap,
)
from pallas_kernels.mosaic_tpu_chunks import product

NEVER = -104.0  # a log decay below it is a decay to nothing, in float32: without gradient


def scratch(pack, step, dtype):
    sets = step * sets_of(pack)
    return {
        # Y, dO; and U, V
        "read": pltpu.VMEM((step, 2 * CHUNK, pack.values), dtype),
        "written": pltpu.VMEM((step, 2 * CHUNK, pack.values), dtype),
        # Of each halving: what is read (rows) by what is written (columns), and the other way round
        "of_pairs": pltpu.VMEM((sets, len(HALVES), 2, CHUNK, LANES), dtype),
        # Of a, q (decayed by its own token), b, k; the latter two without what goes into the state
        "found": pltpu.VMEM((step, 4, CHUNK, pack.keys), jnp.float32),
        "kept": pltpu.VMEM((step, 2, CHUNK, pack.keys), jnp.float32),  # of b and k, by the state
        "own": pltpu.VMEM((step, 2, CHUNK, pack.keys), jnp.float32),  # of a token's q with its b and k, for all keys
        # Products of vectors with their gradients; below, with what goes into the state; and those of a
        "moved": pltpu.VMEM((step, 2 * CHUNK, pack.keys), jnp.float32),
        "sooner": pltpu.VMEM((step, CHUNK, pack.keys), jnp.float32),
        "through": pltpu.VMEM((step, ROWS, pack.keys), jnp.float32),
    }


def of_states(pack, dtype, number, before, d_state, refs):
    """What goes by the states, for a pack; and into d_state the cotangent of the state before the chunk."""
    of_reading = of_writing = of_total = 0.0
    for unit in pack.units:
        read, written = refs["read"][number, :, unit], refs["written"][number, :, unit]
        state, later = before[number, :, unit].astype(jnp.float32), d_state[number, :, unit]
        of_reading += product(read, state, (1, 1), dtype)
        of_writing += product(written, later, (1, 1), dtype)
        ones = jnp.ones((ROWS, unit.stop - unit.start), jnp.float32)
        of_total += product(ones, state * later, (1, 1), dtype)
        earlier = blocks(number, product(refs["ends"][number, 0], read, (0, 0), dtype), pack, unit)
        d_state[number, :, unit] = later * across(refs["total"][number, :1], unit.stop - unit.start) + earlier
    since, until = refs["outer"][number, 0], refs["outer"][number, 1]
    for n in range(2):
        half = slice(n * CHUNK, (n + 1) * CHUNK)
        refs["found"][number, n] = of_reading[half] * since
        refs["kept"][number, n] = of_writing[half] * until
    refs["through"][number] = of_total * refs["total"][number]
    heads = blocks(number, jnp.ones((pack.keys, pack.values), jnp.float32), pack, slice(0, pack.values)).astype(dtype)
    of_o = refs["read"][number, CHUNK:].astype(jnp.float32)
    for n in range(2):
        written = refs["written"][number, n * CHUNK : (n + 1) * CHUNK].astype(jnp.float32)
        refs["own"][number, n] = product(of_o * written, heads, (1, 1), dtype)


def of_pairs(pack, dtype, number, levels, refs):
    """The cotangents of some of the products by halves, for a pack: of what reads (rows) by what writes, and the other way
    round."""
    row, lane = places(number, (ROWS, LANES))
    column, block = lane & (ROWS - 1), lane & (CHUNK - ROWS)
    line = places(number, (ROWS, pack.values))[0]
    for level in levels:
        half = HALVES[level]
        x = taking_turns(refs["read"].at[number], half, 1, line)
        y = taking_turns(refs["written"].at[number], half, 0, line)
        near, size = (row ^ column) < 2 * half, max(2 * half, ROWS)
        for one in range(sets_of(pack)):
            for kind, (first, second) in enumerate(((x, y), (y, x))):
                found = registers(product(first, apart(number, second, one, pack.value), (1, 1), dtype))
                for n, start in enumerate(range(0, CHUNK, ROWS)):
                    parts = (block & -size) == (start & -size)
                    found[n] = jnp.where(parts & near if half < ROWS else parts, found[n], 0.0)
                refs["of_pairs"][number * sets_of(pack) + one, level, kind] = jnp.concatenate(found).astype(dtype)


def of_vectors(pack, dtype, number, kind, refs):
    """What the products by halves add to `found`. kind: 0 for what reads, 1 for what writes."""
    starts = range(0, CHUNK, ROWS)
    own, other = ([jnp.zeros((ROWS, pack.keys), jnp.float32)] * len(starts) for _ in range(2))
    if kind == 0:
        own, other = (registers(refs["found"][number, n]) for n in range(2))
    row = places(number, own[0].shape)[0]
    for level, half in enumerate(HALVES):
        found = 0.0
        for one in range(sets_of(pack)):
            beside = apart(number, refs["pairs"][number, level, 1 - kind], one, pack.key)
            found += product(refs["of_pairs"][number * sets_of(pack) + one, level, kind], beside, (1, 0), dtype)
        found, second = registers(found), row & half != 0
        for n, start in enumerate(starts):
            decay = refs["middles"][number, level - 1, start : start + ROWS] if half > 1 else 1.0
            if half < ROWS:
                here, there = found[n] * decay, swap(found[n], half, second) * decay
                keep = second if kind == 0 else ~second
                own[n], other[n] = own[n] + jnp.where(keep, here, 0.0), other[n] + jnp.where(keep, there, 0.0)
            elif bool(start & half) == (kind == 0):
                own[n], other[n] = own[n] + found[n] * decay, other[n] + found[(start ^ half) // ROWS] * decay
    for n, x in enumerate((own, other)):
        refs["found"][number, 2 * kind + n] = jnp.concatenate(x)


def of_tokens(pack, number, at, tokens, d_tokens, refs):
    """The gradients of q, k, a and b of some tokens of a pack; and what that of the log decay is made of."""
    keys, rows = lanes_of(number, pack.keys), pl.ds(pl.multiple_of(at * SPAN, SPAN), SPAN)
    below = pl.ds(pl.multiple_of(CHUNK + at * SPAN, SPAN), SPAN)
    q, k, a, b = (x[rows, keys].astype(jnp.float32) for x in (tokens.q, tokens.k, tokens.a, tokens.b))
    decay = jnp.exp(tokens.log_decay[rows, keys].astype(jnp.float32))
    d_a, d_q, d_b, d_k = (refs["found"][number, n, rows] for n in range(4))
    kept_b, kept_k = refs["kept"][number, 0, rows], refs["kept"][number, 1, rows]
    own_b, own_k = refs["own"][number, 0, rows], refs["own"][number, 1, rows]
    d_q = d_q * decay
    refs["moved"][number, rows] = q * d_q - b * d_b - k * d_k
    refs["moved"][number, below] = b * kept_b + k * kept_k
    refs["sooner"][number, rows] = a * d_a
    d_tokens.a[rows, keys] = d_a.astype(d_tokens.a.dtype)
    d_tokens.q[rows, keys] = (d_q + own_b * b + own_k * k).astype(d_tokens.q.dtype)
    d_tokens.b[rows, keys] = (d_b + kept_b + own_b * q).astype(d_tokens.b.dtype)
    d_tokens.k[rows, keys] = (d_k + kept_k + own_k * q).astype(d_tokens.k.dtype)


def of_log_decay(pack, dtype, number, tokens, d_tokens, refs):
    keys = lanes_of(number, pack.keys)
    token, column = places(number, (CHUNK, 2 * CHUNK))
    counted = ((column < CHUNK) & (column >= token)) | ((column >= CHUNK) & (column < token + CHUNK))
    # What a reads, it reads before its own decay
    sooner = [pltpu.roll(x, ROWS - 1, 0) for x in registers(refs["sooner"][number])]
    last = places(number, sooner[0].shape)[0] == ROWS - 1
    sooner = [jnp.where(last, *pair) for pair in zip([*sooner[1:], jnp.zeros_like(sooner[0])], sooner, strict=True)]
    moved = jnp.concatenate([refs["moved"][number, :CHUNK] + jnp.concatenate(sooner), refs["moved"][number, CHUNK:]])
    counted = jnp.where(counted, 1.0, 0.0).astype(dtype)
    parts = [moved] if dtype == jnp.float32 else split(moved)
    found = sum(product(counted, x, (1, 0), dtype) for x in parts) + refs["through"][number, :1]
    d_tokens.log_decay[:, keys] = jnp.where(tokens.log_decay[:, keys] > NEVER, found, 0.0)


def taking_turns(ref, half, side, row):
    """Of a reference to what belongs to a (u) and to q (v): rows of the former in second halves of blocks of 2 h tokens
    (side 1) or in first ones (0), between them those of the latter from the other side."""
    if half >= SPAN:
        starts = range(0, CHUNK, half)
        own = [bool(start & half) == (side == 1) for start in starts]
        starts = (start if here else CHUNK + (start ^ half) for here, start in zip(own, starts, strict=True))
        return jnp.concatenate([ref[start : start + half] for start in starts])
    x, y = (registers(part.astype(jnp.float32)) for part in (ref[:CHUNK], ref[CHUNK:]))
    if half == ROWS:
        found = [x[n] if n & 1 == side else y[n ^ 1] for n in range(len(x))]
    else:
        second = row & half != 0
        pairs = ((one, swap(other, half, second)) for one, other in zip(x, y, strict=True))
        found = [jnp.where(second, *(pair if side else pair[::-1])) for pair in pairs]
    return jnp.concatenate(found).astype(ref.dtype)

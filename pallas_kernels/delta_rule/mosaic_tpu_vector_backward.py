"""The gradients of a chunk of the delta rule with a decay for each key channel on a TPU, over references.

With R = (a; q) of what reads, each decayed from the start of the chunk, W = (b; k) of what writes, decayed to its
end, the table M = (M_a; M_q) of all pairs, and (U; V) what is written,

    (I - M_ab) U = A S + M_ak V          O = Q S + M_q (U; V)          S' = total S + W^T (U; V)

and with Y the cotangent of the right side of the system,

    dU = M_qb^T dO + B dS'      Y = (I - M_ab)^-T dU      dV = M_ak^T Y + M_qk^T dO + K dS'      dM = (Y; dO) (U; V)^T
    dR = (Y; dO) S^T            dW = (U; V) dS'^T         dS = total dS' + R^T (Y; dO)

The table's gradient goes back through the same products by halves that made it: what takes turns in the rows of
`pairs` takes turns here, so that each of them is one product of 64 rows.

A log decay scales what is written before it and read after it, so its gradient is a sum over tokens, in each channel:
of a da and q dq of what reads later, less b db and k dk of what is written from then on and read in this chunk, plus
those of what was written before and is read after the chunk, and of the state that goes through. Nothing is
subtracted that did not come later: where nothing later has a cotangent it is exactly 0.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

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
    span,
    split,
)
from pallas_kernels.mosaic_tpu_blocks import SUBLANES, joined, registers, swap
from pallas_kernels.mosaic_tpu_chunks import LANES, product

NEVER = -104.0  # a log decay below it is a decay to nothing, in float32: without gradient


def scratch(pack, step, dtype):
    sets = step * sets_of(pack)
    return {
        # (Y; dO) and (U; V)
        "read": pltpu.VMEM((step, 2 * CHUNK, pack.values), dtype),
        "written": pltpu.VMEM((step, 2 * CHUNK, pack.values), dtype),
        # Of each halving: what is read (rows) by what is written (columns), and the other way round
        "of_pairs": pltpu.VMEM((sets, len(HALVES), 2, CHUNK, LANES), dtype),
        # The gradients of a and q, by the state and by `pairs`; of b and k, by `pairs`; q decayed by its own token
        "found": pltpu.VMEM((step, 4, CHUNK, pack.keys), jnp.float32),
        # Those of b and k by the state; and those of q with its token's own b and k, in all keys of a head
        "beside": pltpu.VMEM((step, 4, CHUNK, pack.keys), jnp.float32),
        # Vectors by their gradients: of q, less those of b and k by `pairs`; of b and k by the state; of a
        "moved": pltpu.VMEM((step, 3, CHUNK, pack.keys), jnp.float32),
        "through": pltpu.VMEM((step, SUBLANES, pack.keys), jnp.float32),  # of the state that goes through
    }


def of_states(number, before, d_state, pack, refs):
    """What goes by the states, for a pack; and into d_state the cotangent of the state before the chunk."""
    dtype, of_reading, of_writing, of_total = refs["read"].dtype, 0.0, 0.0, 0.0
    reading = refs["ends"][number, 0].reshape(2 * CHUNK, pack.keys)
    total, (since, until), lane = refs["total"][number], refs["outer"][number], places(refs, pack.values)[1]
    for unit in pack.units:
        read, written = refs["read"][number, :, unit], refs["written"][number, :, unit]
        state, later = before[number, :, unit], d_state[number, :, unit]
        of_reading += product(read, state, (1, 1), dtype)
        of_writing += product(written, later, (1, 1), dtype)
        ones = jnp.ones((SUBLANES, later.shape[1]), jnp.float32)
        of_total += product(ones, state.astype(jnp.float32) * later, (1, 1), dtype)
        earlier = blocks(lane, product(reading, read, (0, 0), dtype), pack, unit)
        d_state[number, :, unit] = later * across(total[:1], later.shape[1]) + earlier
    # A token's own q and b, k
    read, written = (refs[name][number].astype(jnp.float32) for name in ("read", "written"))
    heads = blocks(lane, jnp.ones((pack.keys, pack.values), jnp.float32), pack, slice(0, pack.values))
    own = [product(read[CHUNK:] * x, heads, (1, 1), dtype) for x in (written[:CHUNK], written[CHUNK:])]
    refs["found"][number, :2] = jnp.stack([of_reading[:CHUNK] * since, of_reading[CHUNK:] * since])
    refs["beside"][number] = jnp.stack([of_writing[:CHUNK] * until, of_writing[CHUNK:] * until, *own])
    refs["through"][number] = of_total * total


def of_pairs(number, levels, pack, refs):
    """The cotangents of some of the products by halves, for a pack: of what reads (rows) by what writes, and the other
    way round."""
    dtype, sets = refs["read"].dtype, sets_of(pack)
    every_row, every_lane = places(refs, max(LANES, pack.values))
    row, lane = every_row[:, :LANES], every_lane[:, :LANES]
    column, block = lane & (SUBLANES - 1), lane & (CHUNK - SUBLANES)
    read, written = refs["read"][number], refs["written"][number]
    found = [[] for _ in range(sets)]
    for level in levels:
        half = HALVES[level]
        near, size = (row ^ column) < 2 * half, max(2 * half, SUBLANES)
        x, y = taking_turns(every_row, read, half, 1), taking_turns(every_row, written, half, 0)
        for one in range(sets):
            for first, second in ((x, y), (y, x)):
                table = registers(product(first, apart(every_lane, second, one, pack.value), (1, 1), dtype))
                for n, start in enumerate(range(0, CHUNK, SUBLANES)):
                    parts = (block & -size) == (start & -size)
                    table[n] = jnp.where(parts & near if half < SUBLANES else parts, table[n], 0.0)
                found[one].append(joined(table).astype(dtype))
    for one in range(sets):
        by_level = jnp.stack(found[one]).reshape(len(levels), 2, CHUNK, LANES)
        refs["of_pairs"][number * sets + one, levels.start : levels.stop] = by_level


def taking_turns(row, x, half, side):
    """Of what belongs to a (b), and below it to q (k): rows of the former in second halves of blocks of 2 h (side
    1) or in first ones (0), between them those of the latter from the other side."""
    if half >= SPAN:
        starts = ((start, bool(start & half) == (side == 1)) for start in range(0, CHUNK, half))
        starts = (start if own else CHUNK + (start ^ half) for start, own in starts)
        return joined(x[start : start + half] for start in starts)
    own, other = (registers(part.astype(jnp.float32)) for part in (x[:CHUNK], x[CHUNK:]))
    if half == SUBLANES:
        return joined(own[n] if n & 1 == side else other[n ^ 1] for n in range(len(own))).astype(x.dtype)
    second = row[:, : x.shape[1]] & half != 0
    pairs = ((one, swap(beside, half, second)) for one, beside in zip(own, other, strict=True))
    return joined(jnp.where(second, *(pair if side else pair[::-1])) for pair in pairs).astype(x.dtype)


def of_vectors(number, kind, pack, refs):
    """The gradients by `pairs`, for a pack. kind: 0 of what reads, 1 of what writes."""
    dtype, sets, starts = refs["read"].dtype, sets_of(pack), range(0, CHUNK, SUBLANES)
    both = slice(2 * kind, 2 * kind + 2)
    own, other = ([jnp.zeros((SUBLANES, pack.keys), jnp.float32)] * len(starts) for _ in range(2))
    if kind == 0:
        own, other = (registers(x) for x in refs["found"][number, both])
    row, lane = places(refs, pack.keys)
    beside, middles = refs["pairs"][number, :, 1 - kind], refs["middles"][number]
    cotangents = [refs["of_pairs"][number * sets + one, :, kind] for one in range(sets)]
    for level, half in enumerate(HALVES):
        found, second = 0.0, row & half != 0
        for one in range(sets):
            found += product(cotangents[one][level], apart(lane, beside[level], one, pack.key), (1, 0), dtype)
        found = registers(found)
        for n, start in enumerate(starts):
            decay = middles[level - 1, start : start + SUBLANES] if half > 1 else 1.0
            if half < SUBLANES:
                here, there = found[n] * decay, swap(found[n], half, second) * decay
                keep = second if kind == 0 else ~second
                own[n], other[n] = own[n] + jnp.where(keep, here, 0.0), other[n] + jnp.where(keep, there, 0.0)
            elif bool(start & half) == (kind == 0):
                own[n], other[n] = own[n] + found[n] * decay, other[n] + found[(start ^ half) // SUBLANES] * decay
    refs["found"][number, both] = jnp.stack([joined(own), joined(other)])


def of_tokens(number, at, tokens, d_tokens, pack, refs):
    """The gradients of q, k, a and b of a span of a pack; and what that of the log decay is made of."""
    rows, keys = span(at), lanes_of(number, pack.keys)
    q, k, a, b = (x[rows, keys].astype(jnp.float32) for x in (tokens.q, tokens.k, tokens.a, tokens.b))
    d_a, d_q, d_b, d_k = refs["found"][number, :, rows]
    kept_b, kept_k, own_b, own_k = refs["beside"][number, :, rows]
    d_q = d_q * jnp.exp(tokens.log_decay[rows, keys].astype(jnp.float32))
    refs["moved"][number, :, rows] = jnp.stack([q * d_q - b * d_b - k * d_k, b * kept_b + k * kept_k, a * d_a])
    d_tokens.a[rows, keys] = d_a.astype(d_tokens.a.dtype)
    d_tokens.q[rows, keys] = (d_q + own_b * b + own_k * k).astype(d_tokens.q.dtype)
    d_tokens.b[rows, keys] = (d_b + kept_b + own_b * q).astype(d_tokens.b.dtype)
    d_tokens.k[rows, keys] = (d_k + kept_k + own_k * q).astype(d_tokens.k.dtype)


def of_log_decay(number, log_decay, d_log_decay, pack, refs):
    keys, dtype = lanes_of(number, pack.keys), refs["read"].dtype
    later, sooner, of_a = refs["moved"][number]
    # What a reads, it reads before its own decay: it counts for the token before
    of_a = [pltpu.roll(x, SUBLANES - 1, 0) for x in registers(of_a)]
    row, lane = places(refs, max(LANES, pack.keys))
    last = row[:, : pack.keys] == SUBLANES - 1
    of_a = joined(jnp.where(last, *pair) for pair in zip([*of_a[1:], jnp.zeros_like(of_a[0])], of_a, strict=True))
    moved = jnp.concatenate([later + of_a, sooner])
    row, lane = row[:, :LANES], lane[:, :LANES]
    tokens = [row + start for start in range(0, CHUNK, SUBLANES)]
    counted = joined(jnp.where((lane >= token) & (lane < token + CHUNK), 1.0, 0.0) for token in tokens)
    parts = [moved] if dtype == jnp.float32 else split(moved)
    found = sum(product(counted, x, (1, 0), dtype) for x in parts) + refs["through"][number, :1]
    d_log_decay[:, keys] = jnp.where(log_decay[:, keys] > NEVER, found, 0.0)

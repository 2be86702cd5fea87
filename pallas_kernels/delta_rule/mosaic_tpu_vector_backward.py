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

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.delta_rule.mosaic_tpu_vector_tables import (
    CHUNK,
    HALVES,
    LANES,
    ROWS,
    across,
    apart,
    lanes_of,
    sets_of,
    split,
)
from pallas_kernels.mosaic_tpu_chunks import product
from pallas_kernels.mosaic_tpu_halving import exchange, in_second_half

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
        # Products of vectors with their gradients
        "moved": pltpu.VMEM((step, 3 * CHUNK, pack.keys), jnp.float32),
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
        earlier = pack.blocks(product(refs["ends"][number, 0], read, (0, 0), dtype), unit)
        d_state[number, :, unit] = later * across(refs["total"][number, :1], unit.stop - unit.start) + earlier
    since, until = refs["outer"][number, 0], refs["outer"][number, 1]
    for n in range(2):
        half = slice(n * CHUNK, (n + 1) * CHUNK)
        refs["found"][number, n] = of_reading[half] * since
        refs["kept"][number, n] = of_writing[half] * until
    refs["through"][number] = of_total * refs["total"][number]


def of_pairs(pack, dtype, number, refs):
    """The cotangents of the products by halves, for a pack."""
    read, written = refs["read"][number].astype(jnp.float32), refs["written"][number].astype(jnp.float32)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), axis) for axis in (0, 1))
    for level, half in enumerate(HALVES):
        rows = taking_turns(read[:CHUNK], read[CHUNK:], half, 1).astype(dtype)
        columns = taking_turns(written[:CHUNK], written[CHUNK:], half, 0).astype(dtype)
        parts = (row ^ (lane & (CHUNK - 1))) < 2 * half
        for one in range(sets_of(pack)):
            for kind, (x, y) in enumerate(((rows, columns), (columns, rows))):
                found = product(x, apart(y, one, pack.value), (1, 1), dtype)
                refs["of_pairs"][number * sets_of(pack) + one, level, kind] = jnp.where(parts, found, 0.0).astype(dtype)


def of_vectors(pack, dtype, number, kind, refs):
    """What the products by halves add to `found`. kind: 0 for what reads, 1 for what writes."""
    rows = range(0, CHUNK, ROWS)
    if kind == 0:
        own, other = ([refs["found"][number, n, start : start + ROWS] for start in rows] for n in range(2))
    else:
        own, other = ([jnp.zeros((ROWS, pack.keys), jnp.float32) for _ in rows] for _ in range(2))
    for level, half in enumerate(HALVES):
        found = 0.0
        for one in range(sets_of(pack)):
            beside = apart(refs["pairs"][number, level, 1 - kind], one, pack.key)
            found += product(refs["of_pairs"][number * sets_of(pack) + one, level, kind], beside, (1, 0), dtype)
        exchanged = exchange(found, half) if half < ROWS else None
        for n, start in enumerate(rows):
            here = slice(start, start + ROWS)
            decay = refs["middles"][number, level - 1, here] if half > 1 else jnp.ones((ROWS, pack.keys), jnp.float32)
            if half < ROWS:
                decay = jnp.where(in_second_half(decay, half) == (kind == 0), decay, 0.0)
                own[n], other[n] = own[n] + found[here] * decay, other[n] + exchanged[here] * decay
            elif bool(start & half) == (kind == 0):
                there = start ^ half
                own[n], other[n] = own[n] + found[here] * decay, other[n] + found[there : there + ROWS] * decay
    refs["found"][number, 2 * kind], refs["found"][number, 2 * kind + 1] = jnp.concatenate(own), jnp.concatenate(other)


def of_tokens(pack, dtype, number, tokens, d_tokens, refs):
    """The gradients of q, k, a and b of a pack; and what that of the log decay is made of."""
    keys = lanes_of(number, pack.keys)
    read = refs["read"][number, CHUNK:].astype(jnp.float32)
    key, value = (jax.lax.broadcasted_iota(jnp.int32, (pack.values, pack.keys), axis) for axis in (1, 0))
    same = jnp.where(key // pack.key == value // pack.value, 1.0, 0.0)
    own_b, own_k = (
        product(read * refs["written"][number, n * CHUNK : (n + 1) * CHUNK].astype(jnp.float32), same, (1, 0), dtype)
        for n in range(2)
    )
    q, k, a, b = (x[:, keys].astype(jnp.float32) for x in (tokens.q, tokens.k, tokens.a, tokens.b))
    decay = jnp.exp(tokens.log_decay[:, keys].astype(jnp.float32))
    d_a, d_q, d_b, d_k = (refs["found"][number, n] for n in range(4))
    kept_b, kept_k = refs["kept"][number, 0], refs["kept"][number, 1]
    d_q = d_q * decay
    refs["moved"][number, :CHUNK] = q * d_q - b * d_b - k * d_k
    refs["moved"][number, CHUNK : 2 * CHUNK] = a * d_a
    refs["moved"][number, 2 * CHUNK :] = b * kept_b + k * kept_k
    d_tokens.a[:, keys] = d_a.astype(d_tokens.a.dtype)
    d_tokens.q[:, keys] = (d_q + own_b * b + own_k * k).astype(d_tokens.q.dtype)
    d_tokens.b[:, keys] = (d_b + kept_b + own_b * q).astype(d_tokens.b.dtype)
    d_tokens.k[:, keys] = (d_k + kept_k + own_k * q).astype(d_tokens.k.dtype)


def of_log_decay(pack, dtype, number, tokens, d_tokens, refs):
    keys = lanes_of(number, pack.keys)
    token, column = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 3 * CHUNK), axis) for axis in (0, 1))
    other, part = column & (CHUNK - 1), column // CHUNK
    # From the token on, after it, before it
    counted = ((part < 2) & (other > token)) | ((part == 0) & (other == token)) | ((part == 2) & (other < token))
    counted, moved = jnp.where(counted, 1.0, 0.0), refs["moved"][number]
    parts = [moved] if dtype == jnp.float32 else split(moved)
    found = sum(product(counted, x, (1, 0), dtype) for x in parts) + refs["through"][number, :1]
    d_tokens.log_decay[:, keys] = jnp.where(tokens.log_decay[:, keys] > NEVER, found, 0.0)


def taking_turns(x, y, half, second):
    """Rows of x in second halves of blocks of 2 h tokens (or in first ones), between them those of y on the other side."""
    if half < ROWS:
        own, y = in_second_half(x, half) == (second == 1), exchange(y, half)
        return jnp.where(own, x, y)
    parts = []
    for start in range(0, x.shape[0], half):
        own = bool(start & half) == (second == 1)
        start = start if own else start ^ half
        parts.append((x if own else y)[start : start + half])
    return jnp.concatenate(parts)

"""Scores of a chunk's tokens on a TPU, from the factors of all halvings: see `mosaic_tpu_vector_factors`."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.mosaic_tpu_vector_factors import all_units, dot, part, unit_of_keys

PACKED = 16  # rows of bfloat16 of a register


def _own_scores(chunk, p, fixed, tokens, factors):
    """`[C, heads x C]`, of tokens with themselves."""
    (length, lanes), pack = tokens.q.shape, chunk.pack
    unit, found = unit_of_keys(pack), None
    units = pack.keys // unit
    for m in range(units):
        there = part(p * units + m, unit, lanes)
        each = tokens.q[:, there].astype(jnp.float32) * tokens.k[:, there].astype(jnp.float32)
        if fixed is not None:
            each = each * fixed[p, :, part(m, unit, pack.keys)]
        found = each if found is None else found + each
    if pack.heads == 1:
        own = jnp.sum(found, axis=1, keepdims=True)
    else:
        lane, column = (
            jax.lax.broadcasted_iota(jnp.int32, (length, width), 1) for width in (found.shape[1], pack.heads * length)
        )
        own = 0.0
        for head in range(pack.heads):
            inside = (lane >= head * pack.key) & (lane < (head + 1) * pack.key)
            each = jnp.sum(jnp.where(inside, found, 0.0), axis=1, keepdims=True)
            own = jnp.where(column >= head * length, each, own)
    return own * chunk.scale * factors.pairs[factors.parts.shape[0]]


def scores_of_pack(chunk, p, units, fixed, tokens, factors):
    """`[C, heads x C]`, of tokens that read (i) with those before them (j), and with themselves."""
    (halvings, _, length, _), heads = factors.parts.shape, chunk.pack.heads
    scores = _own_scores(chunk, p, fixed, tokens, factors)
    for number in range(halvings):
        size = 1 << number
        written = all_units((factors.parts if heads == 1 else factors.below).at[number], p, units)
        found = dot(seconds(all_units(factors.parts.at[number], p, units), size), written, (1, 1))
        scores = with_seconds(scores, seconds(scores, size) + found * seconds(factors.pairs[number], size), size)
    return scores


def seconds(x, size):
    """The rows that are in second halves, where those are whole registers."""
    if size < PACKED:
        return x
    parts = [x[start : start + size] for start in range(size, x.shape[0], 2 * size)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def with_seconds(x, now, size):
    if size < PACKED:
        return now
    parts = []
    for block, start in enumerate(range(0, x.shape[0], 2 * size)):
        parts += [x[start : start + size], now[block * size : (block + 1) * size]]
    return jnp.concatenate(parts)

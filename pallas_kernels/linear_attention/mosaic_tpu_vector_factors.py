"""Decays of each key channel as factors of what a TPU multiplies: by halves, and never as a difference.

A chunk of C tokens falls into two halves, each of those into two, and so on. The decay from token j to token i passes
the middle of the smallest aligned block that holds both, which splits it in two factors. Each is the exponential of a
sum of log decays within one half: at most 0, and summed up over its own gates alone. So nothing overflows, and a gate
of -1e-6 beside one of -100 loses no digit.

At a halving into blocks of h tokens, what is in a second half is read and what is in a first half is written,

    x_t = q_t exp(sum from the middle of t's block of 2 h to what t reads)
    x_t = k_t exp(sum from after t to the middle)

so that one matrix holds both, and the scores of the pairs that part there stand in x x^T. Of a pack of several heads
the second factor has the heads' lanes one below another, which puts their scores side by side.

Sums of blocks of less than a register are products with tables of 0 and 1, which are exact: a log decay is cut into two
numbers of the products' precision. Those of longer blocks come from them by additions.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.reference import as_log_decay
from pallas_kernels.mosaic_tpu_chunks import LANES

ROWS = 64  # tokens whose sums are made at once
SUBLANES = 8  # of a register
PACKED = 16  # rows of bfloat16 of a register


class Tokens(NamedTuple):
    q: Any
    k: Any
    v: Any
    log_decay: Any


class Factors(NamedTuple):
    """Scratch of a grid step; `units` of lanes of all packs. parts: `[halvings, units, C, unit]`, x above. below:
    `[halvings + 1, units, heads x C, unit]`, x and k, heads below one another (of one head only k). own: `[units, C,
    unit]`, queries that meet their own keys. since, until: what reads the state before the chunk, and what goes into
    the one after it (turned: that, or backward
    the other, the tokens along the lanes). total: `[units, 8, unit]`, the state's decay (wide: `[units, unit, 128]`,
    the channels along the sublanes). tables: `[16 + 4 x ROWS, .]`. pairs: `[halvings + 1, C, heads x C]`, see
    `pairs_of`. ends: `[2, units, C, unit]`, the decays in since and until. decays: `[halvings, units, C, unit]`, those
    in parts (backward)."""

    parts: Any
    below: Any
    own: Any
    since: Any
    until: Any
    turned: Any
    total: Any
    wide: Any
    tables: Any
    pairs: Any
    ends: Any
    decays: Any = None


def factors_scratch(chunk: Any, length: int, step: int, backward: bool) -> list[Any]:
    unit, heads, halvings = unit_of_keys(chunk.pack), chunk.pack.heads, length.bit_length() - 1
    units = step * chunk.pack.keys // unit

    def scratch(*shape, dtype=chunk.dtype):
        return pltpu.VMEM((*shape, unit), dtype)

    found = list(
        Factors(
            parts=scratch(halvings, units, length),
            below=scratch(1 if heads == 1 else halvings + 1, units, heads * length),
            own=scratch(units, length),
            since=scratch(units, length),
            until=scratch(units, length),
            turned=pltpu.VMEM((units, unit, length), chunk.dtype),
            total=scratch(units, SUBLANES, dtype=jnp.float32),
            wide=pltpu.VMEM((units, unit, LANES), jnp.float32),
            tables=pltpu.VMEM((4 * ROWS + 2 * SUBLANES, ROWS if chunk.dtype == jnp.float32 else 2 * ROWS), chunk.dtype),
            pairs=pltpu.VMEM((halvings + 1, length, heads * length), jnp.float32),
            ends=scratch(2, units, length, dtype=jnp.float32),
            decays=scratch(halvings, units, length, dtype=jnp.float32),
        )
    )
    return found if backward else found[:-1]


def unit_of(width: int) -> int:
    return LANES if width % LANES == 0 else width


def unit_of_keys(pack: Any) -> int:
    return unit_of(pack.keys) if pack.heads == 1 else pack.keys


def part(number, width, whole):
    """A slice: the number-th `width` of a `whole`."""
    if width == whole:
        return slice(None)
    return pl.ds(pl.multiple_of(number * width, width), width)


def make_factors(chunk: Any, step: int, fixed: Any, tokens: Tokens, rows: Any, factors: Factors) -> None:
    lanes, unit = tokens.q.shape[1], unit_of_keys(chunk.pack)
    units = chunk.pack.keys // unit

    @pl.when(pl.program_id(2) == 0)
    def _():
        factors.tables[...] = _tables(factors.tables.shape, chunk.exclusive).astype(factors.tables.dtype)
        (halvings, _, length, _), heads = factors.parts.shape, chunk.pack.heads
        for number in range(halvings + 1):
            factors.pairs[number] = pairs_of(1 << number if number < halvings else 0, length, heads)
        if heads > 1:  # outside of the lanes of a head it stays 0

            @pl.loop(0, factors.below.shape[0])
            def _(number):
                factors.below[number] = jnp.zeros(factors.below.shape[1:], factors.below.dtype)

    def place(n, at):
        bonus = None if fixed is None else fixed[n // units, :, part(n % units, unit, chunk.pack.keys)]
        mask = None if rows is None else rows[n // units].T[at, :1]
        return chunk, n, at, part(n, unit, lanes), bonus, mask, tokens, factors

    for start in range(0, tokens.q.shape[0], ROWS):

        @pl.loop(0, step * units)
        def _(n, at=slice(start, start + ROWS)):
            _factors_of_unit(*place(n, at))

    @pl.loop(0, step * units)
    def _(n):
        for start in range(0, tokens.q.shape[0], ROWS):
            _own_of_unit(*place(n, slice(start, start + ROWS)))


def _tables(shape, exclusive):
    """Of the sums of blocks of 8 tokens: of all of it; from its start to what the token reads; from after the token to
    its end. And of those for blocks of 2 and of 4, from a token to the middle of the block twice as long."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    what, t, u = (row - 2 * SUBLANES + ROWS) // ROWS, (row - 2 * SUBLANES) & (ROWS - 1), column & (ROWS - 1)
    size = jnp.where(what == 3, 2, jnp.where(what == 4, 4, SUBLANES))
    reads = jnp.where(what > 2, t & size, 2 - what)
    distance = jnp.where(reads != 0, t - u - int(exclusive), u - t - 1)
    distance, t = jnp.where(what == 0, 0, distance), jnp.where(what == 0, row * SUBLANES, t)
    return jnp.where((distance >= 0) & (t ^ u < size), 1.0, 0.0)


def _own_of_unit(chunk, n, at, lanes, bonus, mask, tokens, factors):
    own, k = tokens.q[at, lanes].astype(jnp.float32) * chunk.scale, tokens.k[at, lanes]
    q = own if mask is None else own * mask
    since, until = q * factors.ends[0, n, at], k.astype(jnp.float32) * factors.ends[1, n, at]
    factors.own[n, at] = (own if bonus is None else own * bonus).astype(chunk.dtype)
    factors.since[n, at], factors.until[n, at] = since.astype(chunk.dtype), until.astype(chunk.dtype)
    _put_below(chunk, n, at, factors.below.shape[0] - 1, k.astype(chunk.dtype), factors)


def _put_below(chunk, n, at, number, x, factors):
    heads, key, length = chunk.pack.heads, chunk.pack.key, factors.parts.shape[2]
    for head in range(heads):
        there = slice(head * length + at.start, head * length + at.stop)
        lanes = slice(head * key, (head + 1) * key) if heads > 1 else slice(None)
        factors.below[number, n, there, lanes] = x[:, lanes]


def _factors_of_unit(chunk, n, at, lanes, bonus, mask, tokens, factors):
    length, dtype, halvings = tokens.q.shape[0], chunk.dtype, factors.parts.shape[0]
    log_decay = _log2(tokens.log_decay[at, lanes])
    q, k = tokens.q[at, lanes].astype(jnp.float32) * chunk.scale, tokens.k[at, lanes].astype(jnp.float32)
    q = q if mask is None else q * mask

    def put(number, x, decay):
        x = x.astype(dtype)
        factors.parts[number, n, at] = x
        if factors.decays is not None:
            factors.decays[number, n, at] = decay
        if chunk.pack.heads > 1:
            _put_below(chunk, n, at, number, x, factors)

    eights, reading, rest, twos, fours = _sums(factors.tables, log_decay, dtype)
    ones = jnp.ones_like(q)
    decay = ones if chunk.exclusive else select_seconds(1, jnp.exp2(log_decay), ones)
    put(0, select_seconds(1, q, k) * decay, decay)
    for number, exponent in ((1, twos), (2, fours)):
        decay = jnp.exp2(exponent)
        put(number, select_seconds(1 << number, q, k) * decay, decay)
    size, number = SUBLANES, 3
    totals = [jnp.broadcast_to(eights[t : t + 1], (SUBLANES, rest.shape[1])) for t in range(ROWS // size)]
    while size < ROWS:
        x, decay, readings, rests, both = [], [], [], [], []
        for start in range(0, ROWS, 2 * size):
            first, second = slice(start, start + size), slice(start + size, start + 2 * size)
            of_first, of_second = totals[start // size], totals[start // size + 1]
            x += [k[first], q[second]]
            decay += [jnp.exp2(rest[first]), jnp.exp2(reading[second])]
            readings += [reading[first], _added(reading[second], of_first)]
            rests += [_added(rest[first], of_second), rest[second]]
            both.append(of_first + of_second)
        decay = jnp.concatenate(decay)
        put(number, jnp.concatenate(x) * decay, decay)
        reading, rest, totals = jnp.concatenate(readings), jnp.concatenate(rests), both
        size, number = 2 * size, number + 1
    (total,) = totals
    if size < length:  # one more halving: these tokens are half of it
        later = at.start > 0
        decay = jnp.exp2(reading if later else rest)
        put(number, (q if later else k) * decay, decay)
        there = slice(0, size) if later else slice(size, length)
        other = jnp.sum(_log2(tokens.log_decay[there, lanes]), axis=0, keepdims=True)
        reading, rest, total = reading + other if later else reading, rest if later else rest + other, total + other
    factors.ends[0, n, at], factors.ends[1, n, at] = jnp.exp2(reading), jnp.exp2(rest)
    factors.total[n] = jnp.exp2(total)


def _log2(log_decay):
    """Of base 2, which is what the chip has an exponential of."""
    return as_log_decay(log_decay, np.dtype(np.float32)) * np.float32(np.log2(np.e))


def _sums(tables, log_decay, dtype):
    sums = dot(tables[...], in_two(log_decay, dtype), (1, 0))
    first = 2 * SUBLANES
    return [sums[:first], *(sums[at : at + ROWS] for at in range(first, sums.shape[0], ROWS))]


def in_two(x, dtype):
    """Operands of a product with a table of 0 and 1 twice side by side: x in two parts, if not in float32."""
    if dtype == jnp.float32:
        return x
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    coarse = jax.lax.bitcast_convert_type(bits & -(1 << 16), jnp.float32)
    return jnp.concatenate([coarse, x - coarse]).astype(dtype)


def select_seconds(size, x, y):
    """x where a token is in the second half of a block of 2 x size, else y; of a register at most."""
    shape = (x if isinstance(x, jax.Array) else y).shape
    second = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, shape[1]), 0) & size != 0
    x, y = (z.reshape(-1, *second.shape) if isinstance(z, jax.Array) else z for z in (x, y))
    return jnp.where(second[None], x, y).reshape(shape)


def _added(x, each):
    """To every register of x."""
    return jnp.concatenate([x[at : at + SUBLANES] + each for at in range(0, x.shape[0], SUBLANES)])


def dot(a, b, axes):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def all_units(ref, pack, units):
    """`[., keys]` of a pack."""
    found = [ref[pack * units + unit] for unit in range(units)]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)


def of_head(values, head, pack, unit):
    """A unit of lanes of values, but 0 outside of those of a head."""
    if pack.heads == 1:
        return values
    lane = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1) + unit * values.shape[1]
    inside = (lane >= head * pack.value) & (lane < (head + 1) * pack.value)
    return jnp.where(inside, values.astype(jnp.float32), 0.0).astype(values.dtype)


def blocks_of_heads(state, pack, offset):
    """Some lanes of a state, but 0 outside of the heads' blocks."""
    if pack.heads == 1:
        return state
    key, value = (jax.lax.broadcasted_iota(jnp.int32, state.shape, axis) for axis in (0, 1))
    value = value + offset
    inside = [
        (value >= h * pack.value) & (value < (h + 1) * pack.value) & (key >= h * pack.key) & (key < (h + 1) * pack.key)
        for h in range(pack.heads)
    ]
    return jnp.where(functools.reduce(jnp.logical_or, inside), state, 0.0)


def nought(index):
    """0, which the compiler does not know: what it knows to be the same in all loops, it keeps in registers in all."""
    return jax.lax.shift_right_logical(index, jnp.int32(20))


def pairs_of(size, length, heads):
    """`[C, heads x C]`: 1 where tokens i (sublanes) and j < i part at the halving into blocks of `size`; of 0:
    where they are the same."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, heads * length), axis) for axis in (0, 1))
    j = j & (length - 1)
    return jnp.where((i ^ j) & -size == size if size else i == j, jnp.where(i >= j, 1.0, 0.0), 0.0)


def scores_of_pack(chunk, p, units, factors):
    """`[C, heads x C]`, of tokens that read (i) with those before them (j), and with themselves."""
    (halvings, _, length, _), heads = factors.parts.shape, chunk.pack.heads
    own = dot(all_units(factors.own, p, units), all_units(factors.below.at[-1], p, units), (1, 1))
    scores = own * factors.pairs[halvings]
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

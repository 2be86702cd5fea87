"""Decays of each key channel as factors of what a TPU multiplies: by halves, and never as a difference.

A chunk of C tokens falls into two halves, each of those into two, and so on. The decay from token j to token i passes
the middle of the smallest aligned block that holds both, which splits it in two factors. Each is a product of the
decays exp(g) of tokens of one half: at most 1, and of its own gates alone. So nothing overflows, and neither -inf nor a
gate of -1e-6 beside one of -100 needs care.

At a halving into blocks of h tokens, what is in a second half is read and what is in a first half is written,

    x_t = q_t (product of the decays from the middle of t's block of 2 h to what t reads)
    x_t = k_t (product of the decays from after t to the middle)

so that one matrix holds both, and the scores of the pairs that part there stand in x x^T. Of a pack of several heads
the second factor has the heads' lanes one below another, which puts their scores side by side.

What is read or written at a halving comes from that of the one before it by one multiplication: with the decay of the
neighbouring block, which within a register is an exchange of rows. So there is one exponential a token and channel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu_blocks
from pallas_kernels.linear_attention.mosaic_tpu_scalar_parts import in_lockstep
from pallas_kernels.mosaic_tpu_blocks import SUBLANES, Blocks, registers, swap
from pallas_kernels.mosaic_tpu_chunks import LANES

ROWS = 64  # tokens whose factors are made at once


class Tokens(NamedTuple):
    q: Any
    k: Any
    v: Any
    log_decay: Any


class Factors(NamedTuple):
    """Scratch of a grid step; `units` of lanes of all packs. parts: `[halvings, units, C, unit]`, x above. below:
    `[halvings, units, heads x C, unit]`, x with heads below one another (of one head unused). since, until: `[units, C,
    unit]`, what reads the state before the chunk, and what goes into the one after it (turned: that, or backward the
    other, the tokens along the lanes). total: `[units, 8, unit]`, the state's decay (wide: `[units, unit, 128]`, the
    channels along the sublanes). pairs: `[halvings + 1, C, heads x C]`, see `pairs_of`. Backward, ends: `[2, units, C,
    unit]`, the decays in since and until; decays: `[halvings, units, C, unit]`, those in parts."""

    parts: Any
    below: Any
    since: Any
    until: Any
    turned: Any
    total: Any
    wide: Any
    pairs: Any
    ends: Any = None
    decays: Any = None


def factors_scratch(chunk: Any, length: int, step: int, backward: bool) -> list[Any]:
    unit, heads, halvings = unit_of_keys(chunk.pack), chunk.pack.heads, length.bit_length() - 1
    units = step * chunk.pack.keys // unit

    def scratch(*shape, dtype=chunk.dtype):
        return pltpu.VMEM((*shape, unit), dtype)

    found = list(
        Factors(
            parts=scratch(halvings, units, length),
            below=scratch(halvings, units, heads * length if heads > 1 else SUBLANES),
            since=scratch(units, length),
            until=scratch(units, length),
            turned=pltpu.VMEM((units, unit, length), chunk.dtype),
            total=scratch(units, SUBLANES, dtype=jnp.float32),
            wide=pltpu.VMEM((units, unit, LANES), jnp.float32),
            pairs=pltpu.VMEM((halvings + 1, length, heads * length), jnp.float32),
            ends=scratch(2, units, length, dtype=jnp.float32),
            decays=scratch(halvings, units, length, dtype=jnp.float32),
        )
    )
    return found if backward else found[:-2]


def unit_of(width: int) -> int:
    return LANES if width % LANES == 0 else width


def unit_of_keys(pack: Any) -> int:
    return unit_of(pack.keys) if pack.heads == 1 else pack.keys


def at_once(pack: Any) -> int:
    """Of what is done in one block: two narrow packs, so that one has something to do while the other waits for its
    products. Two units of a wide one want more registers than a v6e has."""
    return 2 if unit_of_keys(pack) == pack.keys else 1


def part(number, width, whole):
    """A slice: the number-th `width` of a `whole`."""
    return mosaic_tpu_blocks.part(number, width, whole // width)


def make_factors(chunk: Any, step: int, tokens: Tokens, rows: Any, factors: Factors, alone: Blocks) -> None:
    lanes, unit = tokens.q.shape[1], unit_of_keys(chunk.pack)
    units = chunk.pack.keys // unit

    @pl.when(pl.program_id(2) == 0)
    def _():
        (halvings, _, length, _), heads = factors.parts.shape, chunk.pack.heads
        for number in range(halvings + 1):
            factors.pairs[number] = pairs_of(1 << number if number < halvings else 0, length, heads)
        if heads > 1:  # outside of the lanes of a head it stays 0

            @pl.loop(0, factors.below.shape[0])
            def _(number):
                factors.below[number] = jnp.zeros(factors.below.shape[1:], factors.below.dtype)

    for start in range(0, tokens.q.shape[0], ROWS):

        def make_decays(n, at=slice(start, start + ROWS)):
            _decays_of_unit(chunk, n, at, part(n, unit, lanes), tokens, factors)

        def make(n, at=slice(start, start + ROWS)):
            mask = None if rows is None else rows[n // units].T[at, :1]
            _factors_of_unit(chunk, n, at, part(n, unit, lanes), mask, tokens, factors)

        if factors.decays is not None:  # first, as the others' total takes the place of that of the tokens before
            in_lockstep(alone, at_once(chunk.pack), step * units, [(make_decays, 0)])
        in_lockstep(alone, at_once(chunk.pack), step * units, [(make, 0)])


def _put_below(chunk, n, at, number, x, factors):
    heads, key, length = chunk.pack.heads, chunk.pack.key, factors.parts.shape[2]
    for head in range(heads):
        there = slice(head * length + at.start, head * length + at.stop)
        lanes = slice(head * key, (head + 1) * key) if heads > 1 else slice(None)
        factors.below[number, n, there, lanes] = x[:, lanes]


def _factors_of_unit(chunk, n, at, lanes, mask, tokens, factors):
    q, k = tokens.q[at, lanes].astype(jnp.float32) * chunk.scale, tokens.k[at, lanes].astype(jnp.float32)
    q = q if mask is None else q * mask

    def put(number, x):
        x = jnp.concatenate(x).astype(chunk.dtype)
        factors.parts[number, n, at] = x
        if chunk.pack.heads > 1:
            _put_below(chunk, n, at, number, x, factors)

    since, until, factors.total[n] = _decayed(chunk, at, q, k, tokens.log_decay, lanes, factors.total.at[n], put)
    factors.since[n, at], factors.until[n, at] = (jnp.concatenate(x).astype(chunk.dtype) for x in (since, until))


def _decays_of_unit(chunk, n, at, lanes, tokens, factors):
    def put(number, decay):
        factors.decays[number, n, at] = jnp.concatenate(decay)

    ones = jnp.ones((ROWS, factors.decays.shape[3]), jnp.float32)
    since, until, _ = _decayed(chunk, at, ones, ones, tokens.log_decay, lanes, factors.total.at[n], put)
    factors.ends[0, n, at], factors.ends[1, n, at] = jnp.concatenate(since), jnp.concatenate(until)


def _decayed(chunk, at, read, written, log_decay, lanes, sooner, put):
    """(what of ROWS tokens reads the state before the chunk; what goes into that after it; the decay of all tokens up
    to the last of these), in registers. sooner: the decay of all before them. put(number, x): takes what reads or is
    written at each halving."""
    length = log_decay.shape[0]
    totals = registers(jnp.exp(log_decay[at, lanes].astype(jnp.float32)))
    read, written = registers(read), registers(written)
    row = jax.lax.broadcasted_iota(jnp.int32, totals[0].shape, 0)
    if not chunk.exclusive:
        read = [x * by for x, by in zip(read, totals, strict=True)]
    for number in range(3):  # within registers
        size = 1 << number
        second = row & size != 0
        x = [jnp.where(second, *both) for both in zip(read, written, strict=True)]
        put(number, x)
        others = [swap(by, size, second) for by in totals]
        x = [one * by for one, by in zip(x, others, strict=True)]
        read = [jnp.where(second, new, old) for new, old in zip(x, read, strict=True)]
        written = [jnp.where(second, old, new) for new, old in zip(x, written, strict=True)]
        totals = [by * other for by, other in zip(totals, others, strict=True)]
    number, size = 3, 1  # of registers
    while size < len(read):
        second = [bool(r & size) for r in range(len(read))]
        put(number, [b if late else a for late, a, b in zip(second, written, read, strict=True)])
        read = [x * totals[r // size - 1] if second[r] else x for r, x in enumerate(read)]
        written = [x if second[r] else x * totals[r // size + 1] for r, x in enumerate(written)]
        totals = [a * b for a, b in zip(totals[::2], totals[1::2], strict=True)]
        number, size = number + 1, 2 * size
    (total,) = totals
    if length > ROWS and at.start == 0:
        put(number, written)
        later = jnp.sum(log_decay[at.stop :, lanes].astype(jnp.float32), axis=0, keepdims=True)
        later = jnp.exp(jnp.broadcast_to(later, total.shape))
        written = [x * later for x in written]
    elif length > ROWS:
        put(number, read)
        sooner = sooner[...]
        read, total = [x * sooner for x in read], total * sooner
    return read, written, total


def select_seconds(size, x, y):
    """x where a token is in the second half of a block of 2 x size, else y; of a register at most."""
    shape = (x if isinstance(x, jax.Array) else y).shape
    second = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, shape[1]), 0) & size != 0
    x, y = (z.reshape(-1, *second.shape) if isinstance(z, jax.Array) else z for z in (x, y))
    return jnp.where(second[None], x, y).reshape(shape)


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
    return jax.lax.shift_right_logical(pl.program_id(2) if isinstance(index, int) else index, jnp.int32(20))


def pairs_of(size, length, heads):
    """`[C, heads x C]`: 1 where tokens i (sublanes) and j < i part at the halving into blocks of `size`; of 0:
    where they are the same."""
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (length, heads * length), axis) for axis in (0, 1))
    j = j & (length - 1)
    return jnp.where((i ^ j) & -size == size if size else i == j, jnp.where(i >= j, 1.0, 0.0), 0.0)

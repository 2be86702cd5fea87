"""Inverses of unit triangular matrices on a TPU, over references: those of several heads side by side in the lanes.

A head's matrix of 64 x 64 fills half of the lanes of a register, so that two heads are worked on as one set `[C, n C]`,
the columns `h C .. (h + 1) C` of which are head h's:

    side, sets = sets_of(heads, C)    # n, and how many sets; places left over in the last one are to hold 0
    invert(lower, inverse, dtype)     # (I - lower)^-1 of each

`lower`, `inverse`: two references `[sets, C, n C]`, float32. C: a power of two from 8. lower: 0 on and above the
diagonals. dtype: of the op's inputs. Products are in full precision for float32, and for bfloat16 of the first 16 bits
of float32 numbers. Two or three sets are worked on at once, as one alone would wait for its own products. For use
inside a grid.

A set keeps of its blocks on the diagonal only these, below one another in as many rows as one of them has: blocks of 8
are one register, and a few operations on it invert them all. Then by halves, as `blocks.unit_inverse`: of blocks twice
as long, [[X, 0], [Y M X, Y]], where M is what lies below the diagonal between the halves.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu_blocks import SUBLANES, alone
from pallas_kernels.mosaic_tpu_chunks import LANES, divisor, product


def sets_of(heads: int, length: int) -> tuple[int, int]:
    """(how many heads lie side by side, how many such sets there are)."""
    side = max(LANES // length, 1)
    return side, -(-heads // side)


def invert(lower, inverse, dtype) -> None:
    sets, length, _ = lower.shape
    at_once = divisor(sets, 3)

    def group(number, _):
        _invert(lower, inverse, [number * at_once + one for one in range(at_once)], length, dtype)

    if at_once == sets:
        group(0, None)
    else:
        jax.lax.fori_loop(0, sets // at_once, group, None)


def _invert(lower, inverse, sets, length, dtype):
    """Of these sets, in lockstep."""

    def double(found, size):
        return [_twice_as_long(x, lower[one], size, length, dtype) for x, one in zip(found, sets, strict=True)]

    def store(found):
        for x, one in zip(found, sets, strict=True):
            inverse[one, : x.shape[0]] = x

    found, size = [_inverses_of_registers(lower[one]) for one in sets], SUBLANES
    while 2 * size < length or (size < length and len(sets) < 3):
        found = double(found, size)
        size *= 2
    store(found)
    if size < length:
        alone(lambda: store(double([inverse[one, :size] for one in sets], size)))  # where there are registers enough


def _inverses_of_registers(lower):
    """`[8, n C]`, the inverses of the blocks of 8, column by column of the matrices."""
    length, lanes = lower.shape
    block = _lane(lanes) & (length - 1) & -SUBLANES
    own = jnp.zeros((SUBLANES, lanes), jnp.float32)
    for start in range(0, length, SUBLANES):
        own = jnp.where(block == start, lower[start : start + SUBLANES], own)
    lane = jax.lax.broadcasted_iota(jnp.int32, own.shape, 1)
    first, column = lane & -SUBLANES, lane & (SUBLANES - 1)
    x = jnp.where(column == jax.lax.broadcasted_iota(jnp.int32, own.shape, 0), 1.0, 0.0)
    for k in range(SUBLANES - 1):
        x = x + jnp.take_along_axis(own, first + k, axis=1, mode="promise_in_bounds") * x[k : k + 1]
    return x


def _twice_as_long(x, lower, size, length, dtype):
    """From the inverses of the blocks of `size`, `[size, n C]`, those of the blocks of 2 x size."""
    lanes = x.shape[1]
    lane = _lane(lanes)
    first = (lane & size) == 0  # in the first half of its block
    blocks = range(0, lanes, size)
    nothing = jnp.zeros_like(x)

    def between(part):  # rows of second halves, columns of first ones
        rows = (part[at % length : at % length + size] for at in blocks)
        own = ((lane & -size) == at - size for at in blocks)
        return jnp.concatenate(
            [jnp.where(m, row, 0.0) if at & size else nothing for at, row, m in zip(blocks, rows, own, strict=True)]
        )

    def first_halves(part):
        return jnp.concatenate(
            [nothing if at & size else jnp.where((lane & -size) == at, part, 0.0) for at in blocks]
        )

    parts = parts_of(x, dtype)
    below = _product(parts, [between(part) for part in parts_of(lower, dtype)], dtype)
    below = _product(parts_of(below, dtype), [first_halves(part) for part in parts], dtype)
    return jnp.concatenate([jnp.where(first, x, 0.0), jnp.where(first, below, x)])


def _product(a, b, dtype):
    """From what `parts_of` gives."""
    if len(a) == 1:
        return product(a[0], b[0], (1, 0), dtype)
    rows, lanes = a[0].shape
    found = product(jnp.concatenate(a), jnp.concatenate(b, axis=1), (1, 0), dtype)
    return found[:rows, :lanes] + found[rows:, :lanes] + found[:rows, lanes:]


def parts_of(x, dtype):
    """Numbers of this dtype, as float32, that add up to x but for 2^-17 of it."""
    if dtype == jnp.float32:
        return [x]
    first = x.astype(dtype).astype(jnp.float32)
    return [first, x - first]


def _lane(lanes):
    return jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)

"""Products of float32 matrices `[C, C]` on Hopper's tensor cores, and the inverse of a unit triangular one.

A float32 is held as the sum of two 16-bit numbers, and of the four products of two such sums the three that matter are
taken: 16 bits of each factor count, which one 16-bit product (8 bits) or one of tf32 (11) does not give, for one and
a half times the work of the latter. It is needed: keys that are nearly parallel make inverses of large entries that
cancel (with one 16-bit product the results are off by 0.06 to 9 instead of 0.01 to 0.04 of their greatest).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic_gpu_products import MATRIX, matrix

CHUNK = 64
SWIZZLE = 128
PANEL = 64  # columns of a tile


def parts(count: int, dtype: Any) -> Any:
    """Shared memory for so many matrices, each in two parts."""
    return matrix(count, 2, CHUNK, CHUNK, dtype=dtype, swizzle=SWIZZLE)


def store(reference: Any, x: jax.Array) -> None:
    """x in two parts."""
    high = x.astype(reference.dtype)
    reference[0] = high
    reference[1] = (x - high.astype(jnp.float32)).astype(reference.dtype)


def load(reference: Any) -> jax.Array:
    """What `store` has stored."""
    high, low = (plgpu.load(reference.at[part], layout=MATRIX).astype(jnp.float32) for part in range(2))
    return high + low


def total(columns: int, *pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of the products of pairs of operands in shared memory."""

    def body(accumulator):
        for left, right in pairs:
            plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(body, plgpu.ACC((CHUNK, columns), jnp.float32))


def times(left: Any, right: Any) -> jax.Array:
    """left @ right, both in two parts."""
    return total(CHUNK, *((left.at[i], right.at[j]) for i, j in ((0, 0), (0, 1), (1, 0))))


def transposed(reference: Any) -> Any:
    return reference.transpose((1, 0))


def iota(axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=MATRIX)


def where(mask: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mask, x, 0.0)


def unit_inverse(lower: jax.Array, inverse: Any, scratch: tuple[Any, Any]) -> None:
    """In `inverse` (I - lower)^-1, of a strictly lower triangular matrix (0 elsewhere) in registers.

    By doubling blocks on the diagonal, as in `blocks.unit_inverse`, here in products of whole matrices: if X has the
    inverses of the blocks of size h, then X + X L X, of the latter what lies in blocks of 2 h, has those of size 2 h.
    """
    given, half_done = scratch
    store(given, lower)

    def parting():
        """Its highest bit says of which size is the smallest block that holds both line and column."""
        return iota(0) ^ iota(1)

    def double(level, found):
        store(inverse, found)
        plgpu.commit_smem()
        store(half_done, times(inverse, given))
        plgpu.commit_smem()
        found_below = times(half_done, inverse)
        return found + where(lax.shift_right_logical(parting(), level) == 1, found_below)

    start = jnp.where(parting() == 0, 1.0, where(parting() == 1, lower))
    found = lax.fori_loop(1, CHUNK.bit_length() - 1, double, start)
    store(inverse, found)
    plgpu.commit_smem()

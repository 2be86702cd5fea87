"""Products of float32 matrices `[C, C]` on Hopper's tensor cores, and the inverse of a unit triangular one.

A float32 is held as the sum of two 16-bit numbers, and of the four products of two such sums the three that matter are
taken: 16 bits of each factor count, which one 16-bit product (8 bits) or one of tf32 (11) does not give, for one and
a half times the work of the latter. It is needed: keys that are nearly parallel make inverses of large entries that
cancel (with one 16-bit product the results are off by 0.06 to 9 instead of 0.01 to 0.04 of their greatest).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu_products import MATRIX, matrix

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
    """The sum of the products of pairs of operands in shared memory, which may be written once it is there."""

    def body(accumulator):
        for left, right in pairs:
            plgpu.wgmma(accumulator, left, right)
        result = accumulator[...]
        plgpu.commit_smem()  # a warp waits for its own lines alone; a slower one may still read what is to be written
        return result

    return pl.run_scoped(body, plgpu.ACC((CHUNK, columns), jnp.float32))


def transposed(reference: Any) -> Any:
    return reference.transpose((1, 0))


class Transposed(NamedTuple):
    """Of a matrix in two parts, as an operand of `times`."""

    of: Any


def times(left: Any, right: Any) -> jax.Array:
    """left @ right, both in two parts."""
    left, right = both(left), both(right)
    return total(CHUNK, (left[0], right[0]), (left[0], right[1]), (left[1], right[0]))


def both(x: Any) -> list[Any]:
    """The two parts."""
    if isinstance(x, Transposed):
        return [transposed(x.of.at[part]) for part in range(2)]
    return [x.at[part] for part in range(2)]


def times_tile(left: Any, tile: Any) -> list[tuple[Any, Any]]:
    """The operands of left @ tile, the tile in one part, for `total`."""
    return [(part, tile) for part in both(left)]


def iota(axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=MATRIX)


def where(mask: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mask, x, 0.0)


def unit_inverse(lower: Any, inverse: Any, scratch: Any) -> None:
    """In `inverse` (I - lower)^-1, of a strictly lower triangular matrix (0 elsewhere); all of them in two parts.

    By doubling blocks on the diagonal, as in `blocks.unit_inverse`, here in products of whole matrices: if X has the
    inverses of the blocks of size h, then X + X L X, of the latter what lies in blocks of 2 h, has those of size 2 h.
    """

    def parting():
        """Its highest bit says of which size is the smallest block that holds both line and column."""
        return iota(0) ^ iota(1)

    def double(level, found):
        store(inverse, found)
        plgpu.commit_smem()
        store(scratch, times(inverse, lower))
        plgpu.commit_smem()
        found_below = times(scratch, inverse)
        return found + where(lax.shift_right_logical(parting(), level) == 1, found_below)

    start = jnp.where(parting() == 0, 1.0, where(parting() == 1, load(lower)))
    found = lax.fori_loop(1, CHUNK.bit_length() - 1, double, start)
    store(inverse, found)
    plgpu.commit_smem()


def through_writes(inverse: Any, scores: Any, inner: Any, of_values: jax.Array) -> jax.Array:
    """`own`, of P_v in registers; and P_u in `scores` becomes P_u M. M is in `inverse`, A_ak in `inner`."""
    plgpu.commit_smem()
    store(scores, times(scores, inverse))
    plgpu.commit_smem()
    return of_values + times(scores, inner)


def finish(tiles: dict[str, Any], inverse: Any, scores: Any, inner: Any, scaled: Any) -> None:
    """In place of the tiles of q, a and k what `read`, `seen` and `key` are, one panel after another.

    inverse, scores: M and P_u M, inner: M A_ak, each with the factors that the tiles of a and b lack. scaled: of a name
    and a tile, the tile in registers and with all its factors, which here are those of q, k and b.
    """
    dtype = tiles["q"].dtype

    def panel(n, _):
        q, k, a, b = (tiles[name].at[n] for name in "qkab")
        read = scaled("q", q) + total(PANEL, *times_tile(scores, a))
        q[...] = read.astype(dtype)
        a[...] = total(PANEL, *times_tile(inverse, a)).astype(dtype)
        key = scaled("k", k) + total(PANEL, *times_tile(Transposed(inner), b))
        k[...] = key.astype(dtype)
        b[...] = scaled("b", b).astype(dtype)

    lax.fori_loop(0, tiles["q"].shape[0], panel, None)

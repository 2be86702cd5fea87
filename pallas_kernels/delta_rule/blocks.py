"""Lower triangular matrices by halves: a block is two blocks of half the size on the diagonal and one square below.

Everything is done for all blocks of one size at once, from the smallest size to the largest, so that matrix products
do the work and there is no loop over rows. Sizes are powers of two.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import devices


def product(formula, x, y):
    return jnp.einsum(formula, x, y, precision=jax.lax.Precision.HIGHEST)


def halves(
    x: Float[Array, "*batch C K"], half: int
) -> tuple[Float[Array, "*batch n h K"], Float[Array, "*batch n h K"]]:
    """The first and the second halves of the blocks of 2 x half rows."""
    x = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def join(diagonal: Float[Array, "*batch m h h"], below: Float[Array, "*batch n h h"]) -> Float[Array, "*batch n g g"]:
    """Blocks of twice the size, from pairs of those on the diagonal (m = 2 n) and the squares below (g = 2 h)."""
    half = diagonal.shape[-1]
    pairs = diagonal.reshape(*below.shape[:-2], 2, half, half)
    top = jnp.pad(pairs[..., 0, :, :], [(0, 0)] * (below.ndim - 1) + [(0, half)])
    return jnp.concatenate([top, jnp.concatenate([below, pairs[..., 1, :, :]], axis=-1)], axis=-2)


def squares_below(x: Float[Array, "*batch C C"], half: int) -> Float[Array, "*batch n h h"]:
    """The square below the diagonal of every block of size 2 x half on the diagonal."""
    size = x.shape[-1]
    starts = np.arange(0, size, 2 * half)
    return jnp.stack([x[..., s + half : s + 2 * half, s : s + half] for s in starts], axis=-3)


@jax.custom_vjp
def solve(lower: Float[Array, "*batch C C"], right: Float[Array, "*batch C V"]) -> Float[Array, "*batch C V"]:
    """x with (I - lower) x = right, for a strictly lower triangular matrix; its diagonal and above are not read."""
    return product("...ij,...jv->...iv", unit_inverse(lower), right)


def _solve_fwd(lower, right):
    inverse = unit_inverse(lower)
    solution = product("...ij,...jv->...iv", inverse, right)
    return solution, (inverse, solution)


def _solve_bwd(kept, cotangent):
    """By the inverse at hand: two products instead of the way back through all the halvings."""
    inverse, solution = kept
    of_right = product("...ji,...jv->...iv", inverse, cotangent)
    return jnp.tril(product("...iv,...jv->...ij", of_right, solution), -1), of_right


solve.defvjp(_solve_fwd, _solve_bwd)


def unit_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I - lower)^-1 for a strictly lower triangular matrix; what stands on and above its diagonal is not read.

    By halves, [[X, 0], [-M, Y]]^-1 = [[X^-1, 0], [Y^-1 M X^-1, Y^-1]]: forward substitution in blocks, which keeps its
    accuracy where a power series of `lower` would not.
    """
    size, half = lower.shape[-1], 1
    inverse = jnp.ones((*lower.shape[:-2], size, 1, 1), lower.dtype)
    while half < size:
        below = squares_below(lower, half)
        if half > 1:
            first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
            below = _multiply(_multiply(second, below), first)
        inverse = join(inverse, below)
        half *= 2
    return inverse[..., 0, :, :]


def _multiply(x: Float[Array, "*batch h h"], y: Float[Array, "*batch h h"]) -> Float[Array, "*batch h h"]:
    """Of small squares on a CPU as sums written out, which XLA makes loops of: as products they take twice as long. (On a
    TPU it is the other way round.)"""
    size = x.shape[-1]
    if size > 8 or devices.current().platform != "cpu":
        return product("...ij,...jk->...ik", x, y)
    return sum(x[..., :, j, None] * y[..., None, j, :] for j in range(size))

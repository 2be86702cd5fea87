"""Matrix products of a warpgroup on Hopper's tensor cores, and the layouts of what goes in and comes out.

A product has two bodies. On the device its left operand may stay in registers, and the accumulator is carried from
one product to the next. JAX's GPU interpreter knows only operands in shared memory and fresh accumulators; when
interpreted, a left operand goes through a scratch tile, and the sum is made afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import devices

SHARED_MEMORY = 232_448 - 8_192  # bytes of a block on Hopper, but for barriers, decays, documents and positions
LINES = 64  # of a product: what the instruction has for each warpgroup

MATRIX = plgpu.Layout.WGMMA
PER_LINE = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def swizzle(*widths: int) -> int | None:
    """How shared memory is swizzled, in bytes, for operands with rows of so many 16-bit numbers; None: it cannot be."""
    return next((swizzle for swizzle in (128, 64) if all(2 * width % swizzle == 0 for width in widths)), None)


def matrix(*shape: int, dtype: Any, swizzle: int) -> Any:
    """Shared memory for matrices `[..., lines, columns]` that are operands of products: in tiles, swizzled."""
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def scratch(warpgroups: int, columns: int, dtype: Any) -> Any:
    """What `added` needs beside its operands: nothing on the device."""
    if not devices.current().interpreted:
        return None
    return matrix(warpgroups, LINES, columns, dtype=dtype, swizzle=64)


def of_warpgroup(scratch: Any, warpgroup: Any) -> Any:
    return None if scratch is None else scratch.at[warpgroup]


def both_of(axis: str, parts: int) -> tuple[jax.Array, jax.Array]:
    """The place on two axes of a grid that are one, the second with `parts` places: for kernels that go over chunks of
    tokens, since CUDA allows 65,535 blocks on all axes but the last two together."""
    place = lax.axis_index(axis)
    return lax.div(place, jnp.int32(parts)), lax.rem(place, jnp.int32(parts))


def nought(step: jax.Array) -> jax.Array:
    """0, for a step of a loop that is not below 0, though the compiler does not know.

    In the index of an operand that is the same in all steps, it keeps the addresses of its parts from being computed
    before the loop: kept in registers, they are more than there are where heads are wide.
    """
    return jnp.minimum(step, 0)


def zeros(*shape: int, layout: Any = MATRIX) -> jax.Array:
    return full(0.0, *shape, layout=layout)


def full(value: float, *shape: int, layout: Any = MATRIX) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along_lines(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number per line, for every column."""
    return lax.broadcast_in_dim(x, shape, [0])


def along_columns(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """One number per column, for every line."""
    return lax.broadcast_in_dim(x, shape, [1])


def product(left: Any, right: Any, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """`left @ right` of two operands in shared memory; `meanwhile` runs once the product is under way."""

    def body(accumulator):
        plgpu.wgmma(accumulator, left, right)
        meanwhile()
        return accumulator[...]

    return pl.run_scoped(body, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def two_products(
    first: tuple[Any, Any], second: tuple[Any, Any], use: Callable[[jax.Array], Any]
) -> tuple[Any, jax.Array]:
    """`use(left @ right)` of the first pair of operands, all in shared memory, and `left @ right` of the second, which
    is under way while the first result is used."""

    def body(first_sum, second_sum):
        plgpu.wgmma(first_sum, *first)
        plgpu.wgmma(second_sum, *second)
        used = use(plgpu.wgmma_accumulator_load(first_sum, wait_n=1))
        return used, second_sum[...]

    sums = [plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32) for left, right in (first, second)]
    return pl.run_scoped(body, *sums)


def added(accumulator: jax.Array, left: jax.Array, right: Any, scratch: Any) -> jax.Array:
    """`accumulator + left @ right`, left in registers, right in shared memory."""
    if scratch is not None:
        scratch[...] = left
        plgpu.commit_smem()
        return accumulator + product(scratch, right)
    return pl.run_state(lambda reference: plgpu.wgmma(reference, left, right))(plgpu.ACC.init(accumulator))


def added_all(accumulator: jax.Array, terms: Sequence[tuple[Any, Any]], scratch: Any) -> jax.Array:
    """`accumulator + left @ right + ...` of all terms; each left in registers or shared memory, right in the latter."""
    if not terms:
        return accumulator
    if devices.current().interpreted:
        for left, right in terms:
            if isinstance(left, jax.Array):
                accumulator = added(accumulator, left, right, scratch)
            else:
                accumulator = accumulator + product(left, right)
        return accumulator

    def body(reference):
        for left, right in terms:
            plgpu.wgmma(reference, left, right)

    return pl.run_state(body)(plgpu.ACC.init(accumulator))


def added_and_product(
    accumulator: jax.Array,
    first: tuple[jax.Array, Any],
    second: tuple[Any, Any],
    scratch: Any,
    issued: Callable[[], None],
) -> tuple[jax.Array, jax.Array]:
    """`added(accumulator, *first)` and `product(*second)`, one after the other without a wait between them.

    issued: is called once both are with the tensor cores.
    """
    if scratch is not None:
        return added(accumulator, *first, scratch), product(*second, issued)

    def body(sum, product):
        sum[...] = accumulator
        plgpu.wgmma(sum, *first)
        plgpu.wgmma(product, *second)
        issued()
        return sum[...], product[...]

    left, right = second
    return pl.run_scoped(
        body, plgpu.ACC(accumulator.shape, jnp.float32), plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32)
    )


def drain(free: Any, stages: int, first: Any, last: Any) -> None:
    """The fetching warp's last waits, for the tiles that no other takes the place of: JAX 0.11's interpreter wants every
    phase of a barrier to be waited for."""

    def wait(n, _):
        plgpu.barrier_wait(free.at[lax.rem(n - first, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(first, last - stages), last, wait, None)

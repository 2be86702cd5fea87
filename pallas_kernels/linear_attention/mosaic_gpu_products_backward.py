"""The gradients of what `mosaic_gpu_products.read` and the states' recurrence multiply, all chunks at once.

Two warpgroups work side by side on what a third fetches, slice by slice of the values: one sums up the cotangents of
scores and of what reads, the other those of what writes and of what remains of the states.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.linear_attention.mosaic_gpu_tables import CHUNK
from pallas_kernels.mosaic_gpu_states import COMPILER

STAGES = 2  # slices in flight
READER, WRITER, FETCHER = range(3)  # warpgroups


def cotangents(v, do, before, after) -> tuple[jax.Array, ...]:
    """do v^T `[B, n, H, C, C]`, do before^T and v after^T `[B, T, H, K]`, and sum_V(before * after) `[B, n, H, K]`.

    v, do: `[B, T, H, V]`. before, after: `[B, n, H, K, V]`, states and the cotangents of those after the chunks. The
    results are in their dtype, the last in float32.
    """
    batch, count, heads, width, value_width = before.shape
    dtype = v.dtype
    results = 2 * CHUNK * width + CHUNK * CHUNK
    size = next(n for n in (64, 32) if results + 2 * STAGES * n * (width + CHUNK) <= products.SHARED_MEMORY // 2)
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=2 * size)
    scratch = dict(
        tiles=dict(
            before=matrix(STAGES, width, size),
            after=matrix(STAGES, width, size),
            v=matrix(STAGES, CHUNK, size),
            do=matrix(STAGES, CHUNK, size),
        ),
        scores=matrix(CHUNK, CHUNK),
        reading=matrix(CHUNK, width),
        writing=matrix(CHUNK, width),
        here=plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    )

    def linear_attention_cotangents(*references):
        def block(**scratch):
            _block(size, value_width // size, *references, **scratch)

        pl.run_scoped(block, **scratch, collective_axes="warpgroup")

    of_tokens = jax.ShapeDtypeStruct((*v.shape[:3], width), dtype)
    run = plgpu.kernel(
        linear_attention_cotangents,
        out_type=[
            jax.ShapeDtypeStruct((batch, count, heads, CHUNK, CHUNK), dtype),
            of_tokens,
            of_tokens,
            jax.ShapeDtypeStruct((batch, count, heads, width), jnp.float32),
        ],
        grid=(batch, count, heads),
        grid_names=("row", "chunk", "head"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    return tuple(run(v, do, before, after))


def _block(
    size, slices, v, do, before, after, d_scores, d_reading, d_writing, d_total, *, tiles, scores, reading, writing,
    here, free,
):  # fmt: skip
    row, chunk, head, warpgroup = (lax.axis_index(name) for name in ("row", "chunk", "head", "warpgroup"))
    lines, width = pl.ds(chunk * CHUNK, CHUNK), before.shape[3]

    def slot_of(slice):
        return lax.rem(slice, jnp.int32(STAGES))

    def store(x, tile, place):
        tile[...] = x.astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, place)

    @pl.when(warpgroup == FETCHER)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        def fetch_slice(slice, _):
            slot, columns = slot_of(slice), pl.ds(slice * size, size)
            pl.when(slice >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
            for name, array in (("before", before), ("after", after)):
                plgpu.copy_gmem_to_smem(array.at[row, chunk, head, :, columns], tiles[name].at[slot], here.at[slot])
            for name, array in (("v", v), ("do", do)):
                plgpu.copy_gmem_to_smem(array.at[row, lines, head, columns], tiles[name].at[slot], here.at[slot])

        lax.fori_loop(0, slices, fetch_slice, None)
        products.drain(free, STAGES, 0, slices)

    @pl.when(warpgroup == READER)
    def reader():
        plgpu.set_max_registers(240, action="increase")

        def visit(slice, carry):
            sum, weights = carry
            slot = slot_of(slice)
            plgpu.barrier_wait(here.at[slot])
            cotangent = tiles["do"].at[slot]
            sum = products.added_all(sum, [(cotangent, tiles["before"].at[slot].transpose((1, 0)))], None)
            weights = products.added_all(weights, [(cotangent, tiles["v"].at[slot].transpose((1, 0)))], None)
            plgpu.barrier_arrive(free.at[slot])
            return sum, weights

        carry = products.zeros(CHUNK, width), products.zeros(CHUNK, CHUNK)
        sum, weights = lax.fori_loop(0, slices, visit, carry)
        store(sum, reading, d_reading.at[row, lines, head])
        store(weights, scores, d_scores.at[row, chunk, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WRITER)
    def writer():
        plgpu.set_max_registers(240, action="increase")
        pieces = range(0, width, 64)

        def load(tile):
            return plgpu.load(tile, layout=products.MATRIX).astype(jnp.float32)

        def visit(slice, carry):
            sum, totals = carry
            slot = slot_of(slice)
            plgpu.barrier_wait(here.at[slot])
            state, cotangent = tiles["before"].at[slot], tiles["after"].at[slot]
            totals = tuple(
                total + (load(state.at[pl.ds(start, 64)]) * load(cotangent.at[pl.ds(start, 64)])).sum(axis=1)
                for start, total in zip(pieces, totals, strict=True)
            )
            sum = products.added_all(sum, [(tiles["v"].at[slot], cotangent.transpose((1, 0)))], None)
            plgpu.commit_smem()  # what was read in the ordinary way is read before the next copy writes it
            plgpu.barrier_arrive(free.at[slot])
            return sum, totals

        nothing = products.zeros(CHUNK, layout=products.PER_LINE)
        carry = products.zeros(CHUNK, width), tuple(nothing for _ in pieces)
        sum, totals = lax.fori_loop(0, slices, visit, carry)
        for start, total in zip(pieces, totals, strict=True):
            d_total[row, chunk, head, pl.ds(start, 64)] = total
        store(sum, writing, d_writing.at[row, lines, head])
        plgpu.wait_smem_to_gmem(0)

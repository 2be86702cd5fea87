"""The forward kernel for a latent cache: values are the first channels of wide keys (arXiv 2405.04434, section 2.1).

A tile of keys is read once, and serves both products. Its values are too wide for one warpgroup's registers: two hold
half of the channels each, of the same 64 rows, and both compute the scores. That is half as much again of the products'
work, and where at most 64 heads share the cache, as fast: reading it takes longer still.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.attention.mosaic_gpu_forward import COMPILER, Plan, finished, softmax_step, start
from pallas_kernels.attention.mosaic_gpu_tiles import Visits, seen
from pallas_kernels.attention.options import Options

WARPGROUPS = 2  # that compute, beside the one that fetches
KEYS = 64  # of a tile: two of them and the queries fill the shared memory
STAGES = 2
WIDEST = (576, 512)


def fits(width: int, value_width: int) -> bool:
    """Whether heads are not too wide, and half of the values makes whole tiles of shared memory."""
    return width <= WIDEST[0] and value_width <= WIDEST[1] and width % 64 == 0 and value_width % 128 == 0


def forward(plan: Plan, options: Options, q, k, v: None, visits: Visits) -> tuple[jax.Array, jax.Array]:
    """See `mosaic_gpu_forward.forward`."""
    batch, length, heads, width = q.shape
    half, tiles, dtype = options.value_width // WARPGROUPS, visits.tiles.shape[1], q.dtype
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=128)
    scratch = dict(
        q_tile=matrix(1, products.LINES, width),
        # The result takes the place of the last keys.
        keys_or_result=plgpu.RefUnion(matrix(STAGES, KEYS, width), matrix(WARPGROUPS, products.LINES, half)),
        index_tiles=plgpu.SMEM((STAGES, 2, KEYS), jnp.int32),
        q_index=plgpu.SMEM((2, products.LINES), jnp.int32),
        sums=plgpu.SMEM((products.LINES,), jnp.float32),
        weights=products.scratch(WARPGROUPS, KEYS, dtype),
        q_here=plgpu.Barrier(num_arrivals=2),
        here=plgpu.Barrier(num_barriers=STAGES),
        index_here=plgpu.Barrier(num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        done=plgpu.Barrier(num_arrivals=WARPGROUPS),
    )

    def attention_forward_latent(*references):
        pl.run_scoped(
            functools.partial(_block, plan, options, *references), **scratch, collective_axes="warpgroup"
        )

    run = plgpu.kernel(
        attention_forward_latent,
        out_type=[
            jax.ShapeDtypeStruct((plan.splits, batch, length, heads, options.value_width), dtype),
            jax.ShapeDtypeStruct((plan.splits, batch, heads, tiles * products.LINES), jnp.float32),
        ],
        grid=(batch, plan.splits, heads, tiles),  # tiles of the same keys follow one another
        grid_names=("row", "split", "head", "tile"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    o, logsumexp = run(q, k, *visits)
    return o, logsumexp


def plan(q, k, splits) -> Plan:
    """splits: a function of the number of blocks and of each block's tiles of keys."""
    blocks = math.ceil(q.shape[1] / products.LINES) * q.shape[0] * q.shape[2]
    return Plan(1, KEYS, STAGES, splits(blocks, math.ceil(k.shape[1] / KEYS)))


def _block(
    plan, options, q, k, q_index_all, kv_index, listed, counts, o, logsumexp, *, q_tile, keys_or_result, index_tiles,
    q_index, sums, weights, q_here, here, index_here, free, done,
):  # fmt: skip
    row, head, split, tile, warpgroup = (lax.axis_index(name) for name in ("row", "head", "split", "tile", "warpgroup"))
    kv_head = lax.div(head, jnp.int32(q.shape[2] // k.shape[2]))
    line = row if listed.shape[0] > 1 else 0
    k_tiles, result_tiles = keys_or_result
    half = options.value_width // WARPGROUPS
    first, middle, last = plan.part(counts, line, tile, split)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def fetch(masked, n, _):
            slot = lax.rem(n - first, jnp.int32(STAGES))
            keys = pl.ds(listed[line, tile, n] * KEYS, KEYS)
            pl.when(n - first >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(k.at[row, keys, kv_head], k_tiles.at[slot], here.at[slot])
            if masked:
                plgpu.copy_gmem_to_smem(kv_index.at[line, :, keys], index_tiles.at[slot], index_here.at[slot])

        lax.fori_loop(first, middle, functools.partial(fetch, False), None)
        lax.fori_loop(middle, last, functools.partial(fetch, True), None)
        products.drain(free, STAGES, first, last)

    def compute(part):  # which half of the channels: known when traced, since it is where operands begin
        plgpu.set_max_registers(240, action="increase")
        lines, columns = pl.ds(tile * products.LINES, products.LINES), pl.ds(part * half, half)
        if part == 0:
            plgpu.copy_gmem_to_smem(q.at[row, lines, head], q_tile.at[0], q_here)
            plgpu.copy_gmem_to_smem(q_index_all.at[line, :, lines], q_index, q_here)
        plgpu.barrier_wait(q_here)
        of_warpgroup = products.of_warpgroup(weights, part)

        def visit(masked, n, carry):
            slot = lax.rem(n - first, jnp.int32(STAGES))
            plgpu.barrier_wait(here.at[slot])
            scores = products.product(q_tile.at[products.nought(n)], k_tiles.at[slot].transpose((1, 0)))
            mask = None
            if masked:
                plgpu.barrier_wait(index_here.at[slot])
                mask = seen(q_index, index_tiles.at[slot], options, scores.shape, queries=0)
            peak, total, out = carry
            peak, total, fading, rounded = softmax_step(options, scores, mask, peak, total, q.dtype)
            out = out * products.along_lines(fading, out.shape)
            out = products.added(out, rounded, k_tiles.at[slot, :, columns], of_warpgroup)
            plgpu.barrier_arrive(free.at[slot])
            return peak, total, out

        carry = lax.fori_loop(first, middle, functools.partial(visit, False), start(half))
        carry = lax.fori_loop(middle, last, functools.partial(visit, True), carry)
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        out, logs = finished(carry)
        result_tiles[part] = out.astype(q.dtype)
        if part == 0:
            sums[...] = logs
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result_tiles.at[part], o.at[split, row, lines, head, columns])
        if part == 0:
            plgpu.copy_smem_to_gmem(sums, logsumexp.at[split, row, head, lines])
        plgpu.wait_smem_to_gmem(0)

    for part in range(WARPGROUPS):
        pl.when(warpgroup == part)(functools.partial(compute, part))

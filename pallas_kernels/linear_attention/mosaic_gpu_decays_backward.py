"""The gradients of `mosaic_gpu_decays.decayed`: of keys, queries, log decays and bonus, chunk by chunk.

For every level, with q and k decayed to the middle of their group, q' and k', and the pairs P that part there,

    dq' = (P * d scores) k'      dk' = (P * d scores)^T q'      d sums = q' dq' + k' dk'

where the sums are those of log decays that have decayed q or k, and go back to these by the transposed table.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.linear_attention.mosaic_gpu_decays import (
    DIAGONAL,
    LEVELS,
    SINCE,
    UNTIL,
    chunks_of_warpgroup,
    decays,
    pairs_only,
    split_in_parts,
    sums_and_pairs,
)
from pallas_kernels.linear_attention.mosaic_gpu_tables import CHUNK
from pallas_kernels.mosaic_gpu_states import COMPILER

WARPGROUPS = 2
SLICE = 32  # of K: what a warpgroup sums up of 64 does not fit its registers
SHAPE = CHUNK, SLICE


def gradients(scale: float, exclusive: bool, q, k, log_decay, bonus, d_scores, d_reading, d_writing, d_log_total):
    """dq and dk `[B, T, H, K]` in q's dtype, d log decay `[B, T, H, K]` and d bonus `[H, K]` in float32.

    d_log_total: float32 `[B, n, H, K]`, of the sum of a chunk's log decays as far as it is the state's decay.
    """
    batch, length, heads, width = log_decay.shape
    count, slices, dtype = -(-length // CHUNK), width // SLICE, q.dtype
    sums, pairs = sums_and_pairs(exclusive)
    per = chunks_of_warpgroup(WARPGROUPS, batch * heads, count)
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=64)
    each = WARPGROUPS, *SHAPE
    transforms = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
    scratch = dict(
        sums=matrix(LEVELS + 2, CHUNK, CHUNK),
        pairs=plgpu.SMEM(pairs.shape, jnp.float32),
        bonus_tile=plgpu.SMEM((width,), jnp.float32),
        q_tiles=matrix(*each),
        k_tiles=matrix(*each),
        # Once the log decays are in parts, the cotangents of reading and writing take their place.
        decays_or_cotangents=[
            plgpu.RefUnion(plgpu.SMEM((1, *SHAPE), jnp.float32, transforms=transforms), matrix(1, 2, *SHAPE))
            for _ in range(WARPGROUPS)
        ],
        score_tiles=matrix(WARPGROUPS, CHUNK, CHUNK),
        parts=matrix(WARPGROUPS, 2, *SHAPE),
        decayed=matrix(WARPGROUPS, 2, *SHAPE),
        weights=matrix(WARPGROUPS, CHUNK, CHUNK),
        own_here=plgpu.Barrier(num_arrivals=3),
        here=plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
        cotangents_here=plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
    )

    def linear_attention_decays_backward(*references):
        def block(**scratch):
            _block(scale, heads // q.shape[2], per, *references, **scratch)

        pl.run_scoped(block, **scratch, collective_axes="warpgroup")

    tokens = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    run = plgpu.kernel(
        linear_attention_decays_backward,
        out_type=[
            tokens,
            tokens,
            jax.ShapeDtypeStruct((batch, count, CHUNK, heads, slices, SLICE), jnp.float32),
            jax.ShapeDtypeStruct((batch, count, heads, slices, SLICE), jnp.float32),
        ],
        grid=(batch, -(-count // (WARPGROUPS * per)), heads),
        grid_names=("row", "part", "head"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    tables = jnp.asarray(sums, dtype), jnp.asarray(pairs)
    d_log_total = d_log_total.reshape(batch, count, heads, slices, SLICE)
    first = jnp.zeros(1, jnp.int32)  # of all loops: what the compiler knows to be 0, it takes out of them
    dq, dk, d_log_decay, d_bonus = run(
        first, *tables, q, k, log_decay, bonus, d_scores, d_reading, d_writing, d_log_total
    )
    d_log_decay = d_log_decay.reshape(batch, -1, heads, width)[:, :length]
    return dq, dk, d_log_decay, d_bonus.sum(axis=(0, 1)).reshape(heads, width)


def _block(
    scale, group, per, first, sums_all, pairs_all, q, k, log_decay, bonus, d_scores, d_reading, d_writing, d_log_total,
    dq, dk, d_log_decay, d_bonus, *, sums, pairs, bonus_tile, q_tiles, k_tiles, decays_or_cotangents, score_tiles,
    parts, decayed, weights, own_here, here, cotangents_here,
):  # fmt: skip
    row, part, head, warpgroup = (lax.axis_index(name) for name in ("row", "part", "head", "warpgroup"))
    count, slices, dtype = d_scores.shape[1], q.shape[3] // SLICE, q.dtype

    @pl.when(warpgroup == 0)
    def _():
        plgpu.copy_gmem_to_smem(sums_all, sums, own_here)
        plgpu.copy_gmem_to_smem(pairs_all, pairs, own_here)
        plgpu.copy_gmem_to_smem(bonus.at[head], bonus_tile, own_here)

    def compute(me):  # which warpgroup: known when traced, since it is where operands begin
        start = (part * WARPGROUPS + me) * per + first[0]
        stop = jnp.minimum(start + per, count)
        kv_head = lax.div(head, jnp.int32(group))

        def load(tile):
            return plgpu.load(tile, layout=products.MATRIX).astype(jnp.float32)

        def of_slice(chunk, slice, _):
            lines, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(slice * SLICE, SLICE)
            place = row, lines, head, columns
            my = me + products.nought(slice)  # were it known, the addresses of all tiles would stay in registers
            decay_tile, cotangent_tiles = (tile.at[products.nought(slice)] for tile in decays_or_cotangents[me])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.copy_gmem_to_smem(q.at[row, lines, kv_head, columns], q_tiles.at[my], here.at[my])
            plgpu.copy_gmem_to_smem(k.at[row, lines, kv_head, columns], k_tiles.at[my], here.at[my])
            plgpu.copy_gmem_to_smem(log_decay.at[place], decay_tile, here.at[my])
            plgpu.copy_gmem_to_smem(d_scores.at[row, chunk, head], score_tiles.at[my], here.at[my])
            plgpu.barrier_wait(here.at[my])
            split_in_parts(plgpu.load(decay_tile, layout=products.MATRIX), parts.at[my])
            plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(d_reading.at[place], cotangent_tiles.at[0], cotangents_here.at[my])
            plgpu.copy_gmem_to_smem(d_writing.at[place], cotangent_tiles.at[1], cotangents_here.at[my])

            def add_sums(my, level, d_gates, d_sums):
                split_in_parts(d_sums, decayed.at[my])
                plgpu.commit_smem()
                table = sums.at[level].transpose((1, 0))
                return products.added_all(d_gates, [(table, decayed.at[my, i]) for i in range(2)], None)

            def of_level(level, carry):
                d_queries, d_keys, d_gates = carry
                my = me + products.nought(level)
                decay = decays(level, sums, parts.at[my])
                queries, keys = load(q_tiles.at[my]) * decay * scale, load(k_tiles.at[my]) * decay
                decayed.at[my, 0][...] = queries.astype(dtype)
                decayed.at[my, 1][...] = keys.astype(dtype)
                scores = plgpu.load(score_tiles.at[my], layout=products.MATRIX)
                weights.at[my][...] = pairs_only(pairs, level, scores, 0)
                plgpu.commit_smem()
                of_queries = products.product(weights.at[my], decayed.at[my, 1])
                of_keys = products.product(weights.at[my].transpose((1, 0)), decayed.at[my, 0])
                d_queries = d_queries + of_queries * decay
                d_keys = d_keys + of_keys * decay
                queries, keys = load(q_tiles.at[my]) * scale, load(k_tiles.at[my])
                d_sums = (queries * of_queries + keys * of_keys) * decay
                return d_queries, d_keys, add_sums(my, level, d_gates, d_sums)

            zero = products.zeros(*SHAPE)
            d_queries, d_keys, d_gates = lax.fori_loop(first[0], LEVELS, of_level, (zero, zero, zero))

            plgpu.barrier_wait(cotangents_here.at[my])
            my = me + pairs[DIAGONAL, 0, 0].astype(jnp.int32)  # 0, but not known to be before
            queries, keys = load(q_tiles.at[my]) * scale, load(k_tiles.at[my])
            cotangent = load(cotangent_tiles.at[0]) * decays(SINCE, sums, parts.at[my])
            d_queries = d_queries + cotangent
            d_gates = add_sums(my, SINCE, d_gates, cotangent * queries)
            cotangent = load(cotangent_tiles.at[1]) * decays(UNTIL, sums, parts.at[my])
            d_keys = d_keys + cotangent
            d_gates = add_sums(my, UNTIL, d_gates, cotangent * keys)
            of_total = plgpu.load(d_log_total.at[row, chunk, head, slice], layout=products.PER_COLUMN)
            d_log_decay[row, chunk, :, head, slice] = d_gates + products.along_columns(of_total, SHAPE)

            own = products.along_lines(pairs_only(pairs, DIAGONAL, load(score_tiles.at[my]), 0).sum(axis=1), SHAPE)
            d_bonus[row, chunk, head, slice] = (own * queries * keys).sum(axis=0)
            of_bonus = plgpu.load(bonus_tile.at[pl.ds(slice * SLICE, SLICE)], layout=products.PER_COLUMN)
            own = own * products.along_columns(of_bonus, SHAPE)
            decayed.at[my, 0][...] = ((d_queries + own * keys) * scale).astype(dtype)
            decayed.at[my, 1][...] = (d_keys + own * queries).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(decayed.at[my, 0], dq.at[place])
            plgpu.copy_smem_to_gmem(decayed.at[my, 1], dk.at[place])

        def of_chunk(chunk, _):
            lax.fori_loop(first[0], slices, functools.partial(of_slice, chunk), None)

        @pl.when(start < stop)
        def _():
            plgpu.barrier_wait(own_here)
            lax.fori_loop(start, stop, of_chunk, None)
            plgpu.wait_smem_to_gmem(0)

    for me in range(WARPGROUPS):
        pl.when(warpgroup == me)(functools.partial(compute, me))

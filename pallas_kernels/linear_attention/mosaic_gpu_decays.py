"""What a decay for each key channel makes of the keys and queries of a chunk, by a kernel for Hopper.

With G_i the sum of the log decays of a chunk's tokens 1..i,

    scores_ij = scale q_i diag(exp(G_i - G_j)) k_j for j < i
    reading_i = scale q_i exp(G_i)        writing_j = k_j exp(G_C - G_j)

and scores_ii = scale q_i diag(bonus) k_i; with a bonus, G_{i-1} stands for the G_i of the token that reads. Every pair
of tokens parts at the middle of the smallest aligned half, quarter, ... of the chunk that holds both (see
`vector_decay`): for each of these six levels there is one product of all queries, decayed since the middle of their
group, with all keys, decayed until then, of which a mask takes the pairs that part there. No exponent is above 0, nor a
difference of sums.

The sums of log decays are themselves products, of tables of zeros and ones with log decays in two 16-bit parts, which
lose what is below 2^-17 of each: less than a hundredth of what rounding the decayed operand loses.

Each of two warpgroups goes through chunks of its own; the tables are there once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.linear_attention.mosaic_gpu_tables import CHUNK
from pallas_kernels.linear_attention.vector_decay import block_tables
from pallas_kernels.mosaic_gpu_states import COMPILER

WARPGROUPS = 2
CHUNKS = 8  # of a warpgroup, at most
SLICE = 64  # of K
LEVELS = CHUNK.bit_length() - 1
SINCE, UNTIL, DIAGONAL = LEVELS, LEVELS + 1, LEVELS  # rows of the sums, and of the pairs
SQUARE = CHUNK, SLICE


@functools.cache
def sums_and_pairs(exclusive: bool) -> tuple[np.ndarray, np.ndarray]:
    """0/1 `[LEVELS + 2, C, C]`: which log decays to sum for each token; and `[LEVELS + 1, 2, C]`: numbers of tokens as
    they read and as they are read, equal for the pairs that part at the level; last, for a token and itself."""
    sums, _ = block_tables(CHUNK, exclusive)
    t = np.arange(CHUNK)
    groups, second = [t >> level + 1 for level in range(LEVELS)], [(t >> level & 1) > 0 for level in range(LEVELS)]
    pairs = [[np.where(s, g, -1), np.where(s, -2, g)] for g, s in zip(groups, second, strict=True)]
    return sums, np.array([*pairs, [t, t]], np.float32)


def decayed(scale: float, exclusive: bool, q, k, log_decay, bonus) -> tuple[jax.Array, ...]:
    """scores `[B, n, H, C, C]`, reading and writing `[B, T, H, K]` in q's dtype, and what remains of the state over a
    chunk, float32 `[B, n, H, K]`.

    q, k: `[B, T, G, K]`. log_decay: float32 `[B, T, H, K]`. bonus: float32 `[H, K]`. T is a multiple of 8 or below.
    """
    batch, length, heads, width = log_decay.shape
    count, dtype = -(-length // CHUNK), q.dtype
    sums, pairs = sums_and_pairs(exclusive)
    per = chunks_of_warpgroup(WARPGROUPS, batch * heads, count)
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=128)
    each = WARPGROUPS, *SQUARE
    transforms = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
    scratch = dict(
        sums=matrix(LEVELS + 2, CHUNK, CHUNK),
        pairs=plgpu.SMEM(pairs.shape, jnp.float32),
        bonus_tile=plgpu.SMEM((width,), jnp.float32),
        q_tiles=matrix(*each),
        k_tiles=matrix(*each),
        decay_tiles=plgpu.SMEM(each, jnp.float32, transforms=transforms),
        parts=matrix(WARPGROUPS, 2, *SQUARE),
        keys=matrix(*each),
        result=matrix(*each),
        left=products.scratch(WARPGROUPS, SLICE, dtype),
        own_here=plgpu.Barrier(num_arrivals=3),
        here=plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
    )

    def linear_attention_decays(*references):
        def block(**scratch):
            _block(scale, heads // q.shape[2], per, *references, **scratch)

        pl.run_scoped(block, **scratch, collective_axes="warpgroup")

    tokens = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    run = plgpu.kernel(
        linear_attention_decays,
        out_type=[
            jax.ShapeDtypeStruct((batch, count, heads, CHUNK, CHUNK), dtype),
            tokens,
            tokens,
            jax.ShapeDtypeStruct((batch, count, heads, width // SLICE, SLICE), jnp.float32),
        ],
        grid=(batch, -(-count // (WARPGROUPS * per)), heads),
        grid_names=("row", "part", "head"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    scores, reading, writing, total = run(jnp.asarray(sums, dtype), jnp.asarray(pairs), q, k, log_decay, bonus)
    return scores, reading, writing, total.reshape(batch, count, heads, width)


def _block(
    scale, group, per, sums_all, pairs_all, q, k, log_decay, bonus, scores, reading, writing, total, *, sums, pairs,
    bonus_tile, q_tiles, k_tiles, decay_tiles, parts, keys, result, left, own_here, here,
):  # fmt: skip
    row, part, head, warpgroup = (lax.axis_index(name) for name in ("row", "part", "head", "warpgroup"))
    count, slices, dtype = scores.shape[1], q.shape[3] // SLICE, q.dtype

    @pl.when(warpgroup == 0)
    def _():
        plgpu.copy_gmem_to_smem(sums_all, sums, own_here)
        plgpu.copy_gmem_to_smem(pairs_all, pairs, own_here)
        plgpu.copy_gmem_to_smem(bonus.at[head], bonus_tile, own_here)

    def compute(me):  # which warpgroup: known when traced, since it is where operands begin
        start = (part * WARPGROUPS + me) * per
        stop = jnp.minimum(start + per, count)
        barrier, of_warpgroup = here.at[me], products.of_warpgroup(left, me)
        keys_tile, result_tile = keys.at[me], result.at[me]

        def fetch(chunk, slice):
            lines, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(slice * SLICE, SLICE)
            kv_head = lax.div(head, jnp.int32(group))
            plgpu.copy_gmem_to_smem(q.at[row, lines, kv_head, columns], q_tiles.at[me], barrier)
            plgpu.copy_gmem_to_smem(k.at[row, lines, kv_head, columns], k_tiles.at[me], barrier)
            plgpu.copy_gmem_to_smem(log_decay.at[row, lines, head, columns], decay_tiles.at[me], barrier)

        def write(x, place):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            result_tile[...] = x.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result_tile, place)

        def of_slice(chunk, slice, carry):
            sum, own = carry
            plgpu.barrier_wait(barrier)
            queries, old = (plgpu.load(tiles.at[me], layout=products.MATRIX) for tiles in (q_tiles, k_tiles))
            gates = plgpu.load(decay_tiles.at[me], layout=products.MATRIX)
            split_in_parts(gates, parts.at[me])
            total[row, chunk, head, slice] = jnp.exp(gates.sum(axis=0))
            plgpu.commit_smem()
            follows = slice + 1 < slices
            pl.when(follows | (chunk + 1 < stop))(
                lambda: fetch(jnp.where(follows, chunk, chunk + 1), jnp.where(follows, slice + 1, 0))
            )
            queries, old = queries.astype(jnp.float32) * scale, old.astype(jnp.float32)
            of_bonus = plgpu.load(bonus_tile.at[pl.ds(slice * SLICE, SLICE)], layout=products.PER_COLUMN)
            own = own + (queries * old * products.along_columns(of_bonus, SQUARE)).sum(axis=1)

            def of_level(level, sum):
                decay = decays(level, sums, parts.at[me])
                keys_tile[...] = (old * decay).astype(dtype)
                plgpu.commit_smem()
                zero, left = products.zeros(CHUNK, CHUNK), (queries * decay).astype(dtype)
                product = products.added(zero, left, keys_tile.transpose((1, 0)), of_warpgroup)
                return sum + pairs_only(pairs, level, product, 0)

            sum = lax.fori_loop(0, LEVELS, of_level, sum)
            lines, columns = pl.ds(chunk * CHUNK, CHUNK), pl.ds(slice * SLICE, SLICE)
            write(queries * decays(SINCE, sums, parts.at[me]), reading.at[row, lines, head, columns])
            write(old * decays(UNTIL, sums, parts.at[me]), writing.at[row, lines, head, columns])
            return sum, own

        def of_chunk(chunk, _):
            carry = products.zeros(CHUNK, CHUNK), products.zeros(CHUNK, layout=products.PER_LINE)
            sum, own = lax.fori_loop(0, slices, functools.partial(of_slice, chunk), carry)
            sum = sum + pairs_only(pairs, DIAGONAL, products.along_lines(own, sum.shape), 0)
            write(sum, scores.at[row, chunk, head])

        @pl.when(start < stop)
        def _():
            fetch(start, 0)
            plgpu.barrier_wait(own_here)
            lax.fori_loop(start, stop, of_chunk, None)
            plgpu.wait_smem_to_gmem(0)

    for me in range(WARPGROUPS):
        pl.when(warpgroup == me)(functools.partial(compute, me))


def chunks_of_warpgroup(warpgroups: int, heads: int, count: int) -> int:
    """How many of `count` chunks a warpgroup goes through: several, that share the tables, where the chip is busy."""
    return next(n for n in range(min(CHUNKS, count), 0, -1) if n == 1 or heads * count >= warpgroups * 132 * n)


def split_in_parts(x: jax.Array, parts: Any) -> None:
    """float32 x as a sum of two 16-bit parts, `[2, ...]` in shared memory."""
    coarse = x.astype(parts.dtype)
    parts.at[0][...] = coarse
    parts.at[1][...] = (x - coarse.astype(jnp.float32)).astype(parts.dtype)


def decays(i: Any, sums: Any, parts: Any) -> jax.Array:
    """The exponentials of the sums of table i."""
    zero = products.zeros(*parts.shape[-2:])
    return jnp.exp(products.added_all(zero, [(sums.at[i], parts.at[n]) for n in range(2)], None))


def pairs_only(pairs: Any, level: Any, x: jax.Array, queries: int) -> jax.Array:
    """x where two tokens part at the level, else 0; queries: the axis of those that read."""
    rows = plgpu.load(pairs.at[level, queries], layout=products.PER_LINE)
    columns = plgpu.load(pairs.at[level, 1 - queries], layout=products.PER_COLUMN)
    same = products.along_lines(rows, x.shape) == products.along_columns(columns, x.shape)
    return jnp.where(same, x, jnp.zeros((), x.dtype))

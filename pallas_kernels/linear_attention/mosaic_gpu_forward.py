"""Outputs under scalar decay from the states before the chunks, all chunks at once: the forward kernel for Hopper.

    o_i = scale q_i (since_i S_c) + scale sum_{j <= i} between_ij (q_i k_j) v_j

A block has one chunk of one group of heads, and goes through the group's heads and their values slice by slice: q, k
and their products are read and made once. The next slices are on their way while one is computed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.linear_attention.mosaic_gpu_tables import (
    CHUNK,
    FIRST,
    LAST,
    OWN,
    READING,
    ROWS,
    SINCE,
    SUMS,
    Tables,
)
from pallas_kernels.mosaic_gpu_states import COMPILER

SLICE = 64  # of V
STAGES = 2  # slices in flight
BLOCKS = 4 * 132  # as many are asked for: four for each multiprocessor of an H100 SXM or an H200
SQUARE = CHUNK, CHUNK


@dataclasses.dataclass(frozen=True)
class Items:
    """What a block goes through: of `group` heads that share keys, `slices` slices of values each, in `parts` parts,
    each of which is a block's."""

    group: int
    slices: int
    parts: int

    @property
    def of_part(self) -> int:
        return self.group * self.slices // self.parts

    def place(self, kv_head: Any, part: Any, step: Any) -> tuple[Any, Any]:
        """Head and slice."""
        item = part * self.of_part + step
        return kv_head * self.group + lax.div(item, jnp.int32(self.slices)), lax.rem(item, jnp.int32(self.slices))


def split(count: int, blocks: int, wanted: int) -> int:
    """The least divisor of `count` that makes at least as many blocks as wanted; all of it if there is none."""
    return next((n for n in range(1, count) if count % n == 0 and n * blocks >= wanted), count)


def outputs(scale: float, q, k, v, tables: Tables, before: jax.Array) -> jax.Array:
    """o `[B, T, H, V]`."""
    batch, _, groups, width = q.shape
    heads, value_width, dtype = v.shape[2], v.shape[3], q.dtype
    count, group, slices = before.shape[1], heads // groups, value_width // SLICE
    items = Items(group, slices, split(group * slices, batch * count * groups, BLOCKS))
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=128)
    scratch = dict(
        q_tile=matrix(CHUNK, width),
        k_tile=matrix(CHUNK, width),
        state_tiles=matrix(STAGES, width, SLICE),
        v_tiles=matrix(STAGES, CHUNK, SLICE),
        token_tiles=plgpu.SMEM((STAGES, ROWS, CHUNK), jnp.float32),
        result=matrix(CHUNK, SLICE),
        weights=products.scratch(1, CHUNK, dtype),
        own_here=plgpu.Barrier(num_arrivals=2),
        here=plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
    )

    def linear_attention_outputs(*references):
        pl.run_scoped(functools.partial(_block, scale, items, *references), **scratch)

    run = plgpu.kernel(
        linear_attention_outputs,
        out_type=jax.ShapeDtypeStruct(v.shape, dtype),
        grid=(batch, count, groups * items.parts),
        grid_names=("row", "chunk", "kv_head and part"),
        compiler_params=COMPILER,
    )
    return run(q, k, v, tables.tokens, before)


def _block(
    scale, items, q, k, v, tokens, before, o, *, q_tile, k_tile, state_tiles, v_tiles, token_tiles, result, weights,
    own_here, here,
):  # fmt: skip
    row, chunk = (lax.axis_index(name) for name in ("row", "chunk"))
    kv_head, part = products.both_of("kv_head and part", items.parts)
    lines = pl.ds(chunk * CHUNK, CHUNK)

    def fetch(step):
        slot = lax.rem(step, jnp.int32(STAGES))
        head, slice = items.place(kv_head, part, step)
        columns = pl.ds(slice * SLICE, SLICE)
        plgpu.copy_gmem_to_smem(before.at[row, chunk, head, :, columns], state_tiles.at[slot], here.at[slot])
        plgpu.copy_gmem_to_smem(v.at[row, lines, head, columns], v_tiles.at[slot], here.at[slot])
        plgpu.copy_gmem_to_smem(tokens.at[row, head, :, lines], token_tiles.at[slot], here.at[slot])

    plgpu.copy_gmem_to_smem(q.at[row, lines, kv_head], q_tile, own_here)
    plgpu.copy_gmem_to_smem(k.at[row, lines, kv_head], k_tile, own_here)
    for step in range(min(STAGES, items.of_part)):
        fetch(jnp.int32(step))
    plgpu.barrier_wait(own_here)
    scores = products.product(q_tile, k_tile.transpose((1, 0))) * scale

    def visit(step, _):
        slot = lax.rem(step, jnp.int32(STAGES))
        head, slice = items.place(kv_head, part, step)
        plgpu.barrier_wait(here.at[slot])

        def body(sum):
            plgpu.wgmma(sum, q_tile, state_tiles.at[slot])
            return (scores * between(token_tiles.at[slot], queries=0)).astype(result.dtype), sum[...]

        weighted, of_state = pl.run_scoped(body, plgpu.ACC((CHUNK, SLICE), jnp.float32))
        since = plgpu.load(token_tiles.at[slot, SINCE], layout=products.PER_LINE) * scale
        out = of_state * products.along_lines(since, of_state.shape)
        out = products.added(out, weighted, v_tiles.at[slot], products.of_warpgroup(weights, 0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        result[...] = out.astype(result.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, o.at[row, lines, head, pl.ds(slice * SLICE, SLICE)])
        # all have read the tokens: they met when they committed the result
        pl.when(step + STAGES < items.of_part)(lambda: fetch(step + STAGES))

    lax.fori_loop(0, items.of_part, visit, None)
    plgpu.wait_smem_to_gmem(0)


def between(tokens: Any, queries: int) -> jax.Array:
    """The decays from token to token of a chunk, from the rows of `tokens` in shared memory; 0 where there are none.

    queries: the axis of the tokens that read.
    """
    coarse, fine = (row(tokens, i, queries) - row(tokens, j, 1 - queries) for i, j in zip(READING, SUMS, strict=True))
    return jnp.exp(jnp.where(reads(tokens, queries), coarse + fine, -jnp.inf))


def reads(tokens: Any, queries: int, strictly: bool = False) -> jax.Array:
    """Whether a token of a chunk reads another; strictly: and so does the one before it."""
    own, last = row(tokens, OWN, 1 - queries), row(tokens, LAST, queries)
    return (own >= row(tokens, FIRST, queries)) & (own < last if strictly else own <= last)


def row(tokens: Any, i: int, axis: int) -> jax.Array:
    """Row i of `tokens`, which lie along this axis of a square."""
    layout = (products.PER_LINE, products.PER_COLUMN)[axis]
    return lax.broadcast_in_dim(plgpu.load(tokens.at[i], layout=layout), SQUARE, [axis])

"""Products of the chunks of linear attention with a decay for each key channel, all chunks at once, for Hopper GPUs.

A block has one chunk of one head and goes through its values slice by slice; the next slices are on their way while one
is computed.
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

SLICE = 64  # of V
STAGES = 2  # slices in flight


def read(keys, scores, values, states, transposed: bool = False) -> jax.Array:
    """`keys_c states_c + scores_c values_c` for every chunk c, or with scores_c^T: `[B, T, H, V]` in the dtype of all.

    keys: `[B, T, H, K]`; scores: `[B, n, H, C, C]`; values: `[B, T, H, V]`; states: `[B, n, H, K, V]`.
    """
    batch, count, heads, width, value_width = states.shape
    matrix = functools.partial(products.matrix, dtype=values.dtype, swizzle=128)
    slices = value_width // SLICE
    scratch = dict(
        key_tile=matrix(CHUNK, width),
        score_tile=matrix(CHUNK, CHUNK),
        state_tiles=matrix(STAGES, width, SLICE),
        value_tiles=matrix(STAGES, CHUNK, SLICE),
        result=matrix(CHUNK, SLICE),
        own_here=plgpu.Barrier(num_arrivals=2),
        here=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    )

    def linear_attention_read(*references):
        pl.run_scoped(functools.partial(_block, transposed, slices, *references), **scratch)

    run = plgpu.kernel(
        linear_attention_read,
        out_type=jax.ShapeDtypeStruct(values.shape, values.dtype),
        grid=(batch, count, heads),
        grid_names=("row", "chunk", "head"),
        compiler_params=COMPILER,
    )
    return run(keys, scores, values, states)


def _block(
    transposed, slices, keys, scores, values, states, out, *, key_tile, score_tile, state_tiles, value_tiles, result,
    own_here, here,
):  # fmt: skip
    row, chunk, head = (lax.axis_index(name) for name in ("row", "chunk", "head"))
    lines = pl.ds(chunk * CHUNK, CHUNK)

    def fetch(slice):
        slot, columns = lax.rem(slice, jnp.int32(STAGES)), pl.ds(slice * SLICE, SLICE)
        plgpu.copy_gmem_to_smem(states.at[row, chunk, head, :, columns], state_tiles.at[slot], here.at[slot])
        plgpu.copy_gmem_to_smem(values.at[row, lines, head, columns], value_tiles.at[slot], here.at[slot])

    plgpu.copy_gmem_to_smem(keys.at[row, lines, head], key_tile, own_here)
    plgpu.copy_gmem_to_smem(scores.at[row, chunk, head], score_tile, own_here)
    for slice in range(min(STAGES, slices)):
        fetch(jnp.int32(slice))
    plgpu.barrier_wait(own_here)
    weights = score_tile.transpose((1, 0)) if transposed else score_tile

    def visit(slice, _):
        slot = lax.rem(slice, jnp.int32(STAGES))
        plgpu.barrier_wait(here.at[slot])
        terms = [(key_tile, state_tiles.at[slot]), (weights, value_tiles.at[slot])]
        sum = products.added_all(products.zeros(CHUNK, SLICE), terms, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        result[...] = sum.astype(result.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, out.at[row, lines, head, pl.ds(slice * SLICE, SLICE)])
        pl.when(slice + STAGES < slices)(lambda: fetch(slice + STAGES))

    lax.fori_loop(0, slices, visit, None)
    plgpu.wait_smem_to_gmem(0)

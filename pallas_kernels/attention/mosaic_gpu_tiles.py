"""What the kernels read of documents, positions and lists of tiles: arrays in global memory, and masks of one tile."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import tiles
from pallas_kernels.attention.options import Options
from pallas_kernels.mosaic_gpu_products import PER_COLUMN, PER_LINE, along_columns, along_lines


class Visits(NamedTuple):
    """All of the index that a kernel reads; the first axis is 1 where all rows are alike.

    q_index, kv_index: int32 `[rows, 2, tokens]`, documents and positions, filled up to whole tiles. A key of padding
        has a document that no query has.
    tiles: int32 `[rows, outer, inner]`, the inner tiles of each outer tile. counts: int32 `[rows, outer, 2]`: so many
        at the front of its list need no mask, so many are to be visited at all.
    """

    q_index: jax.Array
    kv_index: jax.Array
    tiles: jax.Array
    counts: jax.Array


def visits(index: tiles.Index, options: Options, queries: int, keys: int, by_query: bool) -> Visits:
    """For tiles of so many queries and keys; outer tiles are those of queries if `by_query`, else those of keys."""
    cut = index.cut(queries, keys, options.block_size)
    band = tiles.Band(options.causal, options.window)
    order = jax.vmap(lambda row: tiles.schedule(row, band, by_query=by_query))(cut)
    nobody = jnp.iinfo(jnp.int32).min
    kv_documents = jnp.where(cut.kv_documents == 0, nobody, cut.kv_documents)
    rows = cut.documents.shape[0]
    return Visits(
        q_index=jnp.stack([a.reshape(rows, -1) for a in (cut.documents, cut.positions)], axis=1),
        kv_index=jnp.stack([a.reshape(rows, -1) for a in (kv_documents, cut.kv_positions)], axis=1),
        tiles=order.tiles,
        counts=jnp.stack([order.unmasked, order.visited], axis=2),
    )


def seen(q_index: Any, kv_index: Any, options: Options, shape: tuple[int, int], queries: int) -> jax.Array:
    """Whether each query sees each key of a tile, from `[2, tokens]` in shared memory; `queries`: the axis they are."""
    spread = (along_lines, along_columns)
    layouts = (PER_LINE, PER_COLUMN)

    def read(reference, what, axis, shift=0):
        return spread[axis](plgpu.load(reference.at[what], layout=layouts[axis]) + shift, shape)

    mask = read(q_index, 0, queries) == read(kv_index, 0, 1 - queries)
    if options.causal:
        mask &= read(q_index, 1, queries) >= read(kv_index, 1, 1 - queries)
    if options.window is not None:
        mask &= read(q_index, 1, queries, -options.window) < read(kv_index, 1, 1 - queries)
    return mask

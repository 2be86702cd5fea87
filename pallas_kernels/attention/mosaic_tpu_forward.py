"""The forward of attention on a TPU: an outer tile of queries, and the tiles of keys that it sees streamed past it.

Rows of scores are lines (sublanes) here and keys are columns (lanes). What belongs to a row is kept as `[rows, 128]`,
alike in all lanes, so that no lane is ever broadcast; the sum of a row is kept as 128 partial sums, one for each lane,
and added up once at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu_rules import (
    LANES,
    NEVER,
    VMEM_LIMIT,
    across_lanes,
    in_main_memory,
    row_of,
    spread,
)
from pallas_kernels.attention.mosaic_tpu_stream import Stream


def forward(rules, plans, queries, keys, values, query_index, key_index, slopes, in_stages, across=False):
    """Returns o `[B, G, outer, rows, V]` and the log-sum-exp (base 2), float32 `[B, G, outer, 1, rows]`.

    rules: what the kernel is specialised for. plans: of `mosaic_tpu_stream`. queries: `[B, G, outer, rows, K]`. keys,
    values: `[B, G, tiles, C, .]`; values None: the first `rules.value_width` channels of the keys. query_index,
    key_index: int32 `[B or 1, outer, 2, rows]` and `[B or 1, tiles, 2, C]`, of documents and positions. slopes:
    `[G, 1, rows]` or None. in_stages: whether to compute the scores of the next half of a tile's rows and the values of
    the last one beside the softmax of each: for matrix units that would wait else. across: whether keys and values are
    `[B, G, ., tiles x C]`.
    """
    batch, kv_heads, outer, rows, width = queries.shape
    tile, value_width, dtype = key_index.shape[3], rules.value_width, queries.dtype

    slots, halves = (4, 2) if in_stages else (2, 1)
    plan_row, index_row = row_of(plans, batch), row_of(query_index, batch)
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    plan_spec = pl.BlockSpec(
        (None, None, 1, plans.shape[3]), lambda b, g, i: (plan_row(b), i, 0, 0), memory_space=pltpu.SMEM
    )
    shape = lambda width: (width, tile) if across else (tile, width)
    of_head = lambda b, g, i: (b, g, i, 0, 0)
    return pl.pallas_call(
        functools.partial(_kernel, rules, halves, across),
        grid=(batch, kv_heads, outer),
        in_specs=[
            plan_spec,
            pl.BlockSpec((None, None, None, rows, width), of_head),
            whole,
            None if values is None else whole,
            pl.BlockSpec((None, None, 2, rows), lambda b, g, i: (index_row(b), i, 0, 0)),
            whole,
            None if slopes is None else pl.BlockSpec((None, 1, rows), lambda b, g, i: (g, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, rows, value_width), of_head),
            pl.BlockSpec((None, None, None, 1, rows), of_head),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, outer, rows, value_width), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, outer, 1, rows), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((slots, *shape(width)), dtype),
            None if values is None else pltpu.VMEM((slots, *shape(value_width)), dtype),
            pltpu.VMEM((slots, 2, tile), jnp.int32),
            pltpu.SemaphoreType.DMA((slots, 3)),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, value_width), jnp.float32),
            pltpu.VMEM((2, rows, LANES), jnp.int32),
            pltpu.VMEM((rows, tile), jnp.float32),
            pltpu.VMEM((rows, tile), dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"attention_forward_{rows}_{tile}",
    )(plans, queries, *map(in_main_memory, (keys, values)), query_index, in_main_memory(key_index), slopes)


def _kernel(
    rules, halves, across, plan, q, keys, values, query_index, key_index, slopes, o, logsumexp,
    key_buffer, value_buffer, index_buffer, arrivals, slot, peak, kept, total, out, columns, scores, weights,
):  # fmt: skip
    b, g, i = (pl.program_id(axis) for axis in range(3))
    sources, buffers = [keys.at[b, g], key_index.at[b if key_index.shape[0] > 1 else 0]], [key_buffer, index_buffer]
    if values is not None:
        sources, buffers = [*sources, values.at[b, g]], [*buffers, value_buffer]
    stream = Stream(plan, tuple(sources), tuple(buffers), arrivals, slot)

    peak[...] = jnp.full_like(peak, NEVER)
    total[...] = jnp.zeros_like(total)
    out[...] = jnp.zeros_like(out)
    if rules.by_document:
        columns[0] = across_lanes(query_index[0:1])
    columns[1] = across_lanes(query_index[1:2])
    slope = None if slopes is None else across_lanes(slopes[...])

    def part(half):
        rows = q.shape[0] // halves
        return slice(half * rows, (half + 1) * rows)

    def value_tile(slot):
        if values is not None:
            return value_buffer[slot]
        return key_buffer[slot][: rules.value_width] if across else key_buffer[slot][:, : rules.value_width]

    def score(masked, slot, half):
        rows = part(half)
        computed = rules.scores(rules.product(q[rows], key_buffer[slot], (1, 0) if across else (1, 1)))[0]
        of_keys = index_buffer[slot]
        position, kv_position = spread(columns[1, rows], computed), of_keys[1:2]
        if slopes is not None:
            computed -= rules.bias(spread(slope[rows], computed), position, kv_position)
        if masked:
            document = spread(columns[0, rows], computed) if rules.by_document else None
            computed = jnp.where(rules.seen(document, of_keys[0:1], position, kv_position), computed, -jnp.inf)
        scores[rows] = computed

    def soften(half):
        rows = part(half)
        before = peak[rows]
        now = jnp.maximum(before, scores[rows].max(axis=1, keepdims=True))
        peak[rows] = now
        # What was gathered shrinks in a step of its own: in one expression with what is added, the compiler spills.
        kept[rows] = jnp.exp2(before - now)
        out[rows] *= spread(kept[rows], out)
        weighed = jnp.exp2(scores[rows] - spread(now, scores))
        total[rows] = total[rows] * kept[rows] + _fold(weighed)
        weights[rows] = weighed.astype(weights.dtype)

    def gather(slot, half):
        rows = part(half)
        out[rows] += rules.product(weights[rows], value_tile(slot), (1, 1) if across else (1, 0))

    def visit(masked, n, slot):
        score(masked, slot, 0)
        soften(0)
        gather(slot, 0)

    if halves == 1:
        stream.walk(i == 0, visit)
    else:
        weights[part(1)] = jnp.zeros_like(weights[part(1)])
        stream.walk_in_stages(i == 0, score, soften, gather)

    total[...] = jnp.broadcast_to(total[...].sum(axis=1, keepdims=True), total.shape)
    kept[...] = jnp.where(total[...] > 0, 1 / total[...], 0)
    logsumexp[...] = jnp.where(total[...] > 0, peak[...] + jnp.log2(total[...]), -jnp.inf).T[0:1]
    o[...] = (out[...] * spread(kept[...], out)).astype(o.dtype)


def _fold(x):
    """`[rows, n 128]` to `[rows, 128]` by sums."""
    return functools.reduce(jnp.add, (x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)))

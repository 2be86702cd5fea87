"""The backward of attention on a TPU: an outer tile of keys, and the tiles of queries that see it streamed past it.

One pass makes all three gradients with five matrix products to a tile. Keys are lines (sublanes) here and the rows of
queries are columns (lanes): then four of the products need no transposition, and what belongs to a row of queries is
one vector of lanes. dk and dv of the outer tile gather in fast memory. dq lies in main memory as float32: each visit
reads the tile's part, adds to it and writes it back, in the order of the grid, so that sums are the same in every run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu_rules import LANES, VMEM_LIMIT, across_lanes, row_of, spread
from pallas_kernels.attention.mosaic_tpu_stream import Stream


def backward(rules, plans, queries, keys, values, query_index, key_index, cotangents, statistics, slopes):
    """Returns dq, float32 `[B, G, tiles, rows, K]`, dk and dv like keys and values (dv None where values are None).

    cotangents: of o, `[B, G, tiles, rows, V]`. statistics: float32 `[B, G, tiles, 2, rows]`: the log-sum-exp (base 2;
    large where nothing is seen), and sum(o do) less the cotangent of the log-sum-exp. The rest as in `forward`, but
    that plans have a row for each tile of keys.
    """
    batch, kv_heads, tiles, rows, width = queries.shape
    outer, tile, value_width = keys.shape[2], keys.shape[3], rules.value_width
    plan_row, index_row = row_of(plans, batch), row_of(key_index, batch)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    plan_spec = pl.BlockSpec(
        (None, None, 1, plans.shape[3]), lambda b, g, i: (plan_row(b), i, 0, 0), memory_space=pltpu.SMEM
    )

    def of_tile(*block):
        return pl.BlockSpec((None, None, None, *block), lambda b, g, j: (b, g, j, 0, 0))

    of_keys = of_tile(tile, width)
    of_values = None if values is None else of_tile(tile, value_width)
    like_values = None if values is None else jax.ShapeDtypeStruct(values.shape, values.dtype)
    arguments = [
        (plans, plan_spec),
        (keys, of_keys),
        (values, of_values),
        (key_index, pl.BlockSpec((None, None, 2, tile), lambda b, g, j: (index_row(b), j, 0, 0))),
        (slopes, None if slopes is None else pl.BlockSpec((None, 1, rows), lambda b, g, j: (g, 0, 0))),
        (queries, whole),
        (cotangents, whole),
        (statistics, whole),
        (query_index, whole),
        (jnp.zeros(queries.shape, jnp.float32), whole),
    ]  # fmt: skip
    present = sum(array is not None for array, _ in arguments)
    return pl.pallas_call(
        functools.partial(_kernel, rules),
        grid=(batch, kv_heads, outer),
        in_specs=[spec for _, spec in arguments],
        out_specs=[whole, of_keys, of_values],
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, jnp.float32), jax.ShapeDtypeStruct(keys.shape, keys.dtype), like_values,
        ],
        input_output_aliases={present - 1: 0},
        scratch_shapes=[
            pltpu.VMEM((2, rows, width), queries.dtype),
            pltpu.VMEM((2, rows, value_width), queries.dtype),
            pltpu.VMEM((2, 2, rows), jnp.float32),
            pltpu.VMEM((2, 2, rows), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 4)),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((3, rows, width), jnp.float32),
            pltpu.SemaphoreType.DMA((3, 2)),
            pltpu.VMEM((tile, width), jnp.float32),
            pltpu.VMEM((tile, value_width), jnp.float32),
            pltpu.VMEM((2, tile, LANES), jnp.int32),
            pltpu.VMEM((tile, rows), jnp.float32),
            pltpu.VMEM((tile, rows), queries.dtype),
            pltpu.VMEM((tile, rows), queries.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"attention_backward_{rows}_{tile}",
    )(*(array for array, _ in arguments))  # fmt: skip


def _kernel(
    rules, plan, keys, values, key_index, slopes, queries, cotangents, statistics, query_index, _,
    dq, dk_out, dv_out,
    query_buffer, cotangent_buffer, statistic_buffer, index_buffer, arrivals, slot,
    dq_buffer, dq_moves, dk, dv, columns, weights, rounded, dscores,
):  # fmt: skip
    b, g, j = (pl.program_id(axis) for axis in range(3))
    index_row = b if query_index.shape[0] > 1 else 0
    stream = Stream(
        plan,
        (queries.at[b, g], cotangents.at[b, g], statistics.at[b, g], query_index.at[index_row]),
        (query_buffer, cotangent_buffer, statistic_buffer, index_buffer),
        arrivals,
        slot,
    )
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)
    if rules.by_document:
        columns[0] = across_lanes(key_index[0:1])
    columns[1] = across_lanes(key_index[1:2])

    # Three places for dq: one is added to, one is on its way in, one on its way out.
    def dq_read(n):
        return pltpu.make_async_copy(dq.at[b, g, stream.tile(n)], dq_buffer.at[n % 3], dq_moves.at[n % 3, 0])

    def dq_write(n):
        return pltpu.make_async_copy(dq_buffer.at[n % 3], dq.at[b, g, stream.tile(n)], dq_moves.at[n % 3, 1])

    @pl.when(stream.visited > 0)
    def _():
        dq_read(0).start()

    def visit(masked, n, slot):
        @pl.when(n >= 2)
        def _():
            dq_write(n - 2).wait()

        @pl.when(n + 1 < stream.visited)
        def _():
            dq_read(n + 1).start()

        dq_read(n).wait()
        q, do, k = query_buffer[slot], cotangent_buffer[slot], keys[...]
        v = k[:, : rules.value_width] if values is None else values[...]
        logsumexp, product = statistic_buffer[slot, 0:1], statistic_buffer[slot, 1:2]
        scores, bend = rules.scores(rules.product(k, q, (1, 1)))
        document, position = index_buffer[slot, 0:1], index_buffer[slot, 1:2]
        kv_position = spread(columns[1], scores)
        if slopes is not None:
            scores -= rules.bias(slopes[...], position, kv_position)
        weighed = jnp.exp2(scores - logsumexp)
        if masked:
            kv_document = spread(columns[0], scores) if rules.by_document else None
            weighed = jnp.where(rules.seen(document, kv_document, position, kv_position), weighed, 0)
        weights[...] = weighed if bend is None else weighed * bend
        rounded[...] = weighed.astype(rounded.dtype)
        dv[...] += rules.product(rounded[...], do, (1, 0))
        dscores[...] = (weights[...] * (rules.product(v, do, (1, 1)) - product)).astype(dscores.dtype)
        dk[...] += rules.product(dscores[...], q, (1, 0))
        dq_buffer[n % 3] += rules.product(dscores[...], k, (0, 0))
        dq_write(n).start()

    stream.walk(j == 0, visit)

    dk_out[...] = (dk[...] * rules.scale).astype(dk_out.dtype)
    if values is None:
        both = dk[:, : rules.value_width] * rules.scale + dv[...]
        dk_out[:, : rules.value_width] = both.astype(dk_out.dtype)
    else:
        dv_out[...] = dv[...].astype(dv_out.dtype)

    # The next outer tile may begin with a tile of dq that this one has ended with.
    for n in (stream.visited - 2, stream.visited - 1):
        @pl.when(n >= 0)
        def _(n=n):
            dq_write(n).wait()

"""The backward of attention on a TPU: an outer tile of keys, and the tiles of queries that see it streamed past it.

One pass makes all three gradients with five matrix products to a pair of tiles: the first two make the weights and the
derivatives of scores, the other three take them up while the first two of the next pair are made, so that matrix units
do not wait. Keys are lines (sublanes) here and the rows of queries are columns (lanes): what belongs to a row of
queries is one vector of lanes.

dk and dv of the outer tile gather in fast memory, and dq of a tile of queries does while that is visited. dq lies in
main memory as float32: each outer tile reads the part, adds to it and writes it back, in the order of the grid, so that
sums are the same in every run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu_pairs import Pairs
from pallas_kernels.attention.mosaic_tpu_rules import LANES, VMEM_LIMIT, across_lanes, in_main_memory, row_of, spread
from pallas_kernels.attention.mosaic_tpu_stream import Stream

SLOTS = 4  # a power of two. Of dq: one is added to, one on its way in, two on their way out.


def backward(rules, turned, together, plans, queries, keys, values, query_index, key_index, do, statistics, slopes):
    """Returns dq, float32 `[B, G, tiles, K, rows]`, dk and dv like keys and values (dv None where values are None).

    turned: whether dk and dv gather as `[K, C]`, so that their products have a tile's keys for columns, and not the
    channels: for matrix units wider than those. together: tiles of keys in an outer tile, a power of two. plans: of
    `mosaic_tpu_pairs`. do: `[B, G, tiles, rows, V]`. statistics: float32 `[B, G, tiles, 2, rows]`: the log-sum-exp
    (base 2; large where nothing is seen), and sum(o do) less its cotangent. The rest as in `forward`.
    """
    batch, kv_heads, tiles, rows, width = queries.shape
    tile, value_width = keys.shape[3], rules.value_width
    pages = plans.shape[1] // pl.cdiv(keys.shape[2], together)
    plan_row, index_row = row_of(plans, batch), row_of(key_index, batch)
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    plan_spec = pl.BlockSpec(
        (None, None, 1, plans.shape[3]), lambda b, g, j: (plan_row(b), j, 0, 0), memory_space=pltpu.SMEM
    )

    def of_tiles(*block):
        return pl.BlockSpec((None, None, together, *block), lambda b, g, j: (b, g, j // pages, 0, 0))

    def sums(width):
        return pltpu.VMEM((together, width, tile) if turned else (together, tile, width), jnp.float32)

    def if_turned(*shape):
        return pltpu.VMEM(shape, queries.dtype) if turned else None

    of_keys = of_tiles(tile, width)
    of_values = None if values is None else of_tiles(tile, value_width)
    like_values = None if values is None else jax.ShapeDtypeStruct(values.shape, values.dtype)
    dq = jax.ShapeDtypeStruct((batch, kv_heads, tiles, width, rows), jnp.float32)
    arguments = [
        (plans, plan_spec),
        (keys, of_keys),
        (values, of_values),
        (key_index, pl.BlockSpec((None, together, 2, tile), lambda b, g, j: (index_row(b), j // pages, 0, 0))),
        (slopes, None if slopes is None else pl.BlockSpec((None, 1, rows), lambda b, g, j: (g, 0, 0))),
        (queries, whole),
        (do, whole),
        (statistics, whole),
        (query_index, whole),
        (jnp.zeros(dq.shape, dq.dtype), whole),
    ]  # fmt: skip
    present = sum(array is not None for array, _ in arguments)
    return pl.pallas_call(
        functools.partial(_kernel, rules, turned, pages),
        grid=(batch, kv_heads, plans.shape[1]),
        in_specs=[spec for _, spec in arguments],
        out_specs=[whole, of_keys, of_values],
        out_shape=[dq, jax.ShapeDtypeStruct(keys.shape, keys.dtype), like_values],
        input_output_aliases={present - 1: 0},
        scratch_shapes=[
            pltpu.VMEM((SLOTS, rows, width), queries.dtype),
            pltpu.VMEM((SLOTS, rows, value_width), queries.dtype),
            pltpu.VMEM((SLOTS, 2, rows), jnp.float32),
            pltpu.VMEM((SLOTS, 2, rows), jnp.int32),
            pltpu.SemaphoreType.DMA((SLOTS, 4)),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((SLOTS, width, rows), jnp.float32),
            pltpu.SemaphoreType.DMA((SLOTS, 2)),
            if_turned(SLOTS, width, rows),
            if_turned(SLOTS, value_width, rows),
            pltpu.VMEM((together, width, tile), keys.dtype),
            sums(width),
            sums(value_width),
            pltpu.VMEM((2 if rules.by_document else 1, together, tile, LANES), jnp.int32),
            pltpu.VMEM((tile, rows), jnp.float32),
            pltpu.VMEM((2, tile, rows), queries.dtype),
            pltpu.VMEM((2, tile, rows), queries.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"attention_backward_{rows}_{tile}_{together}",
    )(*(in_main_memory(array) if spec is whole else array for array, spec in arguments))  # fmt: skip


def _kernel(
    rules, turned, pages, plan, keys, values, key_index, slopes, queries, cotangents, statistics, query_index, _,
    dq, dk_out, dv_out,
    query_buffer, cotangent_buffer, statistic_buffer, index_buffer, arrivals, slot,
    dq_buffer, dq_moves, turned_queries, turned_cotangents, turned_keys, dk, dv, columns, unrounded, weights, dscores,
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
    stream.begin(j == 0)
    together, runs, first_slot = keys.shape[0], stream.visited, slot[0]
    pairs = Pairs(plan, together)

    def place(run):
        return (first_slot + run) & (SLOTS - 1)

    def dq_read(run):
        at = run & (SLOTS - 1)
        return pltpu.make_async_copy(dq.at[b, g, stream.tile(run)], dq_buffer.at[at], dq_moves.at[at, 0])

    def dq_write(run):
        at = run & (SLOTS - 1)
        return pltpu.make_async_copy(dq_buffer.at[at], dq.at[b, g, stream.tile(run)], dq_moves.at[at, 1])

    def begin(run):
        """The last pair of the run before has not been gathered yet."""
        stream.fetch(run + 1, place(run + 1))
        pl.when(run > 1)(lambda: dq_write(run - 2).start())
        pl.when(run > 2)(lambda: dq_write(run - 3).wait())
        pl.when(run + 1 < runs)(lambda: dq_read(run + 1).start())
        here = place(run)
        stream.wait(run, here)
        if turned:
            turned_queries[here] = query_buffer[here].T
            turned_cotangents[here] = cotangent_buffer[here].T
        dq_read(run).wait()

    of_queries, of_cotangents = (turned_queries, turned_cotangents) if turned else (query_buffer, cotangent_buffer)

    def with_rows(lines, rows):
        return rules.product(lines, rows, (1, 0 if turned else 1))

    def soften(n, buffer):
        run, tile = pairs[n]
        here, k = place(run), keys[tile]
        v = k[:, : rules.value_width] if values is None else values[tile]
        scores, bend = rules.scores(with_rows(k, of_queries[here]))
        document, position = index_buffer[here, 0:1], index_buffer[here, 1:2]
        kv_document, kv_position = (spread(columns[kind, tile], scores) for kind in (0, columns.shape[0] - 1))
        if slopes is not None:
            scores -= rules.bias(slopes[...], position, kv_position)
        weighed = jnp.exp2(scores - statistic_buffer[here, 0:1])
        weighed = jnp.where(rules.seen(document, kv_document, position, kv_position), weighed, 0)
        weights[buffer] = weighed.astype(weights.dtype)
        unrounded[...] = weighed if bend is None else weighed * bend
        of_scores = unrounded[...] * (with_rows(v, of_cotangents[here]) - statistic_buffer[here, 1:2])
        dscores[buffer] = of_scores.astype(dscores.dtype)

    def gather(n, buffer):
        run, tile = pairs[n]
        here = place(run)

        def add(sums, weights, rows):
            sums[tile] += rules.product(rows, weights, (1, 1)) if turned else rules.product(weights, rows, (1, 0))

        add(dv, weights[buffer], of_cotangents[here])
        add(dk, dscores[buffer], of_queries[here])
        dq_buffer[run & (SLOTS - 1)] += rules.product(turned_keys[tile], dscores[buffer], (1, 0))

    def prepare(tile, _):
        dk[tile] = jnp.zeros_like(dk[tile])
        dv[tile] = jnp.zeros_like(dv[tile])
        turned_keys[tile] = keys[tile].T
        for kind in range(columns.shape[0]):
            row = kind + 2 - columns.shape[0]
            columns[kind, tile] = across_lanes(key_index[tile, row : row + 1])

    def finish(tile, _):
        def result(sums):
            rounded = sums.astype(dk_out.dtype)
            return rounded.T if turned else rounded

        of_keys, channels = dk[tile] * rules.scale, slice(0, rules.value_width)
        dk_out[tile] = result(of_keys)
        if values is None:
            dk_out[tile, :, channels] = result((of_keys[channels] if turned else of_keys[:, channels]) + dv[tile])
        else:
            dv_out[tile] = result(dv[tile])

    def for_each_tile(page, body):
        """Of keys, with this page."""

        def loop():
            jax.lax.fori_loop(0, together, body, None)

        loop() if pages == 1 else pl.when(j % pages == page)(loop)

    pl.when(runs > 0)(lambda: dq_read(0).start())
    for_each_tile(0, prepare)
    pairs.walk(begin, soften, gather)
    for back in (2, 1):
        pl.when(runs >= back)(lambda back=back: dq_write(runs - back).start())
    slot[0] = place(runs)
    for_each_tile(pages - 1, finish)
    # The next outer tile may begin with a tile of dq that this one has ended with.
    for back in (3, 2, 1):
        pl.when(runs >= back)(lambda back=back: dq_write(runs - back).wait())

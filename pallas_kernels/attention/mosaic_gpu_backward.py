"""The backward kernels: both recompute a tile's weights from the log-sum-exp (FlashAttention-2, arXiv 2307.08691).

One has a block for each tile of queries and gathers dq over the keys; the other has a block for each tile of keys and
gathers dk and dv over the queries of all heads that share them. Each result is written by one block, in one order:
they are the same in every run. The price is that scores and d weights are computed twice.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.attention.mosaic_gpu_forward import COMPILER, capped
from pallas_kernels.attention.mosaic_gpu_tiles import Visits, seen
from pallas_kernels.attention.options import Options

WARPGROUPS = 2  # that compute, beside the one that fetches
OUTER = WARPGROUPS * products.LINES  # tokens of a block's own tile

@dataclasses.dataclass(frozen=True)
class Plan:
    """inner: tokens of the tiles that a block visits. stages: how many of them are in flight. swizzle: in bytes."""

    inner: int
    stages: int
    swizzle: int


def backward_queries(plan: Plan, options: Options, q, k, v, do, statistics, visits: Visits) -> jax.Array:
    """dq `[B, T, H, K]`, from what `statistics` holds for each query: log-sum-exp in base 2 (+inf where it sees
    nothing) and sum(o do) - d logsumexp, float32 `[B, H, 2, T filled up]`."""
    batch, _, heads, width = q.shape
    value_width, dtype = v.shape[3], q.dtype
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=plan.swizzle)
    own, visited = (WARPGROUPS, products.LINES), (plan.stages, plan.inner)
    scratch = dict(
        q_tile=matrix(*own, width),
        do_tile=matrix(*own, value_width),
        own_index=plgpu.SMEM((WARPGROUPS, 2, products.LINES), jnp.int32),
        own_statistics=plgpu.SMEM((WARPGROUPS, 2, products.LINES), jnp.float32),
        k_tiles=matrix(*visited, width),
        v_tiles=matrix(*visited, value_width),
        index_tiles=plgpu.SMEM((plan.stages, 2, plan.inner), jnp.int32),
        rounded=products.scratch(WARPGROUPS, plan.inner, dtype),
        own_here=plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
        here=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        index_here=plgpu.Barrier(num_barriers=plan.stages),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.stages),
    )

    def attention_backward_queries(*references):
        pl.run_scoped(
            functools.partial(_queries_block, plan, options, *references), **scratch, collective_axes="warpgroup"
        )

    run = plgpu.kernel(
        attention_backward_queries,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(visits.tiles.shape[1], batch, heads),
        grid_names=("tile", "row", "head"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    return run(q, k, v, do, statistics, *visits)


def _queries_block(
    plan, options, q, k, v, do, statistics, q_index, kv_index, listed, counts, dq, *, q_tile, do_tile, own_index,
    own_statistics, k_tiles, v_tiles, index_tiles, rounded, own_here, here, index_here, free,
):  # fmt: skip
    row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    tile = listed.shape[1] - 1 - lax.axis_index("tile")
    kv_head = lax.div(head, jnp.int32(q.shape[2] // k.shape[2]))
    line = row if listed.shape[0] > 1 else 0
    unmasked, visited = counts[line, tile, 0], counts[line, tile, 1]

    def fetch(masked, n, _):
        slot = lax.rem(n, jnp.int32(plan.stages))
        start = pl.ds(listed[line, tile, n] * plan.inner, plan.inner)
        pl.when(n >= plan.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(k.at[row, start, kv_head], k_tiles.at[slot], here.at[slot])
        plgpu.copy_gmem_to_smem(v.at[row, start, kv_head], v_tiles.at[slot], here.at[slot])
        if masked:
            plgpu.copy_gmem_to_smem(kv_index.at[line, :, start], index_tiles.at[slot], index_here.at[slot])

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _loop(fetch, unmasked, visited, None)
        products.drain(free, plan.stages, 0, visited)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        lines = pl.ds(tile * OUTER + warpgroup * products.LINES, products.LINES)
        own_q, own_do, own_tokens = q_tile.at[warpgroup], do_tile.at[warpgroup], own_index.at[warpgroup]
        barrier = own_here.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[row, lines, head], own_q, barrier)
        plgpu.copy_gmem_to_smem(do.at[row, lines, head], own_do, barrier)
        plgpu.copy_gmem_to_smem(q_index.at[line, :, lines], own_tokens, barrier)
        plgpu.copy_gmem_to_smem(statistics.at[row, head, :, lines], own_statistics.at[warpgroup], barrier)
        plgpu.barrier_wait(barrier)
        logsumexp, product = (
            plgpu.load(own_statistics.at[warpgroup, i], layout=products.PER_LINE) for i in range(2)
        )
        of_warpgroup = products.of_warpgroup(rounded, warpgroup)

        def visit(masked, n, out):
            slot = lax.rem(n, jnp.int32(plan.stages))
            plgpu.barrier_wait(here.at[slot])

            def weigh(scores):
                mask = None
                if masked:
                    plgpu.barrier_wait(index_here.at[slot])
                    mask = seen(own_tokens, index_tiles.at[slot], options, scores.shape, queries=0)
                return _weights(options, scores, mask, products.along_lines(logsumexp, scores.shape))[1]

            own = warpgroup + products.nought(n)
            bent, dweights = products.two_products(
                (q_tile.at[own], k_tiles.at[slot].transpose((1, 0))),
                (do_tile.at[own], v_tiles.at[slot].transpose((1, 0))),
                weigh,
            )
            dscores = bent * (dweights - products.along_lines(product, bent.shape))
            out = products.added(out, dscores.astype(q.dtype), k_tiles.at[slot], of_warpgroup)
            plgpu.barrier_arrive(free.at[slot])
            return out

        out = _loop(visit, unmasked, visited, products.zeros(products.LINES, q.shape[3]))
        own_q[...] = (out * options.scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, dq.at[row, lines, head])
        plgpu.wait_smem_to_gmem(0)


def backward_keys(
    plan: Plan, options: Options, wanted: tuple[str, ...], q, k, v, do, statistics, visits: Visits
) -> list[jax.Array]:
    """Those of dk `[B, S, G, K]` ("k") and dv `[B, S, G, V]` ("v") that are wanted, in that order: where heads are
    wide, a warpgroup's registers do not hold both."""
    batch, _, _, width = q.shape
    kv_heads, value_width, dtype = k.shape[2], v.shape[3], q.dtype
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=plan.swizzle)
    own, visited = (WARPGROUPS, products.LINES), (plan.stages, plan.inner)
    scratch = dict(
        k_tile=matrix(*own, width),
        v_tile=matrix(*own, value_width),
        own_index=plgpu.SMEM((WARPGROUPS, 2, products.LINES), jnp.int32),
        q_tiles=matrix(*visited, width),
        do_tiles=matrix(*visited, value_width),
        statistics_tiles=plgpu.SMEM((plan.stages, 2, plan.inner), jnp.float32),
        index_tiles=plgpu.SMEM((plan.stages, 2, plan.inner), jnp.int32),
        rounded=products.scratch(WARPGROUPS, plan.inner, dtype),
        own_here=plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
        here=plgpu.Barrier(num_arrivals=3, num_barriers=plan.stages),
        index_here=plgpu.Barrier(num_barriers=plan.stages),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=plan.stages),
    )

    def attention_backward_keys(*references):
        pl.run_scoped(
            functools.partial(_keys_block, plan, options, wanted, *references), **scratch, collective_axes="warpgroup"
        )

    run = plgpu.kernel(
        attention_backward_keys,
        out_type=[jax.ShapeDtypeStruct({"k": k, "v": v}[name].shape, dtype) for name in wanted],
        # The first tiles of keys, which most queries see if causal, go first.
        grid=(visits.tiles.shape[1], batch, kv_heads),
        grid_names=("tile", "row", "kv_head"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    return run(q, k, v, do, statistics, *visits)


def _keys_block(
    plan, options, wanted, q, k, v, do, statistics, q_index, kv_index, listed, counts, *results, k_tile, v_tile,
    own_index, q_tiles, do_tiles, statistics_tiles, index_tiles, rounded, own_here, here, index_here, free,
):  # fmt: skip
    row, kv_head, warpgroup, tile = (lax.axis_index(name) for name in ("row", "kv_head", "warpgroup", "tile"))
    group = q.shape[2] // k.shape[2]
    line = row if listed.shape[0] > 1 else 0
    unmasked, visited = counts[line, tile, 0], counts[line, tile, 1]

    def fetch(member, masked, n, _):
        step = member * visited + n
        slot, head = lax.rem(step, jnp.int32(plan.stages)), kv_head * group + member
        start = pl.ds(listed[line, tile, n] * plan.inner, plan.inner)
        pl.when(step >= plan.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(q.at[row, start, head], q_tiles.at[slot], here.at[slot])
        plgpu.copy_gmem_to_smem(do.at[row, start, head], do_tiles.at[slot], here.at[slot])
        plgpu.copy_gmem_to_smem(statistics.at[row, head, :, start], statistics_tiles.at[slot], here.at[slot])
        if masked:
            plgpu.copy_gmem_to_smem(q_index.at[line, :, start], index_tiles.at[slot], index_here.at[slot])

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        def of_member(member, _):
            _loop(functools.partial(fetch, member), unmasked, visited, None)

        lax.fori_loop(0, group, of_member, None)
        products.drain(free, plan.stages, 0, group * visited)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        lines = pl.ds(tile * OUTER + warpgroup * products.LINES, products.LINES)
        own_k, own_tokens = k_tile.at[warpgroup], own_index.at[warpgroup]
        barrier = own_here.at[warpgroup]
        plgpu.copy_gmem_to_smem(k.at[row, lines, kv_head], own_k, barrier)
        plgpu.copy_gmem_to_smem(kv_index.at[line, :, lines], own_tokens, barrier)
        plgpu.copy_gmem_to_smem(v.at[row, lines, kv_head], v_tile.at[warpgroup], barrier)
        plgpu.barrier_wait(barrier)
        of_warpgroup = products.of_warpgroup(rounded, warpgroup)

        def visit(masked, step, sums):
            slot = lax.rem(step, jnp.int32(plan.stages))
            plgpu.barrier_wait(here.at[slot])

            def read(i):
                column = plgpu.load(statistics_tiles.at[slot, i], layout=products.PER_COLUMN)
                return products.along_columns(column, (products.LINES, plan.inner))

            def weigh(scores):
                mask = None
                if masked:
                    plgpu.barrier_wait(index_here.at[slot])
                    mask = seen(index_tiles.at[slot], own_tokens, options, scores.shape, queries=1)
                weights, bent = _weights(options, scores, mask, read(0))
                return {"v": weights, "k": bent} if "v" in wanted else {"k": bent}

            own = warpgroup + products.nought(step)
            of_scores = k_tile.at[own], q_tiles.at[slot].transpose((1, 0))
            if "k" in wanted:
                of_weights = v_tile.at[own], do_tiles.at[slot].transpose((1, 0))
                weights, dweights = products.two_products(of_scores, of_weights, weigh)
            else:
                weights = weigh(products.product(*of_scores))
            sums = dict(sums)
            if "v" in wanted:
                sums["v"] = products.added(sums["v"], weights["v"].astype(q.dtype), do_tiles.at[slot], of_warpgroup)
            if "k" in wanted:
                dscores = weights["k"] * (dweights - read(1))
                sums["k"] = products.added(sums["k"], dscores.astype(q.dtype), q_tiles.at[slot], of_warpgroup)
            plgpu.barrier_arrive(free.at[slot])
            return sums

        widths = {"k": k.shape[3], "v": v.shape[3]}
        sums = {name: products.zeros(products.LINES, widths[name]) for name in wanted}

        def of_member(member, sums):
            return _loop(lambda masked, n, sums: visit(masked, member * visited + n, sums), unmasked, visited, sums)

        sums = lax.fori_loop(0, group, of_member, sums)
        if "k" in wanted:
            sums["k"] *= options.scale
        for name, result in zip(wanted, results, strict=True):
            staged = {"k": k_tile, "v": v_tile}[name].at[warpgroup]
            staged[...] = sums[name].astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, result.at[row, lines, kv_head])
        plgpu.wait_smem_to_gmem(0)


def _loop(visit, unmasked, visited, carry):
    carry = lax.fori_loop(0, unmasked, functools.partial(visit, False), carry)
    return lax.fori_loop(unmasked, visited, functools.partial(visit, True), carry)


def _weights(options, scores, mask, logsumexp):
    """A tile's weights, and these times the derivative of the capped scores in those before the cap."""
    scores, scale = capped(scores, options)
    weights = jnp.exp2(scores * scale - logsumexp)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return weights, weights if options.soft_cap is None else weights * (1 - scores * scores)

"""The forward kernel: one block for each tile of queries, a warp that fetches, warpgroups that compute.

Two warpgroups of 64 queries take turns with the tensor cores (FlashAttention-3, arXiv 2407.08608, section 3.1). At
width 128 a turn of 128 keys is 1,024 cycles of the tensor cores (4 x 64 x 128 x 128 operations, 4,096 a cycle). The
softmax beside it takes 512 cycles of the unit for exponentials (64 x 128, 16 a cycle) and some 540 instructions of
each warp, less than the other's turn: the tensor cores need not wait. Narrower heads are bound by the exponentials.
None of this was measured: no GPU was to be had.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.attention.mosaic_gpu_tiles import Visits, seen
from pallas_kernels.attention.options import Options

NEVER = -1e30  # below every score, yet finite, so that a row that has seen nothing gives no NaN
LOG2_E = math.log2(math.e)
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


@dataclasses.dataclass(frozen=True)
class Plan:
    """warpgroups: how many compute, 64 queries each. keys: of a tile. stages: tiles in flight. splits: of the keys."""

    warpgroups: int
    keys: int
    stages: int
    splits: int = 1

    @property
    def queries(self) -> int:
        return self.warpgroups * products.LINES

    def part(self, counts, line, tile, split) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a list of tiles, those of one split: where they begin, where those to be masked begin, where they end."""
        unmasked, visited = counts[line, tile, 0], counts[line, tile, 1]
        first = lax.div(visited * split, jnp.int32(self.splits))
        last = lax.div(visited * (split + 1), jnp.int32(self.splits))
        return first, jnp.clip(unmasked, first, last), last


def forward(plan: Plan, options: Options, q, k, v, visits: Visits) -> tuple[jax.Array, jax.Array]:
    """o `[splits, B, T, H, V]` in q's dtype and logsumexp `[splits, B, H, query tiles x queries]`, base 2, +inf where
    nothing is seen."""
    batch, length, heads, width = q.shape
    value_width = options.value_width if v is None else v.shape[3]
    v = k if v is None else v
    tiles = visits.tiles.shape[1]
    dtype, swizzle = q.dtype, products.swizzle(width, value_width)
    scratch = dict(
        q_tile=products.matrix(plan.warpgroups, products.LINES, width, dtype=dtype, swizzle=swizzle),
        k_tiles=products.matrix(plan.stages, plan.keys, width, dtype=dtype, swizzle=swizzle),
        v_tiles=products.matrix(plan.stages, plan.keys, value_width, dtype=dtype, swizzle=swizzle),
        index_tiles=plgpu.SMEM((plan.stages, 2, plan.keys), jnp.int32),
        q_index=plgpu.SMEM((plan.warpgroups, 2, products.LINES), jnp.int32),
        sums=plgpu.SMEM((plan.warpgroups, products.LINES), jnp.float32),
        weights=products.scratch(plan.warpgroups, plan.keys, dtype),
        q_here=plgpu.Barrier(num_arrivals=2, num_barriers=plan.warpgroups),
        k_here=plgpu.Barrier(num_barriers=plan.stages),
        v_here=plgpu.Barrier(num_barriers=plan.stages),
        index_here=plgpu.Barrier(num_barriers=plan.stages),
        k_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        v_free=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        turns=plgpu.Barrier(num_barriers=plan.warpgroups),
        done=plgpu.Barrier(num_arrivals=plan.warpgroups),
    )

    def attention_forward(*references):
        pl.run_scoped(
            functools.partial(_block, plan, options, *references), **scratch, collective_axes="warpgroup"
        )

    padded = tiles * plan.queries
    run = plgpu.kernel(
        attention_forward,
        out_type=[
            jax.ShapeDtypeStruct((plan.splits, batch, length, heads, value_width), dtype),
            jax.ShapeDtypeStruct((plan.splits, batch, heads, padded), jnp.float32),
        ],
        # The last axis runs fastest: heads that share keys follow one another. The last tiles, which see most keys if
        # causal, go first.
        grid=(tiles, batch, plan.splits, heads),
        grid_names=("tile", "row", "split", "head"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    o, logsumexp = run(q, k, v, *visits)
    return o, logsumexp


def _block(
    plan, options, q, k, v, q_index_all, kv_index, listed, counts, o, logsumexp, *, q_tile, k_tiles, v_tiles,
    index_tiles, q_index, sums, weights, q_here, k_here, v_here, index_here, k_free, v_free, turns, done,
):  # fmt: skip
    row, head, split, warpgroup = (lax.axis_index(name) for name in ("row", "head", "split", "warpgroup"))
    tile = listed.shape[1] - 1 - lax.axis_index("tile")
    kv_head = lax.div(head, jnp.int32(q.shape[2] // k.shape[2]))
    line = row if listed.shape[0] > 1 else 0  # of the index, which has one where all rows are alike
    width, value_width = q.shape[3], o.shape[4]

    first, middle, last = plan.part(counts, line, tile, split)
    middle = jnp.maximum(middle, first + 1)  # the first tile is masked in any case, so that there is one code for it

    @pl.when(warpgroup == plan.warpgroups)
    def fetch():
        if plan.warpgroups > 1:
            plgpu.set_max_registers(24, action="decrease")

        def fetch_tile(masked, n, _):
            slot = lax.rem(n - first, jnp.int32(plan.stages))
            again = n - first >= plan.stages
            keys = pl.ds(listed[line, tile, n] * plan.keys, plan.keys)
            pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
            plgpu.copy_gmem_to_smem(k.at[row, keys, kv_head], k_tiles.at[slot], k_here.at[slot])
            pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
            values = v.at[row, keys, kv_head, pl.ds(0, value_width)]
            plgpu.copy_gmem_to_smem(values, v_tiles.at[slot], v_here.at[slot])
            if masked:  # after the wait for the values: they are what is given back last
                plgpu.copy_gmem_to_smem(kv_index.at[line, :, keys], index_tiles.at[slot], index_here.at[slot])

        pl.when(first < last)(lambda: fetch_tile(True, first, None))
        lax.fori_loop(first + 1, middle, functools.partial(fetch_tile, False), None)
        lax.fori_loop(middle, last, functools.partial(fetch_tile, True), None)
        products.drain(k_free, plan.stages, first, last)
        products.drain(v_free, plan.stages, first, last)

    @pl.when(warpgroup < plan.warpgroups)
    def compute():
        if plan.warpgroups > 1:
            plgpu.set_max_registers(240, action="increase")
        lines = pl.ds(tile * plan.queries + warpgroup * products.LINES, products.LINES)
        own, own_index = q_tile.at[warpgroup], q_index.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[row, lines, head], own, q_here.at[warpgroup])
        plgpu.copy_gmem_to_smem(q_index_all.at[line, :, lines], own_index, q_here.at[warpgroup])
        plgpu.barrier_wait(q_here.at[warpgroup])
        of_warpgroup = products.of_warpgroup(weights, warpgroup)

        def wait_for_turn():
            """The warpgroups take turns with the tensor cores: one computes its softmax while the other multiplies."""
            if plan.warpgroups > 1:
                plgpu.barrier_wait(turns.at[warpgroup])

        def pass_turn():
            if plan.warpgroups > 1:
                plgpu.barrier_arrive(turns.at[1 - warpgroup])

        def slot_of(n):
            return lax.rem(n - first, jnp.int32(plan.stages))

        def visit(masked, n, carry):
            """The values of the tile before, whose weights are carried, and the scores of tile n: what the tensor cores
            are given at a time is as much as can be."""
            peak, total, out, weights = carry
            slot, slot_before = slot_of(n), slot_of(n - 1)
            plgpu.barrier_wait(v_here.at[slot_before])
            plgpu.barrier_wait(k_here.at[slot])
            wait_for_turn()
            out, scores = products.added_and_product(
                out,
                (weights, v_tiles.at[slot_before]),
                (own, k_tiles.at[slot].transpose((1, 0))),
                of_warpgroup,
                pass_turn,
            )
            plgpu.barrier_arrive(v_free.at[slot_before])
            peak, total, fading, weights = weigh(masked, slot, peak, total, scores)
            return peak, total, out * products.along_lines(fading, out.shape), weights

        def weigh(masked, slot, peak, total, scores):
            plgpu.barrier_arrive(k_free.at[slot])
            mask = None
            if masked:
                plgpu.barrier_wait(index_here.at[slot])
                mask = seen(own_index, index_tiles.at[slot], options, scores.shape, queries=0)
            return softmax_step(options, scores, mask, peak, total, q.dtype)

        def visit_all(_):
            plgpu.barrier_wait(k_here.at[0])
            wait_for_turn()
            scores = products.product(own, k_tiles.at[0].transpose((1, 0)), pass_turn)
            peak, total, out = start(value_width)
            peak, total, _, weights = weigh(True, 0, peak, total, scores)
            carry = peak, total, out, weights
            carry = lax.fori_loop(first + 1, middle, functools.partial(visit, False), carry)
            carry = lax.fori_loop(middle, last, functools.partial(visit, True), carry)
            peak, total, out, weights = carry
            slot = slot_of(last - 1)
            plgpu.barrier_wait(v_here.at[slot])
            out = products.added(out, weights, v_tiles.at[slot], of_warpgroup)
            plgpu.barrier_arrive(v_free.at[slot])
            return peak, total, out

        if plan.warpgroups > 1:
            pl.when(warpgroup == 1)(pass_turn)
        carry = lax.cond(first < last, visit_all, lambda _: start(value_width), None)
        pl.when(warpgroup == 0)(wait_for_turn)  # which the other passed last

        result = own
        if width != value_width:  # a part of the queries' tile cannot be copied: the values' tiles, once all are done
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
            at, keys = warpgroup * products.LINES, jnp.int32(plan.keys)
            result = v_tiles.at[lax.div(at, keys), pl.ds(lax.rem(at, keys), products.LINES)]
        out, logs = finished(carry)
        result[...] = out.astype(q.dtype)
        sums[warpgroup] = logs
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, o.at[split, row, lines, head])
        plgpu.copy_smem_to_gmem(sums.at[warpgroup], logsumexp.at[split, row, head, lines])
        plgpu.wait_smem_to_gmem(0)


def start(value_width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is carried over tiles: each row's greatest exponent, its sum of weights and of weighted values."""
    return (
        products.full(NEVER, products.LINES, layout=products.PER_LINE),
        products.zeros(products.LINES, layout=products.PER_LINE),
        products.zeros(products.LINES, value_width),
    )


def softmax_step(options, scores, mask, peak, total, dtype):
    """The online softmax (arXiv 1805.02867, algorithm 3): the new peak and total, what remains of sums so far, and the
    weights of this tile."""
    scores, scale = capped(scores, options)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
    fading = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(scores * scale - products.along_lines(new_peak, scores.shape))
    total = total * fading + weights.sum(axis=1)
    return new_peak, total, fading, weights.astype(dtype)


def finished(carry) -> tuple[jax.Array, jax.Array]:
    """The output, 0 where nothing is seen, and the log-sum-exp in base 2, +inf there."""
    peak, total, out = carry
    any_seen = total > 0
    total = jnp.where(any_seen, total, 1.0)
    return out * products.along_lines(1 / total, out.shape), jnp.where(any_seen, peak + jnp.log2(total), jnp.inf)


def capped(scores, options):
    """Scores, and what they have to be multiplied with to be exponents of 2."""
    if options.soft_cap is None:
        return scores, options.scale * LOG2_E
    return jnp.tanh(scores * (options.scale / options.soft_cap)), options.soft_cap * LOG2_E

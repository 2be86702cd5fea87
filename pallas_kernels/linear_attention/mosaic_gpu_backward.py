"""Gradients under scalar decay from the states before the chunks and their cotangents: the backward kernel for Hopper.

With D_ij = do_i v_j, dS the cotangent of the state after the chunk, everything of one chunk,

    dq_i = scale sum_j between_ij D_ij k_j + scale since_i do_i S^T
    dk_j = scale sum_i between_ij D_ij q_i + until_j v_j dS^T
    dv_j = scale sum_i between_ij (q_i k_j) do_i + until_j k_j dS
    d since_i = scale sum_v do_iv (q_i S)_v        d until_j = sum_v v_jv (k_j dS)_v        d total = sum dS * S

and the exponent of between_ij, the running sum of i less that of j, has the cotangent scale between_ij (q_i k_j) D_ij.

Two warpgroups work side by side on what a third fetches: one has a query for every line and makes dq, the other has a
key for every line and makes dk and dv. So all weights stay in the registers they were made in; the price is that both
make them. A block goes through the heads that share its keys, or a part of them: then dq and dk are sums of parts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu_products as products
from pallas_kernels.linear_attention.mosaic_gpu_forward import between, reads, split
from pallas_kernels.linear_attention.mosaic_gpu_tables import CHUNK, READING, ROWS, SINCE, SUMS, UNTIL, Tables
from pallas_kernels.mosaic_gpu_states import COMPILER

QUERIES, KEYS, FETCHER = range(3)  # warpgroups
BLOCKS = 132
# Rows of what is written for every token: cotangents of its running sums, as it reads and as it is read, and of decays.
D_READING, D_SUMS, D_SINCE, D_UNTIL = range(4)


@dataclasses.dataclass(frozen=True)
class Plan:
    """slice: of V. heads: of a block, out of `group` that share keys. stages: slices in flight."""

    slice: int
    stages: int
    heads: int
    group: int

    @property
    def swizzle(self) -> int:
        return 2 * self.slice


def gradients(scale: float, q, k, v, tables: Tables, before, after, do) -> tuple[jax.Array, ...]:
    """dq, dk, dv, d tokens and d total, from what the forward pass had and `after`, the states' cotangents."""
    batch, length, groups, width = q.shape
    heads, dtype = v.shape[2], q.dtype
    count, group = before.shape[1], heads // groups
    parts = split(group, batch * count * groups, BLOCKS)
    plan = _plan(width, group // parts, group)
    matrix = functools.partial(products.matrix, dtype=dtype, swizzle=plan.swizzle)
    scratch = dict(
        q_tile=matrix(1, CHUNK, width),
        k_tile=matrix(1, CHUNK, width),
        tiles=dict(
            before=matrix(plan.stages, width, plan.slice),
            after=matrix(plan.stages, width, plan.slice),
            v=matrix(plan.stages, CHUNK, plan.slice),
            do=matrix(plan.stages, CHUNK, plan.slice),
            tokens=plgpu.SMEM((plan.stages, ROWS, CHUNK), jnp.float32),
        ),
        result=matrix(1, CHUNK, plan.slice),
        square=products.scratch(2, CHUNK, dtype),
        lines=products.scratch(2, plan.slice, dtype),
        own_here=plgpu.Barrier(num_arrivals=2),
        here=plgpu.Barrier(num_arrivals=5, num_barriers=plan.stages),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        done=plgpu.Barrier(num_arrivals=2),
    )

    def linear_attention_gradients(*references):
        def block(**scratch):
            _block(plan, scale, *references, **scratch)

        pl.run_scoped(block, **scratch, collective_axes="warpgroup")

    keys = jax.ShapeDtypeStruct(q.shape, dtype)
    if parts > 1:
        keys = jax.ShapeDtypeStruct((parts, batch, count, CHUNK, groups, width), jnp.float32)
    run = plgpu.kernel(
        linear_attention_gradients,
        out_type=[
            keys,
            keys,
            jax.ShapeDtypeStruct(v.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, 4, count, CHUNK), jnp.float32),
            jax.ShapeDtypeStruct((batch, count, heads, width), jnp.float32),
        ],
        grid=(batch, count, groups * parts),
        grid_names=("row", "chunk", "kv_head and part"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    first = jnp.zeros(1, jnp.int32)  # of all loops: what the compiler knows to be 0, it takes out of them
    arrays = [first, q, k, v, tables.tokens, before, after, do]
    dq, dk, dv, of_tokens, d_total = run(*arrays)

    def join(x):
        return x if parts == 1 else x.sum(axis=0).reshape(batch, -1, groups, width)[:, :length].astype(dtype)

    of_tokens = of_tokens.reshape(batch, heads, 4, -1)
    zero = jnp.zeros_like(of_tokens[:, :, 0])
    rows = {READING[1]: D_READING, SUMS[1]: D_SUMS, SINCE: D_SINCE, UNTIL: D_UNTIL}
    d_tokens = jnp.stack([of_tokens[:, :, rows[i]] if i in rows else zero for i in range(ROWS)], axis=2)
    return join(dq), join(dk), dv, d_tokens, d_total.sum(axis=3, keepdims=True)


def _block(
    plan, scale, first, q, k, v, tokens, before, after, do, dq, dk, dv, d_tokens, d_total, *, q_tile, k_tile, tiles,
    result, square, lines, own_here, here, free, done,
):  # fmt: skip
    row, chunk, warpgroup = (lax.axis_index(name) for name in ("row", "chunk", "warpgroup"))
    kv_head, part = products.both_of("kv_head and part", plan.group // plan.heads)
    own = pl.ds(chunk * CHUNK, CHUNK)
    width, slices = q.shape[3], v.shape[3] // plan.slice
    nought = first[0]
    first_head = kv_head * plan.group + part * plan.heads

    def slot_of(step):
        return lax.rem(step, jnp.int32(plan.stages))

    @pl.when(warpgroup == FETCHER)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")
        plgpu.copy_gmem_to_smem(q.at[row, own, kv_head], q_tile.at[0], own_here)
        plgpu.copy_gmem_to_smem(k.at[row, own, kv_head], k_tile.at[0], own_here)

        def fetch_slice(n, i, _):
            step = n * slices + i
            slot, head, columns = slot_of(step), first_head + n, pl.ds(i * plan.slice, plan.slice)
            pl.when(step >= plan.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            parts = dict(
                before=before.at[row, chunk, head, :, columns],
                after=after.at[row, chunk, head, :, columns],
                v=v.at[row, own, head, columns],
                do=do.at[row, own, head, columns],
                tokens=tokens.at[row, head, :, own],
            )
            for name, array in parts.items():
                plgpu.copy_gmem_to_smem(array, tiles[name].at[slot], here.at[slot])

        def fetch_head(n, _):
            lax.fori_loop(0, slices, functools.partial(fetch_slice, n), None)

        lax.fori_loop(0, plan.heads, fetch_head, None)
        products.drain(free, plan.stages, 0, plan.heads * slices)

    def release(slot):
        """What was read in the ordinary way is read before the next copy writes it."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(free.at[slot])

    def of_line(slot, i):
        return plgpu.load(tiles["tokens"].at[slot, i], layout=products.PER_LINE)

    def whole(tile):
        return plgpu.load(tile, layout=products.MATRIX).astype(jnp.float32)

    def scaled(tile, factors, shape):
        return (whole(tile) * products.along_lines(factors, shape)).astype(result.dtype)

    def finish(sum, tile, result):
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
        if plan.heads < plan.group:
            result[part, row, chunk, :, kv_head] = sum
        else:
            tile[...] = sum.astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, result.at[row, own, kv_head])
        plgpu.wait_smem_to_gmem(0)

    shape = CHUNK, plan.slice
    nothing = products.zeros(CHUNK, layout=products.PER_LINE)

    @pl.when(warpgroup == QUERIES)
    def queries():
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(own_here)
        of_square, of_lines = (products.of_warpgroup(x, QUERIES) for x in (square, lines))
        pieces = range(0, width, 64)

        def of_head(n, sum):
            head, at = first_head + n, products.nought(n)

            def of_slice(i, carry):
                sum, weights, d_since, totals = carry
                slot = slot_of(n * slices + i)
                plgpu.barrier_wait(here.at[slot])
                state, cotangent = tiles["before"].at[slot], tiles["do"].at[slot]
                of_state = products.product(q_tile.at[products.nought(i)], state)
                d_since = d_since + (whole(cotangent) * of_state).sum(axis=1)
                new = []
                for start, total in zip(pieces, totals, strict=True):
                    states = (whole(tiles[name].at[slot, pl.ds(start, 64)]) for name in ("before", "after"))
                    new.append(total + (next(states) * next(states)).sum(axis=1))
                since = of_line(slot, SINCE) * scale
                sum = products.added(sum, scaled(cotangent, since, shape), state.transpose((1, 0)), of_lines)
                weights = products.added_all(weights, [(cotangent, tiles["v"].at[slot].transpose((1, 0)))], None)
                pl.when(i < slices - 1)(lambda: release(slot))
                return sum, weights, d_since, tuple(new)

            carry = sum, products.zeros(CHUNK, CHUNK), nothing, tuple(nothing for _ in pieces)
            sum, weights, d_since, totals = lax.fori_loop(nought, slices, of_slice, carry)
            slot = slot_of(n * slices + slices - 1)
            own_tokens, at = tiles["tokens"].at[slot], products.nought(slot)
            weights = weights * between(own_tokens, 0) * scale
            scores = products.product(q_tile.at[at], k_tile.at[at].transpose((1, 0)))
            scores = jnp.where(reads(own_tokens, 0, strictly=True), scores, 0.0)
            d_tokens[row, head, D_READING, chunk] = (weights * scores).sum(axis=1)
            release(slot)
            d_tokens[row, head, D_SINCE, chunk] = d_since * scale
            for start, total in zip(pieces, totals, strict=True):
                d_total[row, chunk, head, pl.ds(start, 64)] = total
            return products.added(sum, weights.astype(result.dtype), k_tile.at[at], of_square)

        sum = lax.fori_loop(nought, plan.heads, of_head, products.zeros(CHUNK, width))
        finish(sum, q_tile.at[0], dq)

    @pl.when(warpgroup == KEYS)
    def keys():
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(own_here)
        of_square, of_lines = (products.of_warpgroup(x, KEYS) for x in (square, lines))

        def of_head(n, sum):
            head, at, slot = first_head + n, products.nought(n), slot_of(n * slices)
            plgpu.barrier_wait(here.at[slot])
            scores = products.product(k_tile.at[at], q_tile.at[at].transpose((1, 0)))
            scores = (scores * between(tiles["tokens"].at[slot], 1) * scale).astype(result.dtype)

            def of_slice(i, carry):
                sum, weights, d_until = carry
                slot = slot_of(n * slices + i)
                pl.when(i > 0)(lambda: plgpu.barrier_wait(here.at[slot]))
                values, state, cotangent = (tiles[name].at[slot] for name in ("v", "after", "do"))
                of_state = products.product(k_tile.at[products.nought(i)], state)
                until = of_line(slot, UNTIL)
                d_until = d_until + (whole(values) * of_state).sum(axis=1)
                out = of_state * products.along_lines(until, shape)
                out = products.added(out, scores, cotangent, of_square)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                own_result = result.at[products.nought(i)]
                own_result[...] = out.astype(result.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_result, dv.at[row, own, head, pl.ds(i * plan.slice, plan.slice)])
                sum = products.added(sum, scaled(values, until, shape), state.transpose((1, 0)), of_lines)
                weights = products.added_all(weights, [(values, cotangent.transpose((1, 0)))], None)
                pl.when(i < slices - 1)(lambda: release(slot))
                return sum, weights, d_until

            carry = sum, products.zeros(CHUNK, CHUNK), nothing
            sum, weights, d_until = lax.fori_loop(nought, slices, of_slice, carry)
            slot = slot_of(n * slices + slices - 1)
            own_tokens, at = tiles["tokens"].at[slot], products.nought(slot)
            weights = weights * between(own_tokens, 1) * scale
            scores = products.product(k_tile.at[at], q_tile.at[at].transpose((1, 0)))
            scores = jnp.where(reads(own_tokens, 1, strictly=True), scores, 0.0)
            d_tokens[row, head, D_SUMS, chunk] = -(weights * scores).sum(axis=1)
            release(slot)
            d_tokens[row, head, D_UNTIL, chunk] = d_until
            return products.added(sum, weights.astype(result.dtype), q_tile.at[at], of_square)

        sum = lax.fori_loop(nought, plan.heads, of_head, products.zeros(CHUNK, width))
        finish(sum, k_tile.at[0], dk)


def _plan(width, heads, group):
    for slice in (64, 32):
        own, each = 2 * CHUNK * width + CHUNK * slice, 2 * slice * (width + CHUNK) + 2 * ROWS * CHUNK
        stages = min(3, (products.SHARED_MEMORY // 2 - own) // each)
        if stages >= 2:
            return Plan(slice, stages, heads, group)
    raise ValueError(f"keys of {width} do not fit the shared memory")

"""The backward kernel: tiles from the last to the first, each from the states before it that the forward pass kept.

    g_t[d, n] = C_t[n] dy_t[d] + a_{t+1}[d, n] g_{t+1}[d, n]                        a_t = exp(dt_t A), u_t = dt_t x_t
    du_t[d]   = sum_n g_t B_t            dB_t[n] = sum_d g_t u_t                    dC_t[n] = sum_d h_t dy_t
    dlog_t    = g_t a_t h_{t-1}          ddt_t = sum_n dlog_t A + du_t x_t          dx_t = du_t dt_t + D dy_t
    dA        = sum_t dlog_t dt_t

With a gate z, dy is the cotangent times silu(z), and dz_t = silu'(z_t) times the cotangent and the ungated y_t.

In a tile the states go forward first, and those before every few tokens are kept in shared memory; from there they are
made again in registers, on the way back. Sums over channels go through shared memory too: 32 lines of partial sums are
written for each token and then added up by other threads, in a quarter of the instructions that exchanges between the
threads would take. What blocks add to dB and dC is added up by XLA.

For a token a warp has 200 instructions for 16 channels at N = 16 (as compiled): three cycles of a multiprocessor for
each channel and token. The exponentials take two of them, 20 bytes read and written 1.4 on an H100. These are counts:
nothing was measured, no GPU was to be had.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_gpu_plan import COMPILER, F32, LINES, Plan, along_columns, barrier, matrix
from pallas_kernels.selective_scan.mosaic_gpu_tile import Tile, fetch, scratch


def backward(
    plan: Plan, arrays: dict[str, jax.Array], A: jax.Array, D: jax.Array, saved: jax.Array, after: jax.Array
) -> tuple[jax.Array | None, ...]:
    """dx, ddt, dgate (or None), dA, dB, dC, dD, and the cotangents of the states before each part [B, parts, D, N]; dA
    to dD in float32.

    arrays: x, dt, B, C, dy, `gate` if there is one, and `carries` if documents are packed. saved: the states before
    each tile. after: the cotangents of the states after each part.
    """
    x, dt = arrays["x"], arrays["dt"]
    batch, length, width = x.shape
    tiles, blocks = pl.cdiv(length, plan.tokens), width // plan.channels
    stages = min(2, tiles)
    per_token = _per_token(plan)
    shape = jax.ShapeDtypeStruct
    out = dict(
        dx=shape(x.shape, x.dtype),
        ddt=shape(dt.shape, dt.dtype),
        weights=shape((batch, blocks, tiles * plan.tokens * per_token, plan.columns), F32),
        dA=shape((batch, plan.parts, width, plan.states), F32),
        dD=shape((batch, plan.parts, plan.stretch, width), F32),
        before=shape((batch, plan.parts, width, plan.states), F32),
    )
    gated = "gate" in arrays
    if gated:
        out["dgate"] = shape(x.shape, arrays["gate"].dtype)
    memory = scratch(plan, stages, arrays) | dict(
        kept=plgpu.SMEM((plan.tokens // plan.together, len(plan.matrices), LINES, plan.columns), F32),
        # a line more than there are, so that neighbours do not lie in the same banks of memory
        lines=plgpu.SMEM((plan.summed * per_token, LINES + 1, plan.columns), F32),
        sums=plgpu.SMEM((plan.tokens * per_token, plan.columns), F32),
    )

    def selective_scan_backward(*references):
        references = list(references)
        inputs = {name: references.pop(0) for name in arrays}
        others = {name: references.pop(0) for name in ("A", "D", "saved", "after", *out)}

        def block(**shared):
            _block(plan, stages, tiles, inputs, others, shared)

        pl.run_scoped(block, **memory, collective_axes="warpgroup")

    run = plgpu.kernel(
        selective_scan_backward,
        out_type=list(out.values()),
        grid=(blocks, plan.parts, batch),
        grid_names=("block", "part", "row"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    dx, ddt, weights, dA, dD, before, *dgate = run(*arrays.values(), A, D, saved, after)
    weights = weights.sum(axis=1).reshape(batch, tiles * plan.tokens, 2, plan.states)[:, :length]
    dgate = dgate[0] if gated else None
    return dx, ddt, dgate, dA.sum(axis=(0, 1)), weights[:, :, 0], weights[:, :, 1], dD.sum(axis=(0, 1, 2)), before


def _per_token(plan):
    """Lines of `plan.columns` numbers that are dB and dC of one token."""
    return 2 * plan.states // plan.columns


def _block(plan, stages, tiles, inputs, others, shared):
    block, part, row = (lax.axis_index(name) for name in ("block", "part", "row"))
    channels = pl.ds(block * plan.channels, plan.channels)
    first, count = plan.tiles_of(part, tiles)
    groups, per_token = plan.tokens // plan.together, _per_token(plan)
    kept, gated = shared["kept"], "gate" in shared

    def start(i):
        fetch(plan, inputs, shared, row, block, first + count - 1 - i, lax.rem(i, jnp.int32(stages)))

    start(jnp.int32(0))
    A = plan.load_exponents(others["A"], block)
    skip = plgpu.load(others["D"].at[channels], layout=plan.of_channels.reduce(0), optimized=False).astype(F32)
    skips = plan.load_row(others["D"], block) if gated else None

    def step(tile, t, h):
        """Of a token: dt, input and B; decays, the states before it decayed, the states after it."""
        dt, u = tile.channels(tile.arrays["dt"], t), tile.channels(tile.input, t)
        a, B = tile.decays(t, dt, A), tile.weights("B", t)
        decayed = [a_ * h_ for a_, h_ in zip(a, h, strict=True)]
        return dt, u, B, a, decayed, [d + u_ * B_ for d, u_, B_ in zip(decayed, u, B, strict=True)]

    def keep(group, h):
        for m, value in enumerate(h):
            kept[group, m] = value

    def go_on(tile, group, h):
        keep(group, h)
        for s in range(plan.together):
            *_, h = step(tile, group * plan.together + s, h)
        return h

    def add_lines(s, which, products):
        """Writes what one token adds to dB (0) or dC (1), a line for each channel modulo 32."""
        total = {}
        for (_, n), value in zip(plan.matrices, products, strict=True):
            total[n] = total[n] + value if n in total else value
        for i, value in enumerate(total.values()):
            shared["lines"][(s % plan.summed * 2 + which) * (per_token // 2) + i, pl.ds(0, LINES), :] = value

    def sum_lines(t):
        """Adds the lines up, for `summed` tokens from t on."""
        barrier()
        layout, total = matrix(plan.columns, 1), None
        for line in range(LINES):
            value = plgpu.load(shared["lines"].at[:, line], layout=layout, optimized=False)
            total = value if total is None else total + value
        shared["sums"][pl.ds(t * per_token, plan.summed * per_token), :] = total
        barrier()

    def go_back(tile, i, carry):
        g, dA = carry
        group = groups - 1 - i
        h = [plgpu.load(kept.at[group, m], layout=plan.of_states) for m in range(len(plan.matrices))]
        known = []
        for s in range(plan.together):
            t = group * plan.together + s
            *found, h = step(tile, t, h)
            dy = tile.channels(tile.arrays["dy"], t)
            known.append((*found, h, dy))
        results = []
        for s in reversed(range(plan.together)):
            t = group * plan.together + s
            dt, u, B, a, decayed, h, dy = known[s]
            C = tile.weights("C", t)
            g = [g_ + C_ * dy_ for g_, C_, dy_ in zip(g, C, dy, strict=True)]
            add_lines(s, 0, [g_ * u_ for g_, u_ in zip(g, u, strict=True)])
            add_lines(s, 1, [h_ * dy_ for h_, dy_ in zip(h, dy, strict=True)])
            dlog = [g_ * d for g_, d in zip(g, decayed, strict=True)]
            of_input = plan.over_states([g_ * B_ for g_, B_ in zip(g, B, strict=True)])
            of_decay = plan.over_states([d * A_ for d, A_ in zip(dlog, A, strict=True)])
            x, sizes = tile.row(tile.arrays["x"], t), tile.row(tile.arrays["dt"], t)
            found = {"dt": {r: of_decay[r] * math.log(2) + of_input[r] * x[r] for r in plan.lines}}
            found["input"] = {r: of_input[r] * sizes[r] for r in plan.lines}
            if gated:
                y = plan.over_states([h_ * C_ for h_, C_ in zip(h, C, strict=True)])
                factor = tile.row(tile.arrays["gate"], t)
                found["gate"] = {r: factor[r] * (y[r] + skips[r] * x[r]) for r in plan.lines}
            results.append((t, found))
            dA = [old + d * dt_ for old, d, dt_ in zip(dA, dlog, dt, strict=True)]
            g = [a_ * g_ for a_, g_ in zip(a, g, strict=True)]
            if s % plan.summed == 0:
                sum_lines(t)
        # In the place of what was read: a barrier has come since.
        for t, found in results:
            for name, of_channels in found.items():
                reference = tile.input if name == "input" else tile.arrays[name]
                for r, value in of_channels.items():
                    reference[t, pl.ds(r, LINES)] = value.astype(reference.dtype)
        return g, dA

    def finish(tile, dD):
        """Makes dx in the place of x; those of dt and the gate are there, but for padding."""
        for at in tile.stretches():
            x, dy = (tile.read(name, at) for name in ("x", "dy"))
            through_state = plgpu.load(tile.input.at[*at], layout=plan.of_channels)
            dD = dD + dy * x
            tile.write("x", at, through_state + along_columns(skip, plan.stretch, plan.of_channels) * dy)
            for name in ("dt", "gate"):
                if tile.packed and name in tile.arrays:
                    tile.write(name, at, tile.read(name, at))
        return dD

    def visit(i, carry):
        g, dA, dD = carry
        n, slot = first + count - 1 - i, lax.rem(i, jnp.int32(stages))
        tile = Tile(plan, shared, slot)
        h = plan.load(others["saved"].at[row, n], block)
        plgpu.barrier_wait(shared["here"].at[slot])
        tile.prepare()
        # A barrier too; and the other slot's results are out, so that the next tile may come.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(i + 1 < count)(lambda: start(i + 1))
        h = lax.fori_loop(0, groups - 1, lambda group, h: go_on(tile, group, h), h)
        keep(groups - 1, h)
        g, dA = lax.fori_loop(0, groups, lambda i, carry: go_back(tile, i, carry), (g, dA))
        barrier()
        dD = finish(tile, dD)
        plgpu.commit_smem()
        tokens = pl.ds(n * plan.tokens, plan.tokens)
        for name in ("x", "dt", "gate"):
            if name in tile.arrays:
                plgpu.copy_smem_to_gmem(tile.arrays[name], others[f"d{name}"].at[row, tokens, channels])
        lines = pl.ds(n * plan.tokens * per_token, plan.tokens * per_token)
        plgpu.copy_smem_to_gmem(shared["sums"], others["weights"].at[row, block, lines])
        return g, dA, dD

    dD = plgpu.layout_cast(jnp.zeros((plan.stretch, plan.channels), F32), plan.of_channels)
    after = plan.load(others["after"].at[row, part], block)
    g, dA, dD = lax.fori_loop(0, count, visit, (after, plan.zeros(), dD))
    plan.store(others["before"].at[row, part], block, g)
    plan.store(others["dA"].at[row, part], block, dA)
    plgpu.store(others["dD"].at[row, part, :, channels], dD, optimized=False)
    plgpu.wait_smem_to_gmem(0)

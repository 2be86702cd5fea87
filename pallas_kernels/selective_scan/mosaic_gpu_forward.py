"""The forward kernel: every channel's tokens one after the other, with the states in registers.

A token takes N exponentials of a channel, and the unit for them does 16 a cycle: a cycle for each channel and token at
N = 16. Beside it stand as many cycles of other instructions (35 of a warp for 8 channels, as compiled), and 8 bytes (x
and y in 16 bits, dt in 32), which an H100 moves in half a cycle: the exponentials bound it, not the memory. These are
counts: nothing was measured, no GPU was to be had.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_gpu_plan import COMPILER, F32, Plan, along_columns, barrier
from pallas_kernels.selective_scan.mosaic_gpu_tile import Tile, fetch, scratch


def forward(
    plan: Plan, arrays: dict[str, jax.Array], A: jax.Array, D: jax.Array, initial: jax.Array, save: bool
) -> list[jax.Array]:
    """y, the states after each part [B, parts, D, N], and if `save` the states before each tile [B, tiles, D, N].

    arrays: x, dt, B, C, `gate` if there is one, and `carries` if documents are packed. initial: the states before each
    part, [B, parts, D, N].
    """
    batch, length, width = arrays["x"].shape
    tiles = pl.cdiv(length, plan.tokens)
    states = jax.ShapeDtypeStruct((batch, plan.parts, width, plan.states), F32)
    out = [jax.ShapeDtypeStruct(arrays["x"].shape, arrays["x"].dtype), states]
    if save:
        out.append(jax.ShapeDtypeStruct((batch, tiles, width, plan.states), F32))
    stages = min(2, tiles)
    memory = scratch(plan, stages, arrays) | {
        "y": plgpu.SMEM((plan.tokens, plan.channels), arrays["x"].dtype),
    }

    def selective_scan_forward(*references):
        references = list(references)
        inputs = {name: references.pop(0) for name in arrays}
        A, D, initial, y, final, *saved = references

        def block(**shared):
            _block(plan, stages, tiles, inputs, A, D, initial, y, final, saved[0] if saved else None, shared)

        pl.run_scoped(block, **memory, collective_axes="warpgroup")

    run = plgpu.kernel(
        selective_scan_forward,
        out_type=out,
        grid=(width // plan.channels, plan.parts, batch),
        grid_names=("block", "part", "row"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    return run(*arrays.values(), A, D, initial)


def _block(plan, stages, tiles, inputs, A, D, initial, y, final, saved, shared):
    block, part, row = (lax.axis_index(name) for name in ("block", "part", "row"))
    channels = pl.ds(block * plan.channels, plan.channels)
    first, count = plan.tiles_of(part, tiles)

    def start(i, _):
        fetch(plan, inputs, shared, row, block, first + i, lax.rem(i, jnp.int32(stages)))

    lax.fori_loop(0, jnp.minimum(stages, count), start, None)
    A = plan.load_exponents(A, block)
    h = plan.load(initial.at[row, part], block)
    skip = plgpu.load(D.at[channels], layout=plan.of_channels.reduce(0), optimized=False).astype(F32)

    def steps(tile, i, h):
        results = []
        for s in range(plan.together):
            t = i * plan.together + s
            dt, u = tile.channels(tile.arrays["dt"], t), tile.channels(tile.input, t)
            a, B, C = tile.decays(t, dt, A), tile.weights("B", t), tile.weights("C", t)
            h = [a_ * h_ + u_ * B_ for a_, h_, u_, B_ in zip(a, h, u, B, strict=True)]
            results.append((t, plan.over_states([h_ * C_ for h_, C_ in zip(h, C, strict=True)])))
        for t, outputs in results:
            for r, value in outputs.items():
                tile.input[t, pl.ds(r, value.shape[0])] = value
        return h

    def visit(i, h):
        n, slot = first + i, lax.rem(i, jnp.int32(stages))
        tile = Tile(plan, shared, slot)
        plgpu.barrier_wait(shared["here"].at[slot])
        if saved is not None:
            plan.store(saved.at[row, n], block, h)
        tile.prepare()
        barrier()
        h = lax.fori_loop(0, plan.tokens // plan.together, lambda i, h: steps(tile, i, h), h)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # and a barrier
        for at in tile.stretches():
            out = plgpu.load(tile.input.at[*at], layout=plan.of_channels)
            out = out + along_columns(skip, plan.stretch, plan.of_channels) * tile.read("x", at)
            if "gate" in tile.arrays:
                out = out * jax.nn.silu(tile.read("gate", at))
            shared["y"][*at] = out.astype(y.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared["y"], y.at[row, pl.ds(n * plan.tokens, plan.tokens), channels])
        pl.when(i + stages < count)(lambda: start(i + stages, None))
        return h

    plan.store(final.at[row, part], block, lax.fori_loop(0, count, visit, h))
    plgpu.wait_smem_to_gmem(0)

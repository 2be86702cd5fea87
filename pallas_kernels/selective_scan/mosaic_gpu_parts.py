"""A sequence in parts, where there are too few channels to fill a chip: the state before each part, from all at once.

A part takes the state h before it to P h + q. A first kernel finds each part's P = exp(A sum(dt)), 0 where a document
begins, and q, its last state after nothing; a loop over the parts gives the states before them, and then the forward
kernel runs on all parts at once. Backward the same with the cotangents, from the last part to the first. This is a scan
in two levels (Blelloch 1990); the price is that most exponentials of the forward pass are computed twice.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.parts import MULTIPROCESSORS
from pallas_kernels.selective_scan.mosaic_gpu_plan import COMPILER, F32, LARGEST_TILE, LINES, Plan, barrier
from pallas_kernels.selective_scan.mosaic_gpu_tile import Tile, fetch, scratch

FILLED = 96  # blocks of 32 channels from which on one pass takes no longer than two over parts, going by instructions
BLOCKS = 4 * MULTIPROCESSORS  # that parts are made for: all are at work at once
LEAST = 8  # of the largest tiles, in a part
FEWEST = 4  # parts: two passes over halves take as long as one over the whole


def cut(batch: int, length: int, width: int) -> tuple[int, int]:
    """How many parts, and how many of the largest tiles each has (the last one maybe fewer)."""
    blocks, tiles = batch * (width // LINES), pl.cdiv(length, LARGEST_TILE)
    parts = min(pl.cdiv(BLOCKS, blocks), tiles // LEAST)
    if blocks >= FILLED or parts < FEWEST:
        return 1, tiles
    each = pl.cdiv(tiles, parts)
    return pl.cdiv(tiles, each), each


def before_parts(plan: Plan, arrays: dict[str, jax.Array], A: jax.Array, initial: jax.Array) -> jax.Array:
    """The states before each part [B, parts, D, N]. arrays: x, dt, B and maybe `carries`. initial: [B, D, N]."""
    last, before = lax.scan(_after, initial, _parts(plan, arrays, A, backward=False))
    return jnp.concatenate([before, last[None]]).swapaxes(0, 1)


def after_parts(plan: Plan, arrays: dict[str, jax.Array], A: jax.Array, final: jax.Array) -> jax.Array:
    """The cotangents of the states after each part [B, parts, D, N]. arrays: dy, dt, C and maybe `gate` and `carries`.
    final: [B, D, N], that of the last state."""
    first, after = lax.scan(_after, final, _parts(plan, arrays, A, backward=True), reverse=True)
    return jnp.concatenate([first[None], after]).swapaxes(0, 1)


def _after(state, part):
    decay, added = part
    return decay * state + added, state


def _parts(plan, arrays, A, backward):
    """P and q [parts - 1, B, D, N]: of all parts but the last, or backward of all but the first."""
    batch, length, width = arrays["dt"].shape
    tiles = pl.cdiv(length, plan.tokens)
    stages = min(2, tiles)
    memory = scratch(plan, stages, arrays)

    def selective_scan_parts(*references):
        references = list(references)
        inputs = {name: references.pop(0) for name in arrays}

        def block(**shared):
            _block(plan, stages, tiles, backward, inputs, *references, shared)

        pl.run_scoped(block, **memory, collective_axes="warpgroup")

    run = plgpu.kernel(
        selective_scan_parts,
        out_type=[jax.ShapeDtypeStruct((plan.parts - 1, batch, width, plan.states), F32)] * 2,
        grid=(width // plan.channels, plan.parts - 1, batch),
        grid_names=("block", "part", "row"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    return run(*arrays.values(), A)


def _block(plan, stages, tiles, backward, inputs, A, decays, added, shared):
    block, part, row = (lax.axis_index(name) for name in ("block", "part", "row"))
    first, count = plan.tiles_of(part + 1 if backward else part, tiles)
    groups = plan.tokens // plan.together
    weights = "C" if backward else "B"

    def start(i, _=None):
        n = first + (count - 1 - i if backward else i)
        fetch(plan, inputs, shared, row, block, n, lax.rem(i, jnp.int32(stages)))

    lax.fori_loop(0, jnp.minimum(stages, count), start, None)
    A = plan.load_exponents(A, block)

    def step(tile, t, carry):
        h, total, carried = carry
        dt, u = tile.channels(tile.arrays["dt"], t), tile.channels(tile.input, t)
        a, W = tile.decays(t, dt, A), tile.weights(weights, t)
        if backward:
            h = [a_ * (h_ + u_ * W_) for a_, h_, u_, W_ in zip(a, h, u, W, strict=True)]
        else:
            h = [a_ * h_ + u_ * W_ for a_, h_, u_, W_ in zip(a, h, u, W, strict=True)]
        total = [total_ + dt_ for total_, dt_ in zip(total, dt, strict=True)]
        return h, total, carried * jnp.abs(tile.arrays["carries"][t]) if tile.packed else carried

    def steps(tile, i, carry):
        group = groups - 1 - i if backward else i
        tokens = range(plan.together)
        for s in reversed(tokens) if backward else tokens:
            carry = step(tile, group * plan.together + s, carry)
        return carry

    def visit(i, carry):
        slot = lax.rem(i, jnp.int32(stages))
        tile = Tile(plan, shared, slot)
        plgpu.barrier_wait(shared["here"].at[slot])
        tile.prepare()
        barrier()
        carry = lax.fori_loop(0, groups, lambda i, carry: steps(tile, i, carry), carry)
        plgpu.commit_smem()
        pl.when(i + stages < count)(lambda: start(i + stages))
        return carry

    h, total, carried = lax.fori_loop(0, count, visit, (plan.zeros(), plan.zeros(), jnp.float32(1)))
    plan.store(decays.at[part, row], block, [jnp.exp2(t * A_) * carried for t, A_ in zip(total, A, strict=True)])
    plan.store(added.at[part, row], block, h)

"""The kernel for one token: the states are read once and written once, in place."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_gpu_plan import COMPILER, F32, LINES, Plan, along_columns


def step(
    plan: Plan,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array,
    gate: jax.Array | None,
    valid: jax.Array | None,
    states: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """y [B, D] and the states after the token. x, dt, gate: [B, D]. B, C: [B, N]. valid: float32 [B], 0 for
    padding; None: there is none."""

    extra = {name: array for name, array in {"gate": gate, "valid": valid}.items() if array is not None}

    def selective_scan_step(x, dt, A, B, C, D, *rest):
        *rest, states, y = rest
        given = dict(zip(extra, rest, strict=True))
        block, row = lax.axis_index("block"), lax.axis_index("row")
        here = given["valid"][row] > 0 if "valid" in given else None

        def read(reference, start, size, axis):
            layout = plan.of_states.reduce(axis)
            values = plgpu.load(reference.at[pl.ds(start, size)], layout=layout, optimized=False).astype(F32)
            return values if here is None else jnp.where(here, values, 0.0)

        first = block * plan.channels
        x_, dt_ = ({r: read(a.at[row], first + r, LINES, 1) for r in plan.lines} for a in (x, dt))
        skip = {r: read(D, first + r, LINES, 1) for r in plan.lines}
        B_, C_ = (
            [along_columns(read(a.at[row], n, plan.columns, 0), LINES, plan.of_states) for _, n in plan.matrices]
            for a in (B, C)
        )
        u, steps = plan.spread({r: dt_[r] * x_[r] for r in plan.lines}), plan.spread(dt_)
        before = plan.load(states.at[row], block)
        h = [
            jnp.exp2(s * a) * h + u_ * b
            for s, a, h, u_, b in zip(steps, plan.load_exponents(A, block), before, u, B_, strict=True)
        ]
        plan.store(states.at[row], block, h)
        for r, value in plan.over_states([h_ * c for h_, c in zip(h, C_, strict=True)]).items():
            out = value + skip[r] * x_[r]
            if "gate" in given:
                out = out * jax.nn.silu(read(given["gate"].at[row], first + r, LINES, 1))
            plgpu.store(y.at[row, pl.ds(first + r, LINES)], out.astype(y.dtype), optimized=False)

    run = plgpu.kernel(
        selective_scan_step,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(x.shape[1] // plan.channels, x.shape[0]),
        grid_names=("block", "row"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=COMPILER,
    )
    states = jax.new_ref(states)
    y = run(x, dt, A, B, C, D, *extra.values(), states)
    return y, jax.freeze(states)

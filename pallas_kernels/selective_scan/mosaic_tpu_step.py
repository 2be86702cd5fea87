"""One token of the selective scan on a TPU: every state is read once and written once, in place.

XLA keeps an array `[B, D, N]` of few states with channels along the lanes, so that the view `[B, N, D]` costs nothing.
Here a register is 8 states of 128 channels of one row, and the output a sum over its lines.
"""


import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.mosaic_tpu_tiles import LANES, LINES, TOGETHER, VMEM_LIMIT

ELEMENTS = 2**18  # of the states in a block: a MiB


def step(x, dt, rates, B, C, D, state, gate, valid):
    """Returns y `[B, D]` in x's dtype and the state after the token.

    x, dt: `[B, D]`. rates: A log2(e), `[N, D]`. B, C: `[B, N]`, 0 for padding. D: `[1, D]`. state: `[B, N, D]`. gate:
    `[B, D]` or None. valid: int32 `[B, 1]` or None. All but x, dt and gate in float32.
    """
    batch, states, width = state.shape
    rows = batch if batch < LINES else LINES
    part = min(width, LANES * max(1, ELEMENTS // (rows * states * LANES)))
    of_rows = pl.BlockSpec((rows, part), lambda b, p: (b, p))
    of_weights = pl.BlockSpec((rows, states), lambda b, p: (b, 0))
    of_states = pl.BlockSpec((rows, states, part), lambda b, p: (b, 0, p))
    arguments = [
        (x, of_rows),
        (dt, of_rows),
        (rates, pl.BlockSpec((states, part), lambda b, p: (0, p))),
        (B, of_weights),
        (C, of_weights),
        (D, pl.BlockSpec((1, part), lambda b, p: (0, p))),
        (gate, None if gate is None else of_rows),
        (valid, None if valid is None else pl.BlockSpec((rows, 1), lambda b, p: (b, 0))),
        (state, of_states),
    ]
    present = sum(array is not None for array, _ in arguments)
    return pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(batch, rows), pl.cdiv(width, part)),
        in_specs=[spec for _, spec in arguments],
        out_specs=[of_rows, of_states],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        input_output_aliases={present - 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"selective_scan_step_{rows}_{part}",
    )(*(array for array, _ in arguments))  # fmt: skip


def _kernel(x, dt, rates, B, C, D, gate, valid, state, y, after):
    rows, states, part = state.shape
    b, c = B[...].T, C[...].T
    lanes = max(LANES, TOGETHER * LANES * LINES // max(states, LINES))  # a few registers of each row

    def columns(at, lanes):
        here = pl.ds(at, lanes)

        def read(ref):
            values = ref[:, here].astype(jnp.float32)
            return values if valid is None else jnp.where(valid[...] != 0, values, 0)

        inputs, steps = read(x), read(dt)
        skipped, weighed, rate = inputs * D[:, here], inputs * steps, rates[:, here]
        outs = []
        for row in range(rows):
            line = slice(row, row + 1)
            h = jnp.exp2(steps[line] * rate) * state[row, :, here] + weighed[line] * b[:, line]
            after[row, :, here] = h
            outs.append((h * c[:, line]).sum(0, keepdims=True))
        out = jnp.concatenate(outs, axis=0) + skipped
        if gate is not None:
            out = out * jax.nn.silu(read(gate))
        y[:, here] = out.astype(y.dtype)

    whole = part // lanes

    def some(i, _):
        columns(pl.multiple_of(i * lanes, LANES), lanes)
        return 0

    jax.lax.fori_loop(0, whole, some, 0)
    if part % lanes:
        columns(whole * lanes, part % lanes)

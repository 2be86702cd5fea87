"""The backward of the selective scan on a TPU: chunks from the last to the first.

With g_t the gradient of the state after token t, and u_t = exp(dt_t A) h_{t-1}:

    g_t  = exp(dt_{t+1} A) g_{t+1} + C_t dy_t      ddt_t = sum_n (g_t u_t A) + x_t sum_n (g_t B_t)
    dx_t = dt_t sum_n (g_t B_t) + D dy_t           dA    = sum_t g_t u_t dt_t
    dB_t = sum_d g_t dt_t x_t                      dC_t  = sum_d h_t dy_t

With a gate z, dy is the cotangent times silu(z), and dz_t = silu'(z_t) times the cotangent and the ungated y_t.

For 1,024 channels and 16 states at a time a chunk is gone through forward, which gives u of all its tokens and the
terms of dC, and then backward. The terms of dB and dC are added up over registers of channels, each in its place, and
over the channels of a register at the end of the chunk.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.mosaic_tpu_tiles import (
    CHUNK, GROUPS, LANES, LINES, STATES, TILE, TOKENS, VMEM_LIMIT, Layout, Rows, in_order, put_rows, spread, take_rows,
    token, unrolled, weight,
)  # fmt: skip
from pallas_kernels.selective_scan.reference import silu_derivative

INPUT, STEP, COTANGENT, OF_INPUT, OF_STEP, OUTPUT = range(6)  # what is kept of the tokens of a chunk
AHEAD = 2  # with more, a v6e runs out of registers


def backward(layout: Layout, x, dt, rates, B, C, D, marks, saved, gate, dy, dstate):
    """Returns dx, ddt, dgate (or None); dA `[B, N, ., 8, 128]`; dB, dC `[B, parts, N, T]` filled up like B; dD `[B, 8,
    channels]`, to be summed; and the gradient of the initial state. dy, dstate: of y and of the final state; the rest
    as in `forward`."""
    batch, last, of_channels = x.shape[0], layout.chunks - 1, (layout.states, layout.part // TILE, LINES, LANES)
    of_tokens = pl.BlockSpec((None, CHUNK, layout.part), lambda b, p, c: (b, last - c, p))
    of_state = pl.BlockSpec((None, *of_channels), lambda b, p, c: (b, 0, p, 0, 0))
    of_weights = pl.BlockSpec((None, B.shape[1], CHUNK), lambda b, p, c: (b, 0, last - c))
    of_parts = pl.BlockSpec((None, None, B.shape[1], CHUNK), lambda b, p, c: (b, p, 0, last - c))
    by_part = jax.ShapeDtypeStruct((batch, layout.parts, *B.shape[1:]), jnp.float32)
    by_state = jax.ShapeDtypeStruct(dstate.shape, jnp.float32)
    some_states, of_chunk = min(layout.states, STATES), (CHUNK // LINES, LINES * LINES, LANES)
    return pl.pallas_call(
        functools.partial(_kernel, layout),
        grid=(batch, layout.parts, layout.chunks),
        in_specs=[
            of_tokens,
            of_tokens,
            of_tokens,
            pl.BlockSpec(of_channels, lambda b, p, c: (0, p, 0, 0)),
            of_weights,
            of_weights,
            pl.BlockSpec((1, layout.part), lambda b, p, c: (0, p)),
            None if marks is None else pl.BlockSpec((None, LINES, CHUNK), lambda b, p, c: (b, 0, last - c)),
            pl.BlockSpec((None, None, *of_channels), lambda b, p, c: (b, last - c, 0, p, 0, 0)),
            of_state,
            None if gate is None else of_tokens,
        ],
        out_specs=[
            of_tokens,
            of_tokens,
            None if gate is None else of_tokens,
            of_state,
            of_parts,
            of_parts,
            pl.BlockSpec((None, LINES, layout.part), lambda b, p, c: (b, 0, p)),
            of_state,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(dt.shape, dt.dtype),
            None if gate is None else jax.ShapeDtypeStruct(gate.shape, gate.dtype),
            by_state,
            by_part,
            by_part,
            jax.ShapeDtypeStruct((batch, LINES, D.shape[1]), jnp.float32),
            by_state,
        ],
        scratch_shapes=[
            pltpu.VMEM((layout.states, CHUNK, LANES), jnp.float32),
            pltpu.VMEM((layout.states, CHUNK, LANES), jnp.float32),
            None if marks is None else pltpu.VMEM((1, CHUNK, LANES), jnp.float32),
            pltpu.VMEM((5 if gate is None else 6, 1, *of_chunk), jnp.float32),
            pltpu.VMEM((some_states, *of_chunk), jnp.float32),
            pltpu.VMEM((some_states, *of_chunk), jnp.float32) if layout.state_groups == 1 else None,
            pltpu.VMEM((some_states, CHUNK, LINES, LANES), jnp.float32),
            pltpu.VMEM((some_states, LINES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"selective_scan_backward_{layout.part}",
    )(x, dt, dy, rates, B, C, D, marks, saved, dstate, gate)


def _kernel(
    layout, x, dt, dy, rates, B, C, D, marks, saved, dstate, gate,
    dx, ddt, dgate, dA, dB, dC, dD, carry,
    b, c, mark, kept, of_C, of_B, decayed, state,
):  # fmt: skip
    if of_B is None:
        of_B = of_C  # which has been added up by then

    def clear(n, _):
        for sums in (of_B, of_C):
            sums[n] = jnp.zeros(sums.shape[1:], jnp.float32)
        return 0

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = dstate[...]
        dA[...] = jnp.zeros_like(dA)
        dD[...] = jnp.zeros_like(dD)
        jax.lax.fori_loop(0, of_B.shape[0], clear, 0)

    spread(B, b)
    spread(C, c)
    if marks is not None:
        spread(marks, mark)
    dB[...] = jnp.zeros_like(dB)
    dC[...] = jnp.zeros_like(dC)
    tiles, here, together = layout.part // TILE, min(layout.states, STATES), layout.together(1)
    count = layout.token_groups(layout.chunks - 1 - pl.program_id(2))

    def of_ungated(group, k):
        """The cotangent of what the gate multiplies, padding's as well."""
        if gate is None:
            return group.read(dy, k)
        return group.read(dy, k) * jax.nn.silu(group.read(gate, k))

    def of_some(n, _):
        """A register of channels, and STATES states."""
        tile, group_of_states = n // layout.state_groups, n % layout.state_groups
        first_state = group_of_states * STATES

        def rows(i):
            row, at = pl.multiple_of(i * TOKENS, TOKENS), pl.multiple_of(tile * TILE, TILE)
            return Rows(layout, row, at, None if mark is None else mark.at[0])

        def bring(i, _):
            group, first = rows(i), i * GROUPS

            def turn(k, _):
                step = group.read(dt, k)
                put_rows(kept.at[INPUT], first, k, group.real(step * group.read(x, k), k))
                put_rows(kept.at[STEP], first, k, group.step(step, k))
                put_rows(kept.at[COTANGENT], first, k, group.real(of_ungated(group, k), k))
                return 0

            return unrolled(LINES, turn, 0)

        def ahead(i, _):
            for first in range(0, here, together):
                local, states = pl.ds(first, together), pl.ds(first_state + first, together)
                rate = rates[states, tile]

                def visit(t, h, local=local, states=states, rate=rate, first=first):
                    at, now = token(i * GROUPS, t), i * TOKENS + t
                    inputs, step, cotangent = (kept[k, 0, *at][None] for k in (INPUT, STEP, COTANGENT))
                    u = jnp.exp2(step * rate) * h
                    decayed[local, now] = u
                    h = u + inputs * weight(b, states, now)
                    of_C[local, *at] += h * cotangent
                    if gate is not None:
                        before = kept[OUTPUT, 0, *at]
                        before = jnp.where(first_state + first > 0, before, 0) if first == 0 else before
                        kept[OUTPUT, 0, *at] = before + (h * weight(c, states, now)).sum(0)
                    return h

                state[local] = unrolled(TOKENS, visit, state[local])
            return 0

        def back(j, written):
            i = count - 1 - j  # and so is `written`, which the compiler does not know
            for first in range(0, here, together):
                local, states = pl.ds(first, together), pl.ds(first_state + first, together)
                rate = rates[states, tile]

                def load(t, first=first):
                    at = token(i * GROUPS, TOKENS - 1 - t)
                    sums = [kept[k, 0, *at] for k in (OF_INPUT, OF_STEP)]
                    if first == 0:
                        sums = [jnp.where(group_of_states > 0, a, 0) if layout.state_groups > 1 else 0 for a in sums]
                    return *(kept[k, 0, *at][None] for k in (INPUT, STEP, COTANGENT)), *sums

                def visit(t, loaded, gradients, local=local, states=states, rate=rate):
                    t, (later, of_rate) = TOKENS - 1 - t, gradients
                    inputs, step, cotangent, of_input, of_step = loaded
                    at, now = token(i * GROUPS, t), i * TOKENS + t
                    g = later + weight(c, states, now) * cotangent
                    of_B[local, *at] += g * inputs
                    of_decay = g * decayed[local, now]
                    at = token(written * GROUPS, t)
                    kept[OF_INPUT, 0, *at] = of_input + (g * weight(b, states, now)).sum(0)
                    kept[OF_STEP, 0, *at] = of_step + (of_decay * rate).sum(0)
                    return jnp.exp2(step * rate) * g, of_rate + of_decay * step

                gradients = in_order(TOKENS, AHEAD, load, visit, (carry[states, tile], dA[states, tile]))
                carry[states, tile], dA[states, tile] = gradients
            return written - 1

        def write(i, _):
            group, first = rows(i), i * GROUPS

            def turn(k, _):
                of_input = take_rows(kept.at[OF_INPUT], first, k)
                of_step = take_rows(kept.at[OF_STEP], first, k) * math.log(2)
                of_y, of_x = take_rows(kept.at[COTANGENT], first, k), group.real(group.read(x, k), k)
                if gate is not None:
                    ungated = take_rows(kept.at[OUTPUT], first, k) + of_x * D[0:1, group.lanes(k)]
                    of_gate = group.read(dy, k) * silu_derivative(group.read(gate, k)) * ungated
                    group.write(dgate, k, group.real(of_gate, k))
                group.write(dx, k, of_input * group.real(group.read(dt, k), k) + of_y * D[0:1, group.lanes(k)])
                group.write(ddt, k, group.real(of_step, k) + of_input * of_x)
                skipped = of_y * of_x
                dD[:, group.lanes(k)] += skipped[:LINES] + skipped[LINES:]
                return 0

            return unrolled(LINES, turn, 0)

        def sum_up(sums, out):
            @pl.when((layout.state_groups > 1) | (tile == tiles - 1))
            def _():
                jax.lax.fori_loop(0, here, functools.partial(_sum_up, sums, out, first_state), 0)

        state[...] = saved[pl.ds(first_state, here), tile]
        jax.lax.fori_loop(0, count, bring, 0)
        jax.lax.fori_loop(0, count, ahead, 0)
        sum_up(of_C, dC)
        jax.lax.fori_loop(0, count, back, count - 1)
        sum_up(of_B, dB)

        @pl.when(group_of_states == layout.state_groups - 1)
        def _():
            jax.lax.fori_loop(0, count, write, 0)

        return 0

    jax.lax.fori_loop(0, tiles * layout.state_groups, of_some, 0)


def _sum_up(sums, out, first_state, n, _):
    """Adds the registers of all tokens for the n-th state up over the channels, to a row of `out`. Leaves 0 behind."""
    # every eighth line is one of each token
    lines = (sums[n, :, pl.ds(line, LINES, stride=LINES), :] for line in range(LINES))
    by_token = functools.reduce(operator.add, lines).reshape(CHUNK, LANES)
    out[pl.ds(first_state + n, 1), :] += by_token.T.sum(0, keepdims=True)
    sums[n] = jnp.zeros(sums.shape[1:], jnp.float32)
    return 0

"""The backward of the selective scan on a TPU: chunks from the last to the first.

With g_t the gradient of the state after token t, and u_t = exp(dt_t A) h_{t-1}:

    g_t  = exp(dt_{t+1} A) g_{t+1} + C_t dy_t      ddt_t = sum_n (g_t u_t A) + x_t sum_n (g_t B_t)
    dx_t = dt_t sum_n (g_t B_t) + D dy_t           dA    = sum_t g_t u_t dt_t
    dB_t = sum_d g_t dt_t x_t                      dC_t  = sum_d h_t dy_t

For 2,048 channels and 16 states at a time a chunk is gone through forward, which gives u of all its tokens and dC, and
then backward. Sums over the lanes go to the lane of their state, over the lines of a register at the end of the chunk.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.mosaic_tpu_tiles import (
    CHUNK, LANES, LINES, STATES, TILE, TOKENS, VMEM_LIMIT, Layout, Rows, buffer, put_rows, spread, take_rows, token,
    unrolled, weight,
)  # fmt: skip


def backward(layout: Layout, x, dt, rates, B, C, D, marks, saved, dy, dstate):
    """Returns dx, ddt; dA `[B, N, ., 8, 128]`; dB, dC `[B, parts, N, T]` filled up like B; dD `[B, 8, channels]`, to be
    summed; and the gradient of the initial state. dy, dstate: of y and of the final state; the rest as in `forward`."""
    batch, last, of_channels = x.shape[0], layout.chunks - 1, (layout.states, layout.part // TILE, LINES, LANES)
    of_tokens = pl.BlockSpec((None, CHUNK, layout.part), lambda b, p, c: (b, last - c, p))
    of_state = pl.BlockSpec((None, *of_channels), lambda b, p, c: (b, 0, p, 0, 0))
    of_weights = pl.BlockSpec((None, B.shape[1], CHUNK), lambda b, p, c: (b, 0, last - c))
    of_parts = pl.BlockSpec((None, None, B.shape[1], CHUNK), lambda b, p, c: (b, p, 0, last - c))
    by_part = jax.ShapeDtypeStruct((batch, layout.parts, *B.shape[1:]), jnp.float32)
    by_state = jax.ShapeDtypeStruct(dstate.shape, jnp.float32)
    some_states = min(layout.states, STATES)
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
        ],
        out_specs=[
            of_tokens,
            of_tokens,
            of_state,
            of_parts,
            of_parts,
            pl.BlockSpec((None, LINES, layout.part), lambda b, p, c: (b, 0, p)),
            of_state,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(dt.shape, dt.dtype),
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
            *(pltpu.VMEM(buffer(layout, CHUNK), jnp.float32) for _ in range(5)),
            pltpu.VMEM((some_states, CHUNK, layout.wide, LINES, LANES), jnp.float32),
            *(pltpu.VMEM((some_states, CHUNK * LINES, LANES), jnp.float32) for _ in range(2)),
            pltpu.VMEM((some_states, layout.wide, LINES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"selective_scan_backward_{layout.part}",
    )(x, dt, dy, rates, B, C, D, marks, saved, dstate)


def _kernel(
    layout, x, dt, dy, rates, B, C, D, marks, saved, dstate,
    dx, ddt, dA, dB, dC, dD, carry,
    b, c, mark, inputs, steps, cotangents, of_inputs, of_rates, decayed, of_B, of_C, state,
):  # fmt: skip
    def clear(n, _):
        for of_tokens in (of_B, of_C):
            of_tokens[n] = jnp.zeros(of_tokens.shape[1:], jnp.float32)
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
    tiles_of_part = layout.part // (TILE * layout.wide)
    count = layout.token_groups(layout.chunks - 1 - pl.program_id(2))

    def of_some(n, _):
        """Some registers of channels, and STATES states."""
        tile, group_of_states = n // layout.state_groups, n % layout.state_groups
        first_state, here = group_of_states * STATES, min(layout.states, STATES)
        tiles = pl.ds(tile * layout.wide, layout.wide)

        def lines(token):
            return pl.ds(pl.multiple_of(token * LINES, LINES), LINES)

        def rows(i):
            row, at = pl.multiple_of(i * TOKENS, TOKENS), pl.multiple_of(tile * TILE * layout.wide, TILE)
            return Rows(layout, row, at, None if mark is None else mark.at[0])

        def bring(i):
            group, first = rows(i), i * (TOKENS // LINES)

            def turn(k, _):
                step = group.read(dt, k)
                put_rows(inputs, first, k, group.real(step * group.read(x, k), k))
                put_rows(steps, first, k, group.step(step, k))
                put_rows(cotangents, first, k, group.real(group.read(dy, k), k))
                return 0

            unrolled(LINES * layout.wide, turn, 0)

        def ahead(i, _):
            for first in range(0, here, layout.together):
                local, states = pl.ds(first, layout.together), pl.ds(first_state + first, layout.together)
                rate = rates[states, tiles]

                def visit(t, h, local=local, states=states, rate=rate, first=first):
                    at, now = token(i * (TOKENS // LINES), t), i * TOKENS + t
                    u = jnp.exp2(steps[at][None] * rate) * h
                    decayed[local, now] = u
                    h = u + inputs[at][None] * weight(b, states, now)
                    of_C[local, lines(now)] += (h * cotangents[at][None]).sum(1)
                    return h

                state[local] = unrolled(TOKENS, visit, state[local])
            bring(jnp.minimum(i + 1, count - 1))
            return 0

        def back(j, _):
            i = count - 1 - j
            for first in range(0, here, layout.together):
                local, states = pl.ds(first, layout.together), pl.ds(first_state + first, layout.together)
                rate = rates[states, tiles]

                def visit(t, gradients, local=local, states=states, rate=rate, first=first):
                    t, (later, of_rate) = TOKENS - 1 - t, gradients
                    at, now = token(i * (TOKENS // LINES), t), i * TOKENS + t
                    step = steps[at][None]
                    g = later + weight(c, states, now) * cotangents[at][None]
                    of_B[local, lines(now)] += (g * inputs[at][None]).sum(1)
                    of_decay = g * decayed[local, now]
                    of_input, of_step = (g * weight(b, states, now)).sum(0), (of_decay * rate).sum(0)
                    if first > 0:
                        of_input, of_step = of_input + of_inputs[at], of_step + of_rates[at]
                    elif layout.state_groups > 1:
                        kept = group_of_states > 0
                        of_input += jnp.where(kept, of_inputs[at], 0)
                        of_step += jnp.where(kept, of_rates[at], 0)
                    of_inputs[at], of_rates[at] = of_input, of_step
                    return jnp.exp2(step * rate) * g, of_rate + of_decay * step

                gradients = unrolled(TOKENS, visit, (carry[states, tiles], dA[states, tiles]))
                carry[states, tiles], dA[states, tiles] = gradients
            return 0

        def write(i, _):
            group, first = rows(i), i * (TOKENS // LINES)

            def turn(k, _):
                of_input, of_step = take_rows(of_inputs, first, k), take_rows(of_rates, first, k) * math.log(2)
                of_y, of_x = group.real(group.read(dy, k), k), group.real(group.read(x, k), k)
                group.write(dx, k, of_input * group.real(group.read(dt, k), k) + of_y * D[0:1, group.lanes(k)])
                group.write(ddt, k, group.real(of_step, k) + of_input * of_x)
                skipped = of_y * of_x
                dD[:, group.lanes(k)] += skipped[:LINES] + skipped[LINES:]
                return 0

            return unrolled(LINES * layout.wide, turn, 0)

        state[...] = saved[pl.ds(first_state, here), tiles]
        bring(0)
        jax.lax.fori_loop(0, count, ahead, 0)
        jax.lax.fori_loop(0, count, back, 0)

        @pl.when((layout.state_groups > 1) | (tile == tiles_of_part - 1))
        def _():
            for of_token, out in ((of_C, dC), (of_B, dB)):
                jax.lax.fori_loop(0, here, functools.partial(sum_up, of_token, out, first_state), 0)

        @pl.when(group_of_states == layout.state_groups - 1)
        def _():
            jax.lax.fori_loop(0, count, write, 0)

        return 0

    jax.lax.fori_loop(0, tiles_of_part * layout.state_groups, of_some, 0)


def sum_up(of_tokens, out, first_state, n, _):
    """Adds a register for each token, `[CHUNK * 8, 128]`, up over its channels: a row of `out`. Leaves 0 behind."""
    # every eighth line is one of each token
    lines = (of_tokens[n, pl.ds(line, CHUNK, stride=LINES), :] for line in range(LINES))
    out[pl.ds(first_state + n, 1), :] += functools.reduce(operator.add, lines).T.sum(0, keepdims=True)
    of_tokens[n] = jnp.zeros(of_tokens.shape[1:], jnp.float32)
    return 0

"""The forward of the selective scan on a TPU.

The grid goes over rows of the batch, parts of the channels and, in order, chunks of tokens. A step loops over groups of
16 tokens x 2,048 channels, two states at a time, which stay in registers meanwhile: an exponential, four products and
two sums for each token, state and 1,024 channels. The next group's x and dt are transposed behind them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.mosaic_tpu_tiles import (
    CHUNK, GROUPS, LANES, LINES, STATES, TILE, TOKENS, VMEM_LIMIT, Layout, Rows, in_order, put_rows, spread, take_rows,
    token, unrolled, weight,
)  # fmt: skip

INPUT, STEP, OUTPUT = range(3)  # what is kept of two groups of tokens, by turns
AHEAD = 6  # hides how long a token takes


def forward(layout: Layout, x, dt, rates, B, C, D, marks, initial_state, gate, save: bool):
    """Returns y like x, the final state, and the states before each chunk `[B, T / CHUNK, N, ., 8, 128]` or None.

    x, dt, gate: `[B, T, D]`, the last one maybe None. rates: A log2(e), float32 `[N, ., 8, 128]`, channels filled up to
    whole parts; so are the states `[B, N, ., 8, 128]` and D, `[1, channels]`. B, C: float32 `[B, N filled up to lines,
    T filled up to chunks]`, 0 for padding. marks: likewise, in the first of 8 lines, or None.
    """
    of_channels = (layout.states, layout.part // TILE, LINES, LANES)
    of_tokens = pl.BlockSpec((None, CHUNK, layout.part), lambda b, p, c: (b, c, p))
    of_state = pl.BlockSpec((None, *of_channels), lambda b, p, c: (b, 0, p, 0, 0))
    of_weights = pl.BlockSpec((None, B.shape[1], CHUNK), lambda b, p, c: (b, 0, c))
    of_saved = pl.BlockSpec((None, None, *of_channels), lambda b, p, c: (b, c, 0, p, 0, 0))
    saved = (x.shape[0], layout.chunks, *initial_state.shape[1:])
    return pl.pallas_call(
        functools.partial(_kernel, layout),
        grid=(x.shape[0], layout.parts, layout.chunks),
        in_specs=[
            of_tokens,
            of_tokens,
            pl.BlockSpec(of_channels, lambda b, p, c: (0, p, 0, 0)),
            of_weights,
            of_weights,
            pl.BlockSpec((1, layout.part), lambda b, p, c: (0, p)),
            None if marks is None else pl.BlockSpec((None, LINES, CHUNK), lambda b, p, c: (b, 0, c)),
            of_state,
            None if gate is None else of_tokens,
        ],
        out_specs=[of_tokens, of_state, of_saved if save else None],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(initial_state.shape, jnp.float32),
            jax.ShapeDtypeStruct(saved, jnp.float32) if save else None,
        ],
        scratch_shapes=[
            pltpu.VMEM((layout.states, CHUNK, LANES), jnp.float32),
            pltpu.VMEM((layout.states, CHUNK, LANES), jnp.float32),
            None if marks is None else pltpu.VMEM((1, CHUNK, LANES), jnp.float32),
            pltpu.VMEM((3, layout.wide, 2 * GROUPS, LINES * LINES, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"selective_scan_forward_{layout.part}",
    )(x, dt, rates, B, C, D, marks, initial_state, gate)


def _kernel(
    layout, x, dt, rates, B, C, D, marks, initial_state, gate, y, state, saved, b, c, mark, kept,
):  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial_state[...]

    if saved is not None:
        saved[...] = state[...]
    spread(B, b)
    spread(C, c)
    if marks is not None:
        spread(marks, mark)
    groups = layout.token_groups(pl.program_id(2))
    count = layout.part // (TILE * layout.wide) * groups

    def rows(n):
        row, at = pl.multiple_of(n % groups * TOKENS, TOKENS), pl.multiple_of(n // groups * TILE * layout.wide, TILE)
        return Rows(layout, row, at, None if mark is None else mark.at[0])

    def bring(n):
        group, half = rows(n), n % 2 * GROUPS

        def turn(k, _):
            step = group.read(dt, k)
            put_rows(kept.at[INPUT], half, k, group.real(step * group.read(x, k), k))
            put_rows(kept.at[STEP], half, k, group.step(step, k))
            return 0

        unrolled(LINES * layout.wide, turn, 0)

    def visit(n, written):
        group, half = rows(n), n % 2 * GROUPS  # and so is `written`, which the compiler does not know
        tiles = pl.ds(n // groups * layout.wide, layout.wide)

        def scan(first, fresh):
            """The recurrence of a few states, whose outputs are added up.

            Nothing holds the compiler back when a loop's body begins: hence `written`, of the first states' outputs.
            """
            states = pl.ds(first, layout.together(layout.wide))
            rate = rates[states, tiles]

            def load(t):
                at = token(half, t)
                return kept[STEP, :, *at][None], kept[INPUT, :, *at][None], 0 if fresh else kept[OUTPUT, :, *at]

            def of_states(spread, t):
                return weight(spread, states, t)[:, None]

            def step(t, loaded, h):
                now, (size, inputs, before) = group.row + t, loaded
                h = jnp.exp2(size * rate) * h + inputs * of_states(b, now)
                kept[OUTPUT, :, *token(written if fresh else half, t)] = before + (h * of_states(c, now)).sum(0)
                return h

            state[states, tiles] = in_order(TOKENS, AHEAD, load, step, state[states, tiles])

        if layout.state_groups == 1:
            for first in range(0, layout.states, layout.together(layout.wide)):
                scan(first, first == 0)
        else:
            kept[OUTPUT] = jnp.zeros(kept.shape[1:], jnp.float32)

            def some(i, _):
                for first in range(0, STATES, layout.together(layout.wide)):
                    scan(i * STATES + first, False)
                return 0

            jax.lax.fori_loop(0, layout.state_groups, some, 0)

        def write(k, _):
            out = take_rows(kept.at[OUTPUT], half, k) + group.read(x, k) * D[0:1, group.lanes(k)]
            if gate is not None:
                out = out * jax.nn.silu(group.read(gate, k))
            group.write(y, k, group.real(out, k))
            return 0

        unrolled(LINES * layout.wide, write, 0)
        bring(jnp.minimum(n + 1, count - 1))
        return GROUPS - written

    bring(0)
    jax.lax.fori_loop(0, count, visit, 0)

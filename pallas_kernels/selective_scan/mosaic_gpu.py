"""The selective scan in Pallas kernels for Hopper GPUs (H100, H200) and Blackwell's B200, by Mosaic GPU.

Here: which calls they take, how arguments are filled up, and how work is cut; the kernels are in the modules beside it.
x, dt, B, C and the gate are read, and y and their cotangents written, where they lie and in the dtypes that they have.
Copied are only widths that are no multiple of 32, and states that are no power of 2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices
from pallas_kernels.parts import MULTIPROCESSORS
from pallas_kernels.segments import document_starts
from pallas_kernels.selective_scan import chunked, mosaic_gpu_parts
from pallas_kernels.selective_scan.mosaic_gpu_backward import backward
from pallas_kernels.selective_scan.mosaic_gpu_forward import forward
from pallas_kernels.selective_scan.mosaic_gpu_plan import F32, LARGEST_TILE, LINES, WORDS, Plan
from pallas_kernels.selective_scan.mosaic_gpu_step import step

MOST = 128  # states of a channel
# Backward, by the states of a channel: tokens of a tile, those together, those whose sums are made together. What they
# are bound by are registers (states and decays of those together) and shared memory (kept states, lines of sums).
BACKWARD = {8: (32, 8, 8), 16: (32, 4, 4), 32: (32, 4, 2), 64: (16, 2, 1), 128: (8, 1, 1)}


def supports(x, dt, A, B, C, D, initial_state, segment_ids, gate) -> str | None:
    """None, or what about the call is not supported."""
    device = devices.current()
    if not device.copies_tiles:
        return f"by Mosaic GPU needs a Hopper or Blackwell GPU, and this is {device.kind or device.platform}"
    if A.shape[1] > MOST:
        return f"by Mosaic GPU has up to {MOST} states of a channel, and these are {A.shape[1]}"
    if any(a is not None and a.dtype == np.float64 for a in (x, dt, A, B, C, D, initial_state, gate)):
        return "by Mosaic GPU computes in float32, and float64 is asked for"
    return None


def run(x, dt, A, B, C, D, initial_state, segment_ids, gate):
    """See `api.selective_scan`; arguments are checked there. Differentiable once, in reverse."""
    batch, length, width = x.shape
    states = A.shape[1]
    D = jnp.zeros((width,), F32) if D is None else D
    state = jnp.zeros((batch, width, states), F32) if initial_state is None else initial_state.astype(F32)
    x, dt, D, gate = (None if a is None else _fill(a, -1, LINES) for a in (x, dt, D, gate))
    B, C = (_fill_states(a) for a in (B, C))
    A, state = (_fill_states(_fill(a, -2, LINES)) for a in (A, state))
    call = _one_token if length == 1 else _scan
    y, state = call(x, dt, A, B, C, D, state, gate, segment_ids)
    return y[..., :width], state[:, :width, :states]


def _fill(a, axis, multiple):
    missing = -a.shape[axis] % multiple
    pads = [(0, 0)] * a.ndim
    pads[axis] = (0, missing)
    return jnp.pad(a, pads) if missing else a


def _fill_states(a):
    """Zeros after the states, up to a power of 2."""
    return _fill(a, -1, max(8, 1 << (a.shape[-1] - 1).bit_length()))


@jax.custom_vjp
def _scan(x, dt, A, B, C, D, state, gate, segment_ids):
    (y, final), _ = _forward(x, dt, A, B, C, D, state, gate, segment_ids, save=False)
    return y, final


def _forward(x, dt, A, B, C, D, state, gate, segment_ids, save=True):
    batch, length, width = x.shape
    states = A.shape[1]
    tokens = BACKWARD[states][0] if save else LARGEST_TILE
    parts, part_tiles = mosaic_gpu_parts.cut(batch, length, width)
    plan = Plan(LINES, states, tokens, max(1, min(8, 128 // states)), 1, parts, part_tiles * (LARGEST_TILE // tokens))
    arrays = {"x": x, "dt": dt, "B": B, "C": C} | _gated(gate) | _carries(plan, segment_ids)
    if parts > 1:
        before = mosaic_gpu_parts.before_parts(plan, _without(arrays, "C", "gate"), A, state)
    else:
        before = state[:, None]
    y, final, *saved = forward(plan, arrays, A, D, before, save)
    return (y, final[:, -1]), (x, dt, A, B, C, D, gate, segment_ids, *saved)


def _backward(residuals, cotangents):
    x, dt, A, B, C, D, gate, segment_ids, saved = residuals
    dy, dfinal = cotangents
    batch, length, width = x.shape
    states = A.shape[1]
    # Twice the channels for each sum over them, where that leaves no multiprocessor without a block.
    wide = width % (2 * LINES) == 0 and states <= 16 and batch * width >= 2 * LINES * MULTIPROCESSORS
    tokens, together, summed = BACKWARD[states]
    parts, part_tiles = mosaic_gpu_parts.cut(batch, length, width)
    part_tiles *= LARGEST_TILE // tokens
    plan = Plan(2 * LINES if wide else LINES, states, tokens, together, summed, parts, part_tiles)
    arrays = {"x": x, "dt": dt, "B": B, "C": C, "dy": dy} | _gated(gate) | _carries(plan, segment_ids)
    if parts > 1:
        after = mosaic_gpu_parts.after_parts(plan, _without(arrays, "x", "B"), A, dfinal)
    else:
        after = dfinal[:, None]
    dx, ddt, dgate, dA, dB, dC, dD, before = backward(plan, arrays, A, D, saved, after)
    dA, dB, dC, dD = (found.astype(a.dtype) for found, a in ((dA, A), (dB, B), (dC, C), (dD, D)))
    return dx, ddt, dA, dB, dC, dD, before[:, 0], dgate, _nothing(segment_ids)


_scan.defvjp(_forward, _backward)


def _gated(gate):
    return {} if gate is None else {"gate": gate}


def _carries(plan, segment_ids):
    """What the kernels know of documents, [B, tiles, tokens]: 1 where the state is carried into a token, 0 where a
    document begins, -1 for padding."""
    if segment_ids is None:
        return {}
    starts, valid = document_starts(segment_ids)
    carries = jnp.where(valid, jnp.where(starts, 0.0, 1.0), -1.0).astype(F32)
    missing = -carries.shape[1] % plan.tokens
    carries = jnp.pad(carries, ((0, 0), (0, missing)), constant_values=-1).reshape(len(carries), -1, plan.tokens)
    return {"carries": _fill(carries, -1, WORDS)}


def _without(arrays, *names):
    return {name: array for name, array in arrays.items() if name not in names}


def _nothing(segment_ids):
    return None if segment_ids is None else np.zeros(segment_ids.shape, jax.dtypes.float0)


@jax.custom_vjp
def _one_token(x, dt, A, B, C, D, state, gate, segment_ids):
    plan = Plan(LINES, A.shape[1], LARGEST_TILE, 1)
    valid = None if segment_ids is None else (segment_ids[:, 0] != 0).astype(F32)
    x, dt, B, C, gate = (None if a is None else a[:, 0] for a in (x, dt, B, C, gate))
    y, state = step(plan, x, dt, A, B, C, D, gate, valid, state)
    return y[:, None], state


def _one_token_forward(*arguments):
    return _one_token(*arguments), arguments


def _one_token_backward(arguments, cotangents):
    """By XLA: nobody trains on one token."""
    *floats, segment_ids = arguments
    _, pullback = jax.vjp(lambda *floats: chunked.run(*floats[:-1], segment_ids, floats[-1]), *floats)
    return *pullback(cotangents), _nothing(segment_ids)


_one_token.defvjp(_one_token_forward, _one_token_backward)

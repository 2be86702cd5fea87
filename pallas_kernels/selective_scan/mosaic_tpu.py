"""The selective scan on a TPU by Pallas kernels (Mosaic): forward, backward and one token.

A call of many tokens reads x, dt and the gate once and writes y once; the small arrays (A, B, C, D, states) are turned
and filled up by XLA before the kernels. What the backward pass keeps is a state for every 128 tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import devices
from pallas_kernels.segments import document_starts, without_padding
from pallas_kernels.selective_scan.mosaic_tpu_backward import backward
from pallas_kernels.selective_scan.mosaic_tpu_forward import forward
from pallas_kernels.selective_scan.mosaic_tpu_step import step
from pallas_kernels.selective_scan.mosaic_tpu_tiles import (
    CHUNK, LANES, LEAST_RATE, LINES, PADDING, REAL, START, STATES, TOGETHER, Layout, layout,
)  # fmt: skip

MOST_STATES = LANES


def supports(x, dt, A, B, C, D, initial_state, segment_ids, gate) -> str | None:
    """None, or what about the call is not supported."""
    platform = devices.current().platform
    if platform != "tpu":
        return f"by Mosaic TPU needs a TPU, and this is {platform}"
    if A.shape[1] > MOST_STATES:
        return f"by Mosaic TPU has at most {MOST_STATES} states a channel, and A has {A.shape[1]}"
    floats = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "gate": gate, "initial_state": initial_state}
    for name, array in floats.items():
        if array is not None and array.dtype not in ("bfloat16", "float32"):
            return f"by Mosaic TPU is for bfloat16 and float32, and {name} is {array.dtype}"
    return None


def run(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "D"] | None,
    initial_state: Float[Array, "B D N"] | None,
    segment_ids: Int[Array, "B T"] | None,
    gate: Float[Array, "B T D"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """See `api.selective_scan`. y in x's dtype, the final state in float32. Differentiable once, in reverse."""
    batch, length, width = x.shape
    states = A.shape[1]
    A, B, C = (a.astype(jnp.float32) for a in (A, B, C))
    D = jnp.zeros((width,), jnp.float32) if D is None else D.astype(jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, width, states), jnp.float32)
    initial_state = initial_state.astype(jnp.float32)
    starts = valid = None
    if segment_ids is not None:
        starts, valid = document_starts(segment_ids)
        B, C = (without_padding(a, valid) for a in (B, C))
    if length == 1:
        x, dt, B, C, gate = (None if a is None else a[:, 0] for a in (x, dt, B, C, gate))
        y, state = _step(x, dt, A.T, B, C, D[None], initial_state.swapaxes(1, 2), gate, valid)
        return y[:, None], state.swapaxes(1, 2)

    filled = states if states <= 2 else _up(states, TOGETHER if states <= STATES else STATES)
    itemsize = max(a.dtype.itemsize for a in (x, gate) if a is not None)
    plan = layout(length, width, filled, batch, itemsize, marked=valid is not None)
    by_channel = functools.partial(_by_channel, plan)
    marks = None
    if plan.marked:
        if valid is None:
            marks = jnp.full((batch, length), REAL, jnp.float32)
        else:
            marks = jnp.where(starts, START, jnp.where(valid, REAL, PADDING))
        marks = _fill(marks[:, None], (batch, LINES, _up(length, CHUNK)))
    weights = (batch, _up(filled, LINES), _up(length, CHUNK))
    B, C = (_fill(a.swapaxes(1, 2), weights) for a in (B, C))
    skips = _fill(D[None], (1, plan.parts * plan.part))
    y, state = _scan(plan, x, dt, by_channel(A), B, C, skips, marks, by_channel(initial_state), gate)
    state = state.reshape(batch, filled, -1)[:, :states, :width].swapaxes(1, 2)
    return y, state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, x, dt, A, B, C, D, marks, initial_state, gate):
    return forward(plan, x, dt, _rates(A), B, C, D, marks, initial_state, gate, save=False)[:2]


def _forward(plan, x, dt, A, B, C, D, marks, initial_state, gate):
    y, state, saved = forward(plan, x, dt, _rates(A), B, C, D, marks, initial_state, gate, save=True)
    return (y, state), (x, dt, A, B, C, D, marks, saved, gate)


def _backward(plan, residuals, cotangents):
    x, dt, A, B, C, D, marks, saved, gate = residuals
    results = backward(plan, x, dt, _rates(A), B, C, D, marks, saved, gate, *cotangents)
    dx, ddt, dgate, dA, dB, dC, dD, dinitial = results
    dmarks = jax.tree.map(jnp.zeros_like, marks)  # nothing flows through it
    return dx, ddt, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum((0, 1))[None], dmarks, dinitial, dgate


_scan.defvjp(_forward, _backward)


@jax.custom_vjp
def _step(x, dt, A, B, C, D, state, gate, valid):
    mask = None if valid is None else valid.astype(jnp.int32)
    return step(x, dt, A * math.log2(math.e), B, C, D, state, gate, mask)


def _step_in_jax(x, dt, A, B, C, D, state, gate, valid):
    """The same in plain JAX, for its gradients: nobody trains on one token."""
    dtype = x.dtype
    x, dt = x.astype(jnp.float32), dt.astype(jnp.float32)
    if valid is not None:
        x, dt, gate = (None if a is None else jnp.where(valid, a, 0) for a in (x, dt, gate))
    state = jnp.exp(dt[:, None] * A[None]) * state + (dt * x)[:, None] * B[..., None]
    y = (state * C[..., None]).sum(1) + x * D
    y = y if gate is None else y * jax.nn.silu(gate.astype(jnp.float32))
    return (y if valid is None else jnp.where(valid, y, 0)).astype(dtype), state


def _step_forward(*arguments):
    *floats, valid = arguments
    return _step(*arguments), (floats, valid)


def _step_backward(residuals, cotangents):
    floats, valid = residuals
    _, pull = jax.vjp(lambda *floats: _step_in_jax(*floats, valid), *floats)
    return *pull(cotangents), None


_step.defvjp(_step_forward, _step_backward)


def _rates(A):
    """A in base 2, and no smaller than what the step of a document's first token turns into a decay to 0."""
    rates = A * math.log2(math.e)
    return jnp.where(jnp.abs(rates) < LEAST_RATE, -LEAST_RATE, rates)


def _by_channel(plan: Layout, a):
    """`[..., D, N]` to `[..., N, channels / 1024, 8, 128]`, filled up with 0."""
    a = a.swapaxes(-1, -2)
    channels = plan.parts * plan.part
    return _fill(a, (*a.shape[:-2], plan.states, channels)).reshape(*a.shape[:-2], plan.states, -1, LINES, LANES)


def _fill(a, shape: tuple[int, ...]):
    return jnp.pad(a, [(0, size - old) for size, old in zip(shape, a.shape, strict=True)])


def _up(size: int, unit: int) -> int:
    return unit * math.ceil(size / unit)

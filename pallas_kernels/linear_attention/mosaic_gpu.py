"""Linear attention in Pallas kernels for Hopper GPUs (H100, H200), by Mosaic GPU.

Chunk-parallel (arXiv 2312.06635, section 4): the states before all chunks by one kernel that goes from chunk to chunk
(`mosaic_gpu_states`), and the rest by kernels that work on all chunks at once. Backward likewise, with the states'
cotangents from the last chunk to the first. What is kept for the backward pass is the inputs and one state a chunk in
their dtype, `B H K V / 64` numbers a token.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic_gpu_states, parts
from pallas_kernels.linear_attention import mosaic_gpu_step, mosaic_gpu_vector
from pallas_kernels.linear_attention.mosaic_gpu_backward import gradients
from pallas_kernels.linear_attention.mosaic_gpu_forward import outputs
from pallas_kernels.linear_attention.mosaic_gpu_tables import CHUNK, SINCE, UNTIL, tables
from pallas_kernels.linear_attention.parts import in_parts
from pallas_kernels.linear_attention.reference import empty_state
from pallas_kernels.mosaic_gpu_states import recurrence


def supports(q, k, v, log_decay, initial_state, segment_ids, scale, bonus=None) -> str | None:
    """None, or what about the call is not supported."""
    return mosaic_gpu_states.supports(q.shape[3], v.shape[3], q.dtype)


def run(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | Float[Array, "H"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    bonus: Float[Array, "H K"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `linear_attention`. Differentiable once, in reverse. Long sequences of few heads go in parts (`parts.count`)."""
    batch, length, heads, width = v.shape
    state = empty_state(q, v) if initial_state is None else initial_state.astype(jnp.float32)
    call = q, k, v, log_decay, state, segment_ids, scale, bonus
    if length == 1:
        return mosaic_gpu_step.attend(*call)
    chains = batch * heads * -(-q.shape[3] // 128) * -(-width // 128)  # blocks of the pass over the states
    count = parts.count(chains, length)
    return in_parts(_run, count, *call) if count > 1 else _run(*call)


def _run(q, k, v, log_decay, state, segment_ids, scale, bonus):
    length = v.shape[1]
    if log_decay is not None and log_decay.ndim == 4:
        return mosaic_gpu_vector.attend(q, k, v, log_decay, state, segment_ids, scale, bonus)
    found = tables(log_decay, segment_ids, v.shape[:3], exclusive=bonus is not None)
    # Shared memory is filled in tiles of 8 lines, and the copy knows only whole tiles to be outside of an array.
    filled = (jnp.pad(x, ((0, 0), (0, -length % 8), (0, 0), (0, 0))) if length % 8 else x for x in (q, k, v))
    o, last = _attend(scale, *filled, found, state)
    o = o[:, :length]
    if bonus is not None:
        valid = None if segment_ids is None else segment_ids != 0
        o = (o.astype(jnp.float32) + mosaic_gpu_vector.own_values(q, k, v, bonus, scale, valid)).astype(v.dtype)
    return o, last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, tables, state):
    return _forward(scale, q, k, v, tables, state)[0]


def _forward(scale, q, k, v, tables, state):
    until = tables.tokens[:, :, UNTIL]
    before, last = recurrence(CHUNK, tables.total, state, products_of=(k, v), until=until)
    o = outputs(scale, q, k, v, tables, before)
    return (o, last), (q, k, v, tables, before)


def _backward(scale, residuals, cotangents):
    q, k, v, tables, before = residuals
    do, d_last = cotangents
    since = tables.tokens[:, :, SINCE] * scale
    after, d_state = recurrence(CHUNK, tables.total, d_last, products_of=(q, do), until=since, reverse=True)
    dq, dk, dv, d_tokens, d_total = gradients(scale, q, k, v, tables, before, after, do)
    return dq, dk, dv, tables._replace(tokens=d_tokens, total=d_total), d_state


_attend.defvjp(_forward, _backward)

"""Linear attention token by token: the truth that every other form is held to."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import document_index


def step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    keep: Float[Array, "B H"],
    valid: Float[Array, "B"],
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """One token: S <- keep S + k v^T and o = q S; where `valid` is 0 the state stays as it is and o is 0."""
    written = keep[:, :, None, None] * state + k[:, :, :, None] * v[:, :, None, :]
    state = jnp.where(valid[:, None, None, None] != 0, written, state)
    return state, jnp.sum(q[:, :, :, None] * state, axis=2) * valid[:, None, None]


def reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"] | Float[Array, "H"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `linear_attention`. Memory of the backward pass: one state for every token."""
    dtype = np.promote_types(q.dtype, np.float32)
    per_token = token_inputs(q, k, v, log_decay, segment_ids, scale)
    state = empty_state(q, v) if initial_state is None else initial_state.astype(dtype)
    state, o = jax.lax.scan(lambda s, x: step(s, *x), state, per_token)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state


def token_inputs(q, k, v, log_decay, segment_ids, scale):
    """What `step` takes for each token, time first: q (scaled), k, v, keep, valid."""
    dtype = np.promote_types(q.dtype, np.float32)
    batch, length, heads = q.shape[:3]
    log_decay = jnp.zeros(heads) if log_decay is None else log_decay
    keep = jnp.broadcast_to(jnp.exp(log_decay.astype(dtype)), (batch, length, heads))
    valid = jnp.ones((batch, length), dtype)
    if segment_ids is not None:
        index, real = document_index(segment_ids)
        starts = jnp.diff(index, axis=1, prepend=jnp.zeros_like(index[:, :1])) > 0
        keep = jnp.where(starts[:, :, None], jnp.zeros((), dtype), keep)
        valid = real.astype(dtype)
    tokens = (q.astype(dtype) * scale, k.astype(dtype), v.astype(dtype), keep, valid)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)


def empty_state(q: Float[Array, "B T H K"], v: Float[Array, "B T H V"]) -> Float[Array, "B H K V"]:
    batch, _, heads, width = q.shape
    return jnp.zeros((batch, heads, width, v.shape[-1]), np.promote_types(q.dtype, np.float32))

"""The delta rule token by token: the truth that every other form is held to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import document_starts


class Tokens(NamedTuple):
    """The inputs with padding and boundaries worked into them, as `mark_documents` makes them."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    a: Float[Array, "B T H K"]
    b: Float[Array, "B T H K"]
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H 1"]


def mark_documents(q, k, v, a, b, log_decay, segment_ids) -> Tokens:
    """Padding and boundaries said by the inputs themselves, so that no form has to know of them.

    Padding: all vectors 0 and no decay, the step that changes nothing. A boundary: decay to 0, and a = 0 because u_t
    reads the state before it decays.
    """
    batch, length, heads = q.shape[:3]
    dtype = np.promote_types(q.dtype, np.float32)
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), dtype)
    log_decay = log_decay.astype(dtype).reshape(batch, length, heads, -1)
    if segment_ids is not None:
        starts, valid = (x[:, :, None, None] for x in document_starts(segment_ids))
        q, k, v, a, b, log_decay = (
            jnp.where(valid, x, jnp.zeros((), x.dtype)) for x in (q, k, v, a, b, log_decay)
        )
        a = jnp.where(starts, jnp.zeros((), a.dtype), a)
        log_decay = jnp.where(starts, jnp.asarray(-jnp.inf, dtype), log_decay)
    return Tokens(q, k, v, a, b, log_decay)


def step(
    state: Float[Array, "B H K V"], token: Tokens, scale: float
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """One token (fields without T): u = a S, S <- exp(g) S + b u^T + k v^T, o = scale q S."""
    q, k, v, a, b, log_decay = (x.astype(state.dtype)[..., None] for x in token)
    u = jnp.sum(a * state, axis=2)
    write = b * u[:, :, None, :] + k * jnp.swapaxes(v, 2, 3)
    state = jnp.exp(log_decay) * state + write
    return state, jnp.sum(scale * q * state, axis=2)


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `delta_rule`. Memory of the backward pass: a few states for every token."""
    tokens = mark_documents(q, k, v, a, b, log_decay, segment_ids)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state, o = jax.lax.scan(lambda s, token: step(s, token, scale), first_state(q, v, initial_state), tokens)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state


def first_state(q, v, initial_state):
    """`initial_state` in the dtype of states; zeros if None."""
    batch, _, heads, width = q.shape
    dtype = np.promote_types(q.dtype, np.float32)
    if initial_state is None:
        return jnp.zeros((batch, heads, width, v.shape[-1]), dtype)
    return initial_state.astype(dtype)

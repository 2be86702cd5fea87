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
    keep: Float[Array, "B H 1"] | Float[Array, "B H K"],
    valid: Float[Array, "B"],
    own: Float[Array, "B H"] | None = None,
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """One token: S <- diag(keep) S + k v^T and o = q S, or, with a bonus, o = q S_before + own v.

    Where `valid` is 0 the state stays as it is and o is 0.
    """
    written = keep[..., None] * state + k[:, :, :, None] * v[:, :, None, :]
    if own is None:
        after = jnp.where(valid[:, None, None, None] != 0, written, state)
        return after, jnp.sum(q[:, :, :, None] * after, axis=2) * valid[:, None, None]
    o = jnp.sum(q[:, :, :, None] * state, axis=2) + own[:, :, None] * v
    return jnp.where(valid[:, None, None, None] != 0, written, state), o * valid[:, None, None]


def reference(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | Float[Array, "H"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    bonus: Float[Array, "H K"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `linear_attention`. Memory of the backward pass: one state for every token."""
    dtype = np.promote_types(q.dtype, np.float32)
    per_token = token_inputs(q, k, v, log_decay, segment_ids, scale, bonus)
    state = empty_state(q, v) if initial_state is None else initial_state.astype(dtype)
    state, o = jax.lax.scan(lambda s, x: step(s, *x), state, per_token)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state


def token_inputs(q, k, v, log_decay, segment_ids, scale, bonus=None):
    """What `step` takes for each token, time first: q (scaled), k, v, keep, valid, own (None without a bonus)."""
    dtype = np.promote_types(q.dtype, np.float32)
    batch, length, heads = v.shape[:3]
    q, k = for_each_head(q, heads), for_each_head(k, heads)
    log_decay = jnp.zeros(heads, dtype) if log_decay is None else log_decay.astype(dtype)
    keep = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    keep = jnp.broadcast_to(keep, (batch, length, *keep.shape[-2:]))
    valid = jnp.ones((batch, length), dtype)
    own = None if bonus is None else read_and_write(q, k, bonus, scale)
    read = q.astype(dtype) * scale
    if segment_ids is not None:
        index, real = document_index(segment_ids)
        starts = (jnp.diff(index, axis=1, prepend=jnp.zeros_like(index[:, :1])) > 0)[:, :, None, None]
        keep = jnp.where(starts, jnp.zeros((), dtype), keep)
        valid = real.astype(dtype)
        if bonus is not None:  # the state that is read is that of the document before
            read = jnp.where(starts, jnp.zeros((), dtype), read)
    tokens = (read, k.astype(dtype), v.astype(dtype), keep, valid, own)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)


def read_and_write(
    q: Float[Array, "*tokens H K"], k: Float[Array, "*tokens H K"], bonus: Float[Array, "H K"] | None, scale: float
) -> Float[Array, "*tokens H"]:
    """How much of its own value a token reads: scale q_t diag(bonus) k_t, or scale q_t k_t without a bonus."""
    dtype = np.promote_types(q.dtype, np.float32)
    own = q.astype(dtype) * scale * k.astype(dtype)
    if bonus is not None:
        own = own * bonus.astype(dtype).reshape((1,) * (q.ndim - 2) + bonus.shape)
    return jnp.sum(own, axis=-1)


def as_log_decay(log_decay: Float[Array, "*any"], dtype: np.dtype) -> Float[Array, "*any"]:
    """No less than where exp becomes 0 in this dtype (-104 in float32), so that sums of log decays stay small."""
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    return jnp.maximum(log_decay.astype(dtype), jnp.asarray(np.log(smallest) - 1.0, dtype))


def product(formula: str, a: Array, b: Array) -> Array:
    """A matrix product in full precision."""
    return jnp.einsum(formula, a, b, precision=jax.lax.Precision.HIGHEST)


def for_each_head(x: Float[Array, "B T G K"], heads: int) -> Float[Array, "B T H K"]:
    """q or k of the groups, repeated for the heads that share them."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def empty_state(q: Float[Array, "B T G K"], v: Float[Array, "B T H V"]) -> Float[Array, "B H K V"]:
    batch, _, heads, width = v.shape
    return jnp.zeros((batch, heads, q.shape[-1], width), np.promote_types(q.dtype, np.float32))

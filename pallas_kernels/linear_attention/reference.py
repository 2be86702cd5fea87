"""Linear attention token by token: the truth that every other form is held to."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.segments import document_starts


def step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    keep: Float[Array, "B H 1"] | Float[Array, "B H K"],
    valid: Bool[Array, "B"] | None,
    own: Float[Array, "B H"] | None = None,
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """One token: S <- diag(keep) S + k v^T and o = q S, or, with a bonus, o = q S_before + own v.

    Where `valid` is False the state stays as it is and o is 0; None: it is True everywhere.
    """
    written = keep[..., None] * state + k[:, :, :, None] * v[:, :, None, :]
    read = written if own is None else state
    o = jnp.sum(q[:, :, :, None] * read, axis=2)
    if own is not None:
        o = o + own[:, :, None] * v
    if valid is None:
        return written, o
    zero = jnp.zeros((), o.dtype)
    return jnp.where(valid[:, None, None, None], written, state), jnp.where(valid[:, None, None], o, zero)


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
    """See `linear_attention`. Memory of the backward pass: one state for every token."""
    dtype = np.promote_types(q.dtype, np.float32)
    starts, valid = (None, None) if segment_ids is None else document_starts(segment_ids)
    tokens = token_inputs(q, k, v, log_decay, starts, valid, scale, bonus)
    per_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state = empty_state(q, v) if initial_state is None else initial_state.astype(dtype)
    state, o = jax.lax.scan(lambda s, x: step(s, *x), state, per_token)
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state


def token_inputs(q, k, v, log_decay, starts, valid, scale, bonus=None):
    """What `step` takes for each token, `[B, T, ...]`: q (scaled), k, v, keep, valid, own (None without a bonus).

    starts, valid: as `document_starts` gives them, or None.
    """
    dtype = np.promote_types(q.dtype, np.float32)
    batch, length, heads = v.shape[:3]
    q, k = for_each_head(q, heads), for_each_head(k, heads)
    log_decay = jnp.zeros(heads, dtype) if log_decay is None else log_decay.astype(dtype)
    keep = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    keep = jnp.broadcast_to(keep, (batch, length, *keep.shape[-2:]))
    own = None if bonus is None else read_and_write(q, k, bonus, scale)
    read = q.astype(dtype) * scale
    if starts is not None:
        starts = starts[:, :, None, None]
        keep = jnp.where(starts, jnp.zeros((), dtype), keep)
        if bonus is not None:  # the state that is read is that of the document before
            read = jnp.where(starts, jnp.zeros((), dtype), read)
    return read, k.astype(dtype), v.astype(dtype), keep, valid, own


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

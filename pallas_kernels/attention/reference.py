"""Softmax attention with every score written out: the truth that every other implementation is held to."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    documents: Int[Array, "B T"],
    kv_documents: Int[Array, "B S"],
    positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    *,
    causal: bool,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    alibi_slopes: Float[Array, "H"] | None,
) -> Float[Array, "B T H V"]:
    """`softmax(soft_cap(scale q k^T) - slopes distance, over the keys that are seen) v`; 0 where no key is seen.

    See `api.attention`.
    """
    batch, length, heads, _ = q.shape
    dtype = np.promote_types(q.dtype, np.float32)
    groups = q.reshape(batch, length, k.shape[2], -1, q.shape[3]).astype(dtype)  # G groups of H / G heads
    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btgrk,bsgk->bgrts", groups, k.astype(dtype), precision=precision) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)

    distance = positions[:, :, None] - kv_positions[:, None, :]
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(dtype).reshape(1, k.shape[2], -1, 1, 1)
        scores -= slopes * distance.astype(dtype)[:, None, None]
    seen = (documents[:, :, None] == kv_documents[:, None, :]) & (kv_documents[:, None, :] != 0)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    weights = jax.nn.softmax(scores, axis=-1, where=seen[:, None, None])
    out = jnp.einsum("bgrts,bsgv->btgrv", weights, v.astype(dtype), precision=precision)
    return out.reshape(batch, length, heads, -1).astype(q.dtype)

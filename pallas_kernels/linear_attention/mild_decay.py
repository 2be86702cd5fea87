"""A chunk of linear attention with a decay for each key channel, where the decays are mild (see `pallas_kernels.mild`).

In the coordinates of the chunk's middle it is linear attention without decay,

    o_i = q_i (S + sum_{j <= i} k_j v_j^T)        S <- S + sum_j k_j v_j^T

so that products of whole chunks do everything, forward and backward.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import mild
from pallas_kernels.linear_attention.reference import product

# The arguments below: the state before the chunk; q (scaled), k, v, log_decay; where documents start, or None; exclusive:
# whether a token reads the state before its own decay and value.


def forward(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H C K"],
    k: Float[Array, "B H C K"],
    v: Float[Array, "B H C V"],
    log_decay: Float[Array, "B H C K"],
    starts: Bool[Array, "B C"] | None,
    exclusive: bool,
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H C V"]]:
    """The state after the chunk, and its outputs."""
    scales = mild.scales(log_decay)
    masks = _masks(starts, q.shape[2], exclusive)
    state = scales.first[..., None] * state
    q, k = q * (scales.sooner if exclusive else scales.reader), k * scales.writer
    scores = _keep(masks.same, product("zhik,zhjk->zhij", q, k))
    o = product("zhij,zhjv->zhiv", scores, v) + product("zhik,zhkv->zhiv", _keep(masks.first, q), state)
    state = _keep(masks.through, state) + product("zhjk,zhjv->zhkv", _keep(masks.last, k), v)
    return scales.last[..., None] * state, o


def backward(state, q, k, v, log_decay, starts, exclusive, d_state, d_o):
    """The cotangents of state, q, k, v and log_decay, given those of what `forward` returns."""
    scales = mild.scales(log_decay)
    masks = _masks(starts, q.shape[2], exclusive)
    reader = scales.sooner if exclusive else scales.reader
    before, q, k = scales.first[..., None] * state, q * reader, k * scales.writer
    d_state = scales.last[..., None] * d_state
    scores = _keep(masks.same, product("zhik,zhjk->zhij", q, k))
    d_scores = _keep(masks.same, product("zhiv,zhjv->zhij", d_o, v))
    d_q = product("zhij,zhjk->zhik", d_scores, k) + _keep(masks.first, product("zhiv,zhkv->zhik", d_o, before))
    d_kept = _keep(masks.last, product("zhjv,zhkv->zhjk", v, d_state))  # of the keys as the state after the chunk has them
    d_k = product("zhij,zhik->zhjk", d_scores, q) + d_kept
    d_v = product("zhij,zhiv->zhjv", scores, d_o) + product("zhjk,zhkv->zhjv", _keep(masks.last, k), d_state)
    d_state = _keep(masks.through, d_state)
    d_before = d_state + product("zhik,zhiv->zhkv", _keep(masks.first, q), d_o)
    read, none = q * d_q, jnp.zeros_like(q)
    after = jnp.sum(before * d_state, axis=-1) + jnp.sum(k * d_kept, axis=2)
    d_log_decay = mild.of_log_decay(k * d_k, *((none, read) if exclusive else (read, none)), after)
    return scales.first[..., None] * d_before, d_q * reader, d_k * scales.writer, d_v, d_log_decay


def _masks(starts, length, exclusive):
    lower = jnp.tril(jnp.ones((1, 1, length, length), bool), -1 if exclusive else 0)
    if starts is None:
        return mild.Documents(lower, None, None, None)
    masks = mild.documents(starts)
    return masks._replace(same=masks.same & lower)


def _keep(mask, x):
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))

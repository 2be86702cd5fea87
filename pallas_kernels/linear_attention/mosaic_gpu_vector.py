"""Linear attention with a decay for each key channel on a Hopper GPU (arXiv 2312.06635, section 4).

One kernel makes what decays make of keys and queries (`mosaic_gpu_decays`), one the states before the chunks, and one
the products of these. For the backward pass the inputs and the states are kept, and decays are made again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.mosaic_gpu_decays import decayed
from pallas_kernels.linear_attention.mosaic_gpu_decays_backward import gradients
from pallas_kernels.linear_attention.mosaic_gpu_products import read
from pallas_kernels.linear_attention.mosaic_gpu_products_backward import cotangents
from pallas_kernels.linear_attention.mosaic_gpu_tables import CHUNK
from pallas_kernels.linear_attention.reference import as_log_decay, for_each_head, read_and_write
from pallas_kernels.mosaic_gpu_states import recurrence
from pallas_kernels.segments import document_starts


def attend(q, k, v, log_decay, state, segment_ids, scale, bonus):
    """See `mosaic_gpu.run`; the state is float32."""
    length, heads, float32 = v.shape[1], v.shape[2], np.dtype(np.float32)
    log_decay, exclusive, own = as_log_decay(log_decay, float32), bonus is not None, None
    if segment_ids is not None:
        starts, valid = document_starts(segment_ids)
        # A boundary is a decay to nothing; with a bonus it must come before the token reads.
        nothing = as_log_decay(jnp.full((), -jnp.inf, float32), float32)
        log_decay = _where(valid, jnp.where(starts[:, :, None, None], nothing, log_decay))
        if exclusive:
            own, bonus = own_values(q, k, v, bonus, scale, valid), jnp.zeros_like(bonus)
        q, k = _where(valid & ~starts if exclusive else valid, q), _where(valid, k)
    bonus = jnp.ones((heads, q.shape[3]), jnp.float32) if bonus is None else bonus.astype(jnp.float32)
    # Shared memory is filled in tiles of 8 lines, and the copy knows only whole tiles to be outside of an array.
    filled = (jnp.pad(x, ((0, 0), (0, -length % 8), (0, 0), (0, 0))) if length % 8 else x for x in (q, k, v, log_decay))
    o, last = _attend(scale, exclusive, *filled, bonus, state)
    o = o[:, :length]
    return (o if own is None else (o.astype(jnp.float32) + own).astype(o.dtype)), last


def own_values(q, k, v, bonus, scale, valid):
    """What tokens read of their own values, scale q_i diag(bonus) k_i v_i in float32; 0 where not valid (None: all)."""
    own = read_and_write(for_each_head(q, v.shape[2]), for_each_head(k, v.shape[2]), bonus, scale)
    if valid is not None:
        own = jnp.where(valid[:, :, None], own, jnp.float32(0))
    return own[..., None] * v.astype(jnp.float32)


def _where(mask, x):
    return jnp.where(mask[:, :, None, None], x, jnp.zeros((), x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, exclusive, q, k, v, log_decay, bonus, state):
    return _forward(scale, exclusive, q, k, v, log_decay, bonus, state)[0]


def _forward(scale, exclusive, q, k, v, log_decay, bonus, state):
    scores, reading, writing, total = decayed(scale, exclusive, q, k, log_decay, bonus)
    before, last = recurrence(CHUNK, total, state, products_of=(writing, v))
    return (read(reading, scores, v, before), last), (q, k, v, log_decay, bonus, before)


def _backward(scale, exclusive, residuals, of_results):
    q, k, v, log_decay, bonus, before = residuals
    do, d_last = of_results
    scores, reading, writing, total = decayed(scale, exclusive, q, k, log_decay, bonus)
    after, d_state = recurrence(CHUNK, total, d_last, products_of=(reading, do), reverse=True)

    d_scores, d_reading, d_writing, d_total = cotangents(v, do, before, after)
    dv = read(writing, scores, do, after, transposed=True)
    dq, dk, d_log_decay, d_bonus = gradients(
        scale, exclusive, q, k, log_decay, bonus, d_scores, d_reading, d_writing, total * d_total
    )
    return _of_groups(dq, q), _of_groups(dk, k), dv, d_log_decay, d_bonus, d_state


_attend.defvjp(_forward, _backward)


def _of_groups(x, like):
    """The cotangent of what several heads share."""
    if x.shape == like.shape:
        return x
    x = x.reshape(*like.shape[:3], -1, like.shape[3]).astype(jnp.float32)
    return x.sum(axis=3).astype(like.dtype)

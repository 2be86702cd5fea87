"""Linear attention of long sequences, few rows and few heads: in parts that run at once (see `pallas_kernels.parts`).

What a part makes of the state before it is known without running it: S -> exp(G) S + sum_j exp(G - G_j) k_j v_j^T, with
G_j the sum of its log decays up to token j; one product of matrices for each part.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from pallas_kernels import parts
from pallas_kernels.linear_attention.reference import as_log_decay, empty_state, for_each_head, product


def in_parts(run: Callable, count: int, q, k, v, log_decay, initial_state, segment_ids, scale, bonus):
    """`run(q, ...)`, an implementation of the op, with every row cut into `count` parts, which divides T."""
    batch, length, heads, _ = v.shape
    dtype = np.promote_types(q.dtype, np.float32)
    state = empty_state(q, v) if initial_state is None else initial_state.astype(dtype)
    ids = goes_on = through = None
    if segment_ids is not None:
        ids, goes_on, through = parts.cut_documents(segment_ids, count)
    q, k, v = (parts.cut(x, count) for x in (q, k, v))
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = parts.cut(log_decay, count)

    until, total = _decays(log_decay, ids, v, dtype)
    keys = (for_each_head(k, heads).astype(dtype) * until).astype(k.dtype)
    written = product("blhk,blhv->bhkv", keys, v).astype(dtype)
    if goes_on is not None:
        total = jnp.where((goes_on & through)[:, None, None, None], total, jnp.zeros((), dtype))
    apart = (batch, count)
    before, last = parts.states_before(
        total.reshape(*apart, *total.shape[1:]), written.reshape(*apart, *written.shape[1:]), state
    )
    before = before.reshape(batch * count, *before.shape[2:])
    if goes_on is not None:
        before = jnp.where(goes_on[:, None, None, None], before, jnp.zeros((), dtype))
    o, _ = run(q, k, v, log_decay, before, ids, scale, bonus)
    return o.reshape(batch, length, *o.shape[2:]), last


def _decays(log_decay, ids, v, dtype):
    """From each token to the end of its part, `[P, L, H, K or 1]`, and through all of it, `[P, H, K or 1, 1]`."""
    rows, length, heads, _ = v.shape
    gates = jnp.zeros(heads, dtype) if log_decay is None else as_log_decay(log_decay, dtype)
    gates = gates if gates.ndim == 4 else jnp.broadcast_to(gates, (rows, length, heads))[..., None]
    if ids is not None:
        gates = jnp.where((ids > 0)[:, :, None, None], gates, jnp.zeros((), dtype))
    # sums from the end, none of them a difference of others: a gate of -100 spoils no later one of -1e-6
    sums = jnp.flip(jnp.cumsum(jnp.flip(gates, 1), axis=1), 1)
    until = jnp.exp(jnp.concatenate([sums[:, 1:], jnp.zeros_like(sums[:, :1])], axis=1))
    if ids is not None:  # what is written by documents before the last one, or by padding, is not there at the end
        last = jnp.max(ids, axis=1, keepdims=True)
        until = jnp.where(((ids == last) & (ids > 0))[:, :, None, None], until, jnp.zeros((), dtype))
    return until, jnp.exp(sums[:, 0])[..., None]

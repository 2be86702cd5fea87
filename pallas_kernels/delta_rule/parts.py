"""The delta rule of long sequences, few rows and few heads: in parts that run at once (see `pallas_kernels.parts`).

What a part makes of the state before it, S -> P S + F, is found by running it: F is what it makes of nothing, and P,
`[K, K]`, what it makes of the identity with no values to write. As columns of the state never meet, one run gives both.
"""

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels import parts
from pallas_kernels.delta_rule.reference import first_state


def in_parts(run: Callable, count: int, q, k, v, a, b, log_decay, initial_state, segment_ids, scale):
    """`run(q, ...)`, an implementation of the op, with every row cut into `count` parts, which divides T."""
    batch, length, heads, values = v.shape
    width = q.shape[-1]
    state = first_state(q, v, initial_state)
    ids = goes_on = None
    if segment_ids is not None:
        ids, goes_on, _ = parts.cut_documents(segment_ids, count)
    q, k, v, a, b = (parts.cut(x, count) for x in (q, k, v, a, b))
    log_decay = None if log_decay is None else parts.cut(log_decay, count)

    rows = batch * count
    beside = jnp.concatenate([v, jnp.zeros((*v.shape[:3], width), v.dtype)], axis=-1)
    one = jnp.broadcast_to(jnp.eye(width, dtype=state.dtype), (rows, heads, width, width))
    one = jnp.concatenate([jnp.zeros((rows, heads, width, values), state.dtype), one], axis=-1)
    _, after = run(q, k, beside, a, b, log_decay, one, ids, scale)
    written, transition = after[..., :values], after[..., values:]
    if goes_on is not None:  # a boundary inside of a part has forgotten the identity by itself
        transition = jnp.where(goes_on[:, None, None, None], transition, jnp.zeros((), state.dtype))
    apart = (batch, count, heads, width)
    before, last = parts.states_before(transition.reshape(*apart, width), written.reshape(*apart, values), state)
    before = before.reshape(rows, heads, width, values)
    if goes_on is not None:
        before = jnp.where(goes_on[:, None, None, None], before, jnp.zeros((), state.dtype))
    o, _ = run(q, k, v, a, b, log_decay, before, ids, scale)
    return o.reshape(batch, length, *o.shape[2:]), last

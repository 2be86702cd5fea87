"""Linear attention token by token without a copy of the inputs: on a CPU the fastest form forward."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.chunks import scan_chunks
from pallas_kernels.linear_attention.reference import empty_state, step, token_inputs
from pallas_kernels.segments import document_starts


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
    """See `linear_attention`; what `reference` computes, each token cut out of the arrays where they lie."""
    dtype = np.promote_types(q.dtype, np.float32)
    state = empty_state(q, v) if initial_state is None else initial_state.astype(dtype)
    starts, valid = (None, None) if segment_ids is None else document_starts(segment_ids)
    by_head = log_decay is not None and log_decay.ndim == 1
    shared = log_decay if by_head else None, bonus
    state, o = scan_chunks(
        functools.partial(_token, scale=scale), 1, shared, state, (q, k, v, None if by_head else log_decay, starts, valid)
    )
    return o, state


def _token(shared, state, x, *, scale):
    by_head, bonus = shared
    q, k, v, log_decay, starts, valid = x
    token = token_inputs(q, k, v, log_decay if by_head is None else by_head, starts, valid, scale, bonus)
    state, o = step(state, *jax.tree.map(lambda y: y[:, 0], token))
    return state, o[:, None].astype(v.dtype)

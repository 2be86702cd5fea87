"""The selective scan token by token: the truth that every other form is held to."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import compute_dtype
from pallas_kernels.segments import document_starts, without_padding


def in_one_dtype(x, dt, A, B, C, D, initial_state, gate):
    """The arguments in the dtype of the computation, zeros for a D or an initial state that is None."""
    D = jnp.zeros(A.shape[:1], x.dtype) if D is None else D
    initial_state = jnp.zeros((x.shape[0], *A.shape), x.dtype) if initial_state is None else initial_state
    floats = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "initial_state": initial_state, "gate": gate}
    dtype = compute_dtype(floats)
    return [None if a is None else a.astype(dtype) for a in floats.values()]


def silu_derivative(z):
    """Of z / (1 + exp(-z)), for the kernels' gates."""
    part = jax.nn.sigmoid(z)
    return part * (1 + z * (1 - part))


def run(x, dt, A, B, C, D, initial_state, segment_ids, gate):
    """See `api.selective_scan`. One `lax.scan` step per token; arguments are checked there."""
    given = x.dtype
    x, dt, A, B, C, D, initial_state, gate = in_one_dtype(x, dt, A, B, C, D, initial_state, gate)
    if segment_ids is None:
        valid = jnp.ones(x.shape[:2], bool)
        starts = jnp.zeros(x.shape[:2], bool)
    else:
        starts, valid = document_starts(segment_ids)
        x, dt, B, C = (without_padding(a, valid) for a in (x, dt, B, C))  # their gradients are NaN times 0 otherwise

    def step(h, token):
        x, dt, B, C, valid, starts = token
        h_before = jnp.where(starts[:, None, None], 0, h)
        decay = jnp.exp(dt[:, :, None] * A[None])
        h_after = decay * h_before + (dt * x)[:, :, None] * B[:, None, :]
        y = (h_after * C[:, None, :]).sum(-1) + D[None] * x
        return jnp.where(valid[:, None, None], h_after, h), jnp.where(valid[:, None], y, 0)

    tokens = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (x, dt, B, C, valid, starts))
    final_state, y = jax.lax.scan(step, initial_state, tokens)
    y = y.swapaxes(0, 1)
    if gate is not None:
        y = y * jax.nn.silu(gate if segment_ids is None else without_padding(gate, valid))
    return y.astype(given), final_state

"""The selective scan in chunks, in plain JAX: the default on CPU and wherever no kernel applies.

Within a chunk of C tokens the decays exp(dt A) and the inputs dt B x are computed in bulk, [C, B, N, D] (this is
where the time goes, and what XLA spreads over the cores), a short loop does one multiply-add per token, and the
outputs are summed in bulk. Only one chunk's [C, B, N, D] is ever held. The backward pass saves the states at the
chunks' starts and computes each chunk again. D is the minor axis throughout, so that every loop is a vector loop
for any state size N.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import document_starts, without_padding
from pallas_kernels.selective_scan.reference import in_one_dtype

CHUNK_LENGTH = 16  # tokens whose [B, N, D] are held at once
GROUP_ELEMENTS = 8192  # rows are taken together up to this many elements of [B, N, D], to stay in the cache


def run(x, dt, A, B, C, D, initial_state, segment_ids, gate):
    """See `api.selective_scan`; arguments are checked there."""
    given = x.dtype
    x, dt, A, B, C, D, initial_state, gate = in_one_dtype(x, dt, A, B, C, D, initial_state, gate)
    length = x.shape[1]
    if segment_ids is None:
        starts = None
    else:
        # Padding: dt = 0 makes the step the identity. A boundary: the decay is 0.
        starts, valid = document_starts(segment_ids)
        starts = starts.astype(x.dtype)
        x, dt, B, C = (without_padding(a, valid) for a in (x, dt, B, C))
        gate = None if gate is None else without_padding(gate, valid)
    if length == 1:
        y, final_state = _one_token(x, dt, A, B, C, starts, initial_state)
    else:
        y, final_state = _in_chunks(x, dt, A, B, C, starts, initial_state)
    y = y + D[None, None] * x
    y = y if gate is None else y * jax.nn.silu(gate)
    return (y if segment_ids is None else without_padding(y, valid)).astype(given), final_state


def _one_token(x, dt, A, B, C, starts, state):
    x, dt, B, C = x[:, 0], dt[:, 0], B[:, 0], C[:, 0]
    decay = jnp.exp(dt[:, :, None] * A[None])
    if starts is not None:
        decay = decay * (1 - starts[:, :, None])
    state = decay * state + (dt * x)[:, :, None] * B[:, None, :]
    return (state * C[:, None, :]).sum(-1)[:, None], state


def _in_chunks(x, dt, A, B, C, starts, initial_state):
    batch, length, width = x.shape
    chunk = min(CHUNK_LENGTH, length)
    chunks = -(-length // chunk)
    group = max(g for g in range(1, batch + 1) if batch % g == 0 and (g == 1 or g * A.size <= GROUP_ELEMENTS))

    def split(leaf):  # [B, T, ...] -> [B / g, T / C, C, g, ...]; the added tokens have dt = 0
        leaf = jnp.pad(leaf, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (leaf.ndim - 2))
        leaf = leaf.reshape(batch // group, group, chunks, chunk, *leaf.shape[2:])
        return jnp.moveaxis(leaf, 1, 3)

    tokens = jax.tree.map(split, (x, dt, B, C, starts))
    states = initial_state.swapaxes(1, 2).reshape(batch // group, group, *A.T.shape)
    y, final_state = jax.lax.map(lambda rows: _scan(*rows[0], A.T, rows[1]), (tokens, states))
    y = jnp.moveaxis(y, 3, 1).reshape(batch, chunks * chunk, width)[:, :length]
    return y, final_state.reshape(batch, *A.T.shape).swapaxes(1, 2)


# Below, time comes first: x, dt [T/C, C, B, D]; B, C [T/C, C, B, N]; starts [T/C, C, B] or None; A [N, D];
# h [B, N, D]. `starts` is 1 at the first token after a boundary, else 0.


def _decays_and_inputs(x, dt, B, starts, A):
    """a_t = exp(dt_t A) (0 at a boundary) and b_t = dt_t B_t x_t, both [C, B, N, D]."""
    a = jnp.exp(dt[:, :, None, :] * A[None, None])
    if starts is not None:
        a = a * (1 - starts[:, :, None, None])
    return a, B[..., None] * (dt * x)[:, :, None, :]


def _states(a, b, h):
    """h_t = a_t h_{t-1} + b_t: the last of a chunk, and the states after each token, [C, B, N, D], in the place of b."""

    def step(t, carry):
        h, b = carry
        h = a[t] * h + b[t]
        return h, b.at[t].set(h)

    return jax.lax.fori_loop(0, len(a), step, (h, b))


@jax.custom_vjp
def _scan(x, dt, B, C, starts, A, initial_state):
    def chunk(h, tokens):
        x, dt, B, C, starts = tokens
        a, b = _decays_and_inputs(x, dt, B, starts, A)
        h, states = _states(a, b, h)
        return h, (states * C[..., None]).sum(2)

    h, y = jax.lax.scan(chunk, initial_state, (x, dt, B, C, starts))
    return y, h


def _scan_forward(x, dt, B, C, starts, A, initial_state):
    def chunk(h_start, tokens):
        x, dt, B, C, starts = tokens
        a, b = _decays_and_inputs(x, dt, B, starts, A)
        h, states = _states(a, b, h_start)
        return h, ((states * C[..., None]).sum(2), h_start)

    h, (y, h_starts) = jax.lax.scan(chunk, initial_state, (x, dt, B, C, starts))
    return (y, h), (x, dt, B, C, starts, A, h_starts)


def _scan_backward(saved, cotangents):
    x, dt, B, C, starts, A, h_starts = saved
    dy, dh_final = cotangents

    def chunk(carry, tokens):
        dh, dA = carry
        x, dt, B, C, starts, h_start, dy = tokens
        a, b = _decays_and_inputs(x, dt, B, starts, A)
        _, states = _states(a, b, h_start)
        before = jnp.concatenate([h_start[None], states[:-1]])

        def step(carry, inputs):
            dh, dA = carry  # dh: of the state after token t, from later tokens; dA: of each row, as its sum is cheaper here
            a, before, dt, C, dy = inputs
            dh = dh + C[..., None] * dy[:, None, :]
            of_a = a * dh
            return (of_a, dA + of_a * before * dt[:, None, :]), dh

        (dh, dA), dstates = jax.lax.scan(step, (dh, dA), (a, before, dt, C, dy), reverse=True)
        dlog_a = dstates * before * a  # of dt_t A
        dC = (states * dy[:, :, None, :]).sum(-1)
        dB = (dstates * (dt * x)[:, :, None, :]).sum(-1)
        ddtx = (dstates * B[..., None]).sum(2)
        ddt = (dlog_a * A[None, None]).sum(2) + ddtx * x
        return (dh, dA), (ddtx * dt, ddt, dB, dC)

    carry = (dh_final, jnp.zeros_like(dh_final))
    (dh, dA), (dx, ddt, dB, dC) = jax.lax.scan(chunk, carry, (x, dt, B, C, starts, h_starts, dy), reverse=True)
    dstarts = jax.tree.map(jnp.zeros_like, starts)  # a mask: nothing flows through it
    return dx, ddt, dB, dC, dstarts, dA.sum(0), dh


_scan.defvjp(_scan_forward, _scan_backward)

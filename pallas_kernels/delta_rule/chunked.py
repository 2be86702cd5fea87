"""The delta rule chunk by chunk: matrix products inside a chunk, one state between chunks.

u_t = a_t S_{t-1}, what token t reads before it writes, makes the recurrence a decayed sum of b_j u_j^T + k_j v_j^T.
With D(j, t) the decay exp(g_{j+1} + ... + g_{t-1}) and D(0, t) that since the state S before the chunk,

    u_t = (a_t D(0, t)) S + sum_{j < t} (a_t D(j, t) b_j) u_j + (a_t D(j, t) k_j) v_j

is a unit triangular system in the u of the chunk, (I - A_ab) U = A_a S + A_ak V, and once it is solved

    o_t = (q_t e^g_t D(0, t)) S + sum_{j < t} (q_t e^g_t D(j, t) b_j) u_j + (q_t e^g_t D(j, t) k_j) v_j
          + (q_t b_t) u_t + (q_t k_t) v_t

and the state after the chunk are products of matrices (the WY or UT form: arXiv 2406.06484 section 3.2, 2412.06464
section 3.3). Every exponent is a sum of log decays, so never above 0: nothing can overflow, whatever the gates. Where the
decays of a chunk are mild, `mild_decay.py` does the same in half the time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mild
from pallas_kernels.chunks import scan_chunks
from pallas_kernels.delta_rule import mild_decay
from pallas_kernels.delta_rule.blocks import product, solve
from pallas_kernels.delta_rule.decays import factors, scores
from pallas_kernels.delta_rule.reference import Tokens, first_state, mark_documents, step
from pallas_kernels.segments import document_starts

CHUNK = 32  # a power of two; 16 and 64 take as long or longer on CPU, with one decay a head and with one a channel


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """See `delta_rule`. Any T: the last chunk is filled up with tokens that change nothing.

    Backward: with everything inside a chunk computed again; what is kept is one state a chunk, `B H K V / C` numbers a
    token.
    """
    tokens = mark_documents(q, k, v, a, b, log_decay, segment_ids)
    state = first_state(q, v, initial_state)
    if q.shape[1] == 1:
        state, o = step(state, jax.tree.map(lambda x: x[:, 0], tokens), scale)
        return o[:, None].astype(v.dtype), state

    starts = None if segment_ids is None else document_starts(segment_ids)[0]
    body = functools.partial(_body, scale=scale, dtype=v.dtype)
    state, o = scan_chunks(body, CHUNK, None, state, (tokens, starts))
    return o, state


def _body(shared, state, inputs, *, scale, dtype):
    """One chunk, filled up to a power of two."""
    tokens, starts = inputs
    length = tokens.q.shape[1]
    size = max(2, 1 << (length - 1).bit_length())

    def filled(x):
        return jnp.pad(x, ((0, 0), (0, size - length)) + ((0, 0),) * (x.ndim - 2))

    tokens = tokens._replace(q=tokens.q.astype(state.dtype) * scale)
    tokens = jax.tree.map(lambda x: filled(x.astype(state.dtype)), tokens)
    state, o = _chunk(state, tokens, None if starts is None else filled(starts))
    return state, o[:, :length].astype(dtype)


@jax.custom_vjp
def _chunk(state, tokens, starts):
    """The state after a chunk and its outputs `[B, C, H, V]`; fields of tokens `[B, C, H, ...]`, q scaled.

    Heads go before tokens inside the branches, where XLA does it along with what comes next; around them it is a copy.
    """
    return jax.lax.cond(
        _is_mild(tokens, starts),
        lambda: _second_swapped(mild_decay.forward(state, _swapped(tokens), starts)),
        lambda: _second_swapped(_any_chunk(state, _swapped(tokens))),
    )


def _chunk_fwd(state, tokens, starts):
    return _chunk(state, tokens, starts), (state, tokens, starts)


def _chunk_bwd(inputs, cotangents):
    state, tokens, starts = inputs
    d_state, d_o = cotangents
    d_before, d_tokens = jax.lax.cond(
        _is_mild(tokens, starts),
        lambda: _second_swapped(mild_decay.backward(state, _swapped(tokens), starts, d_state, _swapped(d_o))),
        lambda: _second_swapped(jax.vjp(_any_chunk, state, _swapped(tokens))[1]((d_state, _swapped(d_o)))),
    )
    return d_before, d_tokens, None


_chunk.defvjp(_chunk_fwd, _chunk_bwd)


def _swapped(tree):
    """Heads before tokens, or the other way round."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), tree)


def _second_swapped(pair):
    return pair[0], _swapped(pair[1])


def _is_mild(tokens, starts):
    """But for the starts of documents, which the form for mild decays tells by masks."""
    gates = tokens.log_decay
    if starts is not None:
        gates = jnp.where(starts[:, :, None, None], jnp.zeros((), gates.dtype), gates)
    return mild.is_mild(_swapped(gates))


def _any_chunk(state: Float[Array, "B H K V"], tokens: Tokens):
    """The formulas above, whatever the gates."""
    q, k, v, a, b, log_decay = tokens
    decays = factors(log_decay)
    rows = jnp.stack([a, q * decays.token])
    columns = jnp.stack([b, k])
    tables = scores(rows, columns, decays)
    a_before, q_before = product("rbhtk,bhkv->rbhtv", rows * decays.since[None], state)
    u = solve(tables[0, 0], a_before + product("bhtj,bhjv->bhtv", tables[0, 1], v))
    values = jnp.stack([u, v])
    own = jnp.sum(q[None] * columns, axis=-1, keepdims=True)
    o = q_before + product("lbhtj,lbhjv->bhtv", tables[1], values) + jnp.sum(own * values, axis=0)
    written = product("lbhtk,lbhtv->bhkv", columns * decays.until[None], values)
    return decays.total[..., None] * state + written, o

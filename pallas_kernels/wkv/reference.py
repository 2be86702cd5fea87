"""WKV token by token: the truth that every other form is held to."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from pallas_kernels.segments import document_starts


class WKVState(NamedTuple):
    """The two sums, both divided by exp(max); zeros (whatever `max` then is) are the sums of no token."""

    num: Float[Array, "*rows D"]
    den: Float[Array, "*rows D"]
    max: Float[Array, "*rows D"]


def level(state: WKVState) -> Float[Array, "*rows D"]:
    """The logarithm of the scale of the sums, -inf where they are empty."""
    return jnp.where(state.den > 0, state.max, -jnp.inf)


def hold(state: WKVState) -> WKVState:
    """A caller's state with its `max` made a constant to the gradient, and the sums dependent on it in its place.

    What a state says is num exp(max) and den exp(max), whatever the scale. So every `max` made on the way is a
    constant too: the gradients through the sums are whole without it, and it has a kink wherever two tokens tie.
    """
    constant = stop_gradient(state.max)
    by = jnp.exp(state.max - constant)
    return WKVState(state.num * by, state.den * by, constant)


def step(state: WKVState, token: tuple, log_decay, bonus) -> tuple[WKVState, Array]:
    """One token of every row: `token` is k and v [B, D], and [B, 1] whether it is real and starts a document.

    The state is a held one. Without documents the last two are None.
    """
    k, v, valid, starts = token
    before = state
    if valid is not None:
        before = jax.tree.map(lambda leaf: jnp.where(starts, 0, leaf), state)

    own = bonus + k
    scale = level(before)
    top = stop_gradient(jnp.maximum(scale, own))
    past, now = jnp.exp(scale - top), jnp.exp(own - top)
    y = (past * before.num + now * v) / (past * before.den + now)

    top = stop_gradient(jnp.maximum(scale + log_decay, k))
    # In this order: a decay too small to change `max` still shrinks the sums.
    past, now = jnp.exp((scale - top) + log_decay), jnp.exp(k - top)
    after = WKVState(past * before.num + now * v, past * before.den + now, top)
    if valid is None:
        return after, y
    return jax.tree.map(lambda new, old: jnp.where(valid, new, old), after, state), jnp.where(valid, y, 0)


def run(k, v, log_decay, bonus, initial_state, segment_ids):
    """See `api.wkv`; arguments are checked and of one dtype there. Backward memory: a state for every token."""
    valid = starts = None
    if segment_ids is not None:
        starts, valid = document_starts(segment_ids)
        valid, starts = valid[..., None], starts[..., None]
    tokens = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (k, v, valid, starts))
    one = functools.partial(step, log_decay=log_decay[None], bonus=bonus[None])
    final_state, y = jax.lax.scan(one, hold(initial_state), tokens)
    return y.swapaxes(0, 1), final_state

"""WKV token by token: the truth that every other form is held to."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.segments import document_index


class WKVState(NamedTuple):
    """The two sums, both divided by exp(max); zeros (whatever `max` then is) are the sums of no token."""

    num: Float[Array, "B D"]
    den: Float[Array, "B D"]
    max: Float[Array, "B D"]


def level(state: WKVState) -> Float[Array, "B D"]:
    """The logarithm of the scale of the sums, -inf where they are empty."""
    return jnp.where(state.den > 0, state.max, -jnp.inf)


def highest(state, k, log_decay):
    """The new `max`: the largest exponent of the sums, or the token's own where nothing came before it."""
    return jnp.maximum(level(state) + log_decay, k)


def step(state: WKVState, token: tuple, log_decay, bonus, highest: Callable = highest) -> tuple[WKVState, Array]:
    """One token of every row: `token` is k and v [B, D], and [B, 1] whether it is real and starts a document."""
    k, v, valid, starts = token
    before = state
    if valid is not None:
        before = jax.tree.map(lambda leaf: jnp.where(starts, 0, leaf), state)

    own = bonus + k
    top = jax.lax.stop_gradient(jnp.maximum(level(before), own))  # y does not depend on it
    past, now = jnp.exp(level(before) - top), jnp.exp(own - top)
    y = (past * before.num + now * v) / (past * before.den + now)

    top = highest(before, k, log_decay)
    # In this order: a decay too small to change `max` still shrinks the sums.
    past, now = jnp.exp((level(before) - top) + log_decay), jnp.exp(k - top)
    after = WKVState(past * before.num + now * v, past * before.den + now, top)
    if valid is None:
        return after, y
    return jax.tree.map(lambda new, old: jnp.where(valid, new, old), after, state), jnp.where(valid, y, 0)


def reference(k, v, log_decay, bonus, initial_state, segment_ids):
    """See `api.wkv`; arguments are checked and of one dtype there. Backward memory: a state for every token."""
    valid = starts = None
    if segment_ids is not None:
        index, valid = document_index(segment_ids)
        starts = jnp.diff(index, axis=1, prepend=0) > 0
        valid, starts = valid[..., None], starts[..., None]
    tokens = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (k, v, valid, starts))
    final_state, y = jax.lax.scan(lambda s, token: step(s, token, log_decay[None], bonus[None]), initial_state, tokens)
    return y.swapaxes(0, 1), final_state

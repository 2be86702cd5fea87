"""The token shift of the RWKV family: every token sees the one before it (arXiv 2305.13048, section 3.1)."""

import jax
import jax.numpy as jnp

from lcr.layers.segments import Segments
from lcr.typing import Activations, Array, Float


def token_shift(
    x: Activations, last: Float[Array, "B D"], segments: Segments
) -> tuple[Activations, Float[Array, "B D"]]:
    """The real token before each token in the same document, and the last real token of each row.

        previous_t = x_{t-1}, with x_{-1} = last and 0 at the start of a document

    x: activations `[B, T, D]`. Padding is passed over: it is nobody's previous token, and its own is 0.
    last: `[B, D]`, the state: what an earlier call returned, or zeros. Whether it belongs to the document in hand
        follows from `segments.positions`, so nothing has to be zeroed at a boundary.

    Returns `previous` in x's dtype and the new `last` in last's dtype; a row of padding alone keeps its own.
    """
    batch, length, _ = x.shape
    seen = jnp.concatenate([last.astype(x.dtype)[:, None], x], axis=1)  # token t stands at t + 1
    if segments.ids is None:
        return jnp.where((segments.positions > 0)[..., None], seen[:, :-1], 0), x[:, -1].astype(last.dtype)
    valid = segments.ids != 0
    places = jnp.arange(1, length + 1, dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(valid, places[None], 0), axis=1)  # last real token at or before t
    before = jnp.concatenate([jnp.zeros((batch, 1), jnp.int32), latest[:, :-1]], axis=1)
    previous = jnp.take_along_axis(seen, before[..., None], axis=1)
    previous = jnp.where((valid & (segments.positions > 0))[..., None], previous, 0)
    newest = jnp.take_along_axis(x, jnp.maximum(latest[:, -1] - 1, 0)[:, None, None], axis=1)[:, 0]
    return previous, jnp.where(latest[:, -1:] > 0, newest.astype(last.dtype), last)

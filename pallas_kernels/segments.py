"""Documents packed in one row: what `segment_ids` means to every op.

`segment_ids: int32[B, T]`. 0 is padding: it leaves a recurrence untouched and its output is zero. A change of
id between two neighbouring real (non-zero) tokens is a document boundary: everything from before is forgotten.
Padding between two tokens of equal id does not part them; an id that comes back after another one is a new
document. The first real token of a row continues `initial_state`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


def document_index(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Numbers the documents of each row 0, 1, 2, ... in order; document 0 is the one that continues the state.

    Returns `(index, valid)`: `index[b, t]` is how many boundaries row b has had up to and including token t
    (padding carries the number of the document before it), `valid` is False on padding.
    """
    valid = segment_ids != 0
    starts = _boundaries(segment_ids, valid)
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32), valid


def document_starts(segment_ids: Int[Array, "B T"]) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """`(starts, valid)`: where a document begins that does not continue the state, and what is no padding."""
    valid = segment_ids != 0
    return _boundaries(segment_ids, valid), valid


def without_padding(x: Shaped[Array, "B T ..."], valid: Bool[Array, "B T"]) -> Shaped[Array, "B T ..."]:
    """x with zeros where padding is: what stands there may be anything, and 0 times NaN is NaN. (Of results, so that this
    holds of their cotangents.)"""
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def _boundaries(segment_ids, valid):
    """Where a real token's id differs from that of the real token before it in the row."""
    length = segment_ids.shape[1]
    steps = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids.shape)
    latest = jax.lax.cummax(jnp.where(valid, steps, -1), axis=1)  # last real token at or before t
    before = jnp.concatenate([jnp.full_like(latest[:, :1], -1), latest[:, :-1]], axis=1)
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return valid & (before >= 0) & (segment_ids != id_before)

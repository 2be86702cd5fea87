"""Ring caches: the last S tokens of the document in hand, and attention to them.

The token at position p of its document lies in slot p % S of every array of the cache, `[B, S, ...]`; slots not yet
written are zero. `position` is the state's counter before the call, `segments` what the call's ids said.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from pallas_kernels.attention import attention
from pallas_kernels.segments import document_index

from lcr.layers.segments import Segments, forget
from lcr.typing import Array, Bool, Float, Int

Arrays = TypeVar("Arrays", bound=tuple)


def append(cache: Arrays, new: Arrays, segments: Segments) -> Arrays:
    """The cache's arrays `[B, S, ...]` after a call's tokens `[B, T, ...]`: the last S of each row's last document."""
    slots, length = cache[0].shape[1], new[0].shape[1]
    kept = segments.positions >= segments.position[:, None] - slots
    if segments.ids is not None:
        document, valid = document_index(segments.ids)
        last = document[:, -1:]
        kept &= valid & (document == last)
        cache = forget(cache, segments.continues & (last[:, 0] == 0))
    nowhere = slots + jnp.arange(length, dtype=jnp.int32)[None, :]  # out of range, so dropped; and each its own
    slot = jnp.where(kept, segments.positions % slots, nowhere)
    row = jnp.arange(new[0].shape[0], dtype=jnp.int32)[:, None]
    return tuple(
        old.at[row, slot].set(added, mode="drop", unique_indices=True) for old, added in zip(cache, new, strict=True)
    )


def slot_positions(position: Int[Array, "B"], slots: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """The position of the token in each slot (the last one before `position` that falls there); if any."""
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
    latest = position[:, None] - 1
    positions = latest - (latest - slot) % slots
    return positions, positions >= 0


def attend_slots(
    q: Float[Array, "B 1 H K"], keys: Float[Array, "B S G K"], values: Float[Array, "B S G V"] | None,
    segments: Segments, window: int | None = None, attend: Callable = attention, **options: Any,
) -> Float[Array, "B 1 H V"]:  # fmt: skip
    """One new token, already in its slot: it sees every slot written, and no copy of the cache is made.

    window: how many tokens it sees, where the cache may hold more of them; None: all.
    attend: the op that computes it, of the signature of `attention`; here and below it is given documents as they
        are (`kv_segment_ids` too) and positions that count the row's real tokens, the first of the call being 0.
    """
    positions, written = slot_positions(segments.position, keys.shape[1])
    if window is not None:
        written &= positions >= segments.position[:, None] - window
    valid = jnp.ones(q.shape[:2], bool) if segments.ids is None else segments.ids != 0
    return attend(
        q,
        keys,
        values,
        causal=False,
        segment_ids=valid.astype(jnp.int32),
        kv_segment_ids=written.astype(jnp.int32),
        q_positions=jnp.zeros(q.shape[:2], jnp.int32),
        kv_positions=positions - (segments.position[:, None] - 1),
        **options,
    )


def attend_new(
    q: Float[Array, "B T H K"], keys: Float[Array, "B T G K"], values: Float[Array, "B T G V"],
    segments: Segments, attend: Callable = attention, **options: Any,
) -> Float[Array, "B T H V"]:  # fmt: skip
    """The tokens of a call that begins with an empty cache, which see one another alone."""
    if segments.ids is None and attend is attention:
        return attend(q, keys, values, **options)  # nothing given: there are kernels for that alone
    ids, steps = _documents(segments), _steps(segments)
    return attend(
        q, keys, values, segment_ids=ids, kv_segment_ids=ids, q_positions=steps, kv_positions=steps, **options
    )


def _documents(segments: Segments) -> Int[Array, "B T"]:
    """Documents of the call numbered from 1 (the one that may go on with the state's); 0 for padding."""
    if segments.ids is None:
        return jnp.ones(segments.positions.shape, jnp.int32)
    document, valid = document_index(segments.ids)
    return jnp.where(valid, document + 1, 0)


def _steps(segments: Segments) -> Int[Array, "B T"]:
    """How many real tokens of the row stand before each in the call: distances within a document, without large
    numbers and without a start again at each document."""
    if segments.ids is None:
        steps = jnp.arange(segments.positions.shape[1], dtype=jnp.int32)[None, :]
        return jnp.broadcast_to(steps, segments.positions.shape)
    return jnp.cumsum(segments.ids != 0, axis=1, dtype=jnp.int32) - 1


def attend_slots_and_new(
    q: Float[Array, "B T H K"],
    cache: tuple[Float[Array, "B S G K"], Float[Array, "B S G V"] | None],
    new: tuple[Float[Array, "B T G K"], Float[Array, "B T G V"] | None],
    position: Int[Array, "B"],
    segments: Segments,
    window: int | None = None,
    attend: Callable = attention,
    **options: Any,
) -> Float[Array, "B T H V"]:
    """Several new tokens after those of the cache, which are of document 1 if the first new ones go on with it.

    Values are None in both where the op takes them out of the keys (its `value_width`).
    """
    slots = cache[0].shape[1]
    positions, written = slot_positions(position, slots)
    ids, steps = _documents(segments), _steps(segments)
    if segments.continues is not None:
        written &= segments.continues[:, None]
    keys, values = (
        None if old is None else jnp.concatenate([old, added], axis=1) for old, added in zip(cache, new, strict=True)
    )
    return attend(
        q,
        keys,
        values,
        window=slots if window is None else min(window, slots),
        segment_ids=ids,
        kv_segment_ids=jnp.concatenate([written.astype(jnp.int32), ids], axis=1),
        q_positions=steps,
        kv_positions=jnp.concatenate([positions - position[:, None], steps], axis=1),
        **options,
    )

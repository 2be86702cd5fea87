"""How a mixer reads `segment_ids` against the state it was given.

Every state carries `segment_id: int32[B]` (the last id that was not 0; 0 while nothing was read) and
`position: int32[B]` (how many tokens of the current document were read). `read_segments` turns those two and a
call's `segment_ids` into everything a mixer needs, once, so that no mixer interprets ids by itself.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from pallas_kernels.segments import document_index

from lcr.typing import Array, Bool, Int

Tree = TypeVar("Tree")


@struct.dataclass
class Segments:
    """The documents of one call.

    ids:        what to pass to an op as `segment_ids` (None: all tokens belong to the document in hand).
    positions:  position of each token in its document, counted in real tokens. On padding: meaningless.
    continues:  whether a row's first real token belongs to the document of the state (None: it always does).
    segment_id, position: these fields of the state that the call returns.
    """

    ids: Int[Array, "B T"] | None
    positions: Int[Array, "B T"]
    continues: Bool[Array, "B"] | None
    segment_id: Int[Array, "B"]
    position: Int[Array, "B"]


def read_segments(
    segment_ids: Int[Array, "B T"] | None, segment_id: Int[Array, "B"], position: Int[Array, "B"], length: int
) -> Segments:
    """Reads one call's `segment_ids` (see `pallas_kernels.segments`) against a state's two counters.

    `segment_ids=None` says that all `length` tokens belong to the document in hand; on a fresh state that
    document gets the id 1, so `None` always equals some explicit array of ids.
    """
    steps = jnp.arange(length, dtype=jnp.int32)[None, :]
    if segment_ids is None:
        return Segments(
            ids=None,
            positions=position[:, None] + steps,
            continues=None,
            segment_id=jnp.where(segment_id == 0, 1, segment_id),
            position=position + length,
        )
    index, valid = document_index(segment_ids)
    any_valid = valid.any(axis=1)
    first_id = jnp.take_along_axis(segment_ids, jnp.argmax(valid, axis=1)[:, None], axis=1)[:, 0]
    continues = ~any_valid | (segment_id == 0) | (first_id == segment_id)

    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1  # among the row's real tokens
    starts = valid & (index > jnp.pad(index, ((0, 0), (1, 0)))[:, :-1])
    first_rank = jax.lax.cummax(jnp.where(starts, rank, 0), axis=1)
    carried = jnp.where((index == 0) & continues[:, None], position[:, None], 0)
    positions = rank - first_rank + carried

    last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)[:, None]
    last_id = jnp.take_along_axis(segment_ids, last, axis=1)[:, 0]
    last_position = jnp.take_along_axis(positions, last, axis=1)[:, 0]
    return Segments(
        ids=segment_ids,
        positions=positions,
        continues=continues,
        segment_id=jnp.where(any_valid, last_id, segment_id),
        position=jnp.where(any_valid, last_position + 1, position),
    )


def forget(tree: Tree, continues: Bool[Array, "B"] | None) -> Tree:
    """Zeroes the rows (axis 0 of every leaf) whose first document is not the one that the state belongs to."""
    if continues is None:
        return tree

    def one(leaf):
        keep = continues.reshape((-1,) + (1,) * (leaf.ndim - 1))
        return jnp.where(keep, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(one, tree)

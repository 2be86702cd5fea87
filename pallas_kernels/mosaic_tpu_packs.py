"""Heads side by side in the lanes of a TPU: how many make a pack, and what belongs to which head of it.

A vector register holds 128 lanes. Heads narrower than that are worked on together: their keys lie side by side, and the
state of a pack is a matrix of blocks, one for each head, on the diagonal. Heads that share keys and queries lie side by
side in values and states alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu_chunks import LANES


UNIT = 256
MOST = 2**21  # numbers in the state of a pack of several heads


@dataclasses.dataclass(frozen=True)
class Pack:
    """heads: of the pack. key, value: the widths of one head. shared: whether all of them have the same keys."""

    heads: int
    key: int
    value: int
    shared: bool = False

    @property
    def keys(self) -> int:
        return self.key if self.shared else self.heads * self.key

    @property
    def values(self) -> int:
        return self.heads * self.value

    @property
    def units(self) -> list[slice]:
        """Lanes of values that are computed with at once: parts of one head, or the fewest whole registers that hold
        whole heads, as each head computes all of the lanes."""
        if self.value % LANES == 0:
            unit = UNIT if self.value % UNIT == 0 else LANES
        else:
            unit = LANES if LANES % self.value == 0 and self.values % LANES == 0 else self.values
        return [slice(start, start + unit) for start in range(0, self.values, unit)]

    def of_keys(self, head: int, x: jax.Array) -> jax.Array:
        """x `[C, keys]`, but 0 in the lanes of other heads."""
        if self.shared or self.heads == 1:
            return x
        return _keep(x, self.key * head, self.key)

    def of_values(self, head: int, x: jax.Array) -> jax.Array:
        """x `[C, values]`, but 0 in the lanes of other heads."""
        return x if self.heads == 1 else _keep(x, self.value * head, self.value)

    def by_head(self, of_head: Callable[[int], jax.Array], lanes: slice) -> jax.Array:
        """`[rows, lanes]`, in the lanes of head h those of `of_head(h)`, which has the lanes asked for, or one that
        stands for all."""
        found, width = None, lanes.stop - lanes.start
        for head in range(lanes.start // self.value, -(-lanes.stop // self.value)):
            x = of_head(head)
            x = jnp.broadcast_to(x, (x.shape[0], width))
            found = x if found is None else jnp.where(_lane(x) + lanes.start >= head * self.value, x, found)
        return found

    def blocks(self, part: jax.Array, lanes: slice) -> jax.Array:
        """Some lanes of a state `[keys, values]`, but 0 outside the heads' blocks."""
        if self.shared or self.heads == 1:
            return part
        key, value = (jax.lax.broadcasted_iota(jnp.int32, part.shape, axis) for axis in (0, 1))
        return jnp.where(key // self.key == (value + lanes.start) // self.value, part, 0.0)

    def join_states(self, state: jax.Array) -> jax.Array:
        """`[B, H, K, V]` to `[B, packs, keys, values]`."""
        batch, heads = state.shape[:2]
        state = state.reshape(batch, heads // self.heads, self.heads, self.key, self.value)
        if self.shared:
            state = jnp.swapaxes(state, 2, 3)
        elif self.heads > 1:
            same = jnp.eye(self.heads, dtype=state.dtype)[None, None, :, None, :, None]
            state = state[:, :, :, :, None] * same
        return state.reshape(batch, -1, self.keys, self.values)

    def part_states(self, state: jax.Array) -> jax.Array:
        """The way back."""
        batch, packs = state.shape[:2]
        if self.shared:
            state = jnp.swapaxes(state.reshape(batch, packs, self.key, self.heads, self.value), 2, 3)
        elif self.heads > 1:
            state = state.reshape(batch, packs, self.heads, self.key, self.heads, self.value)
            state = jnp.stack([state[:, :, h, :, h] for h in range(self.heads)], axis=2)
        return state.reshape(batch, -1, self.key, self.value)


def narrow_pack(heads: int, key: int, value: int) -> Pack:
    """The fewest heads whose keys and values fill whole registers; all of them, if none do."""
    for count in range(1, heads):
        if heads % count == 0 and count * key % LANES == 0 and count * value % LANES == 0:
            return Pack(count, key, value)
    return Pack(heads, key, value)


def unfit(pack: Pack) -> str | None:
    """None, or why a pack is no fit: the state of many heads is nearly all 0, and compiling what is done for each of
    them in all of its lanes takes minutes."""
    size = pack.keys * pack.values
    if pack.heads == 1 or pack.shared or size <= MOST:
        return None
    return (
        f"by Mosaic TPU works on heads together until they fill whole registers, here on {pack.heads} of {pack.key} "
        f"keys and {pack.value} values, with a state of {size} numbers, more than {MOST}"
    )


def _lane(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _keep(x, start, width):
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    return x * ((lane >= start) & (lane < start + width)).astype(x.dtype)


def side_by_side(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def spread(wide: jax.Array, width: int) -> jax.Array:
    """`[rows, 128]`, alike in all lanes, to another width; what has that width stays as it is."""
    if wide.shape[1] == width:
        return wide
    repeated = side_by_side([wide] * -(-width // LANES))
    return repeated if width % LANES == 0 else repeated[:, :width]

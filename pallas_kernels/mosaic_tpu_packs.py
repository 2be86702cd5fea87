"""Heads side by side in the lanes of a TPU: how many make a pack, and what belongs to which head of it.

A vector register holds 128 lanes. Heads narrower than that are worked on together: their keys lie side by side, and the
state of a pack is a matrix of blocks, one for each head, on the diagonal. Heads that share keys and queries lie side by
side in values and states alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu_chunks import LANES


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
    def unit(self) -> int:
        """Lanes of values that are computed with at once: whole registers that hold whole heads."""
        if self.value % LANES == 0:
            return self.value
        return LANES if LANES % self.value == 0 and self.values % LANES == 0 else self.values

    def of_keys(self, head: int, x: jax.Array) -> jax.Array:
        """x `[C, keys]`, but 0 in the lanes of other heads."""
        if self.shared or self.heads == 1:
            return x
        return _keep(x, self.key * head, self.key)

    def by_head(self, of_head: Callable[..., jax.Array], *wide: jax.Array) -> jax.Array:
        """`[rows, values]`, in the lanes of head h those of `of_head(h, *units)`: the units of `wide` that hold them, each
        `[any, values]`. What it returns has the lanes of a unit, or one that stands for all."""
        each = self.unit // self.value
        units = []
        for unit in range(self.heads // each):
            lanes = [x[:, unit * self.unit : (unit + 1) * self.unit] for x in wide]
            found = None
            for i in range(each):
                x = of_head(unit * each + i, *lanes)
                x = jnp.broadcast_to(x, (x.shape[0], self.unit))
                found = x if found is None else jnp.where(_lane(x) >= i * self.value, x, found)
            units.append(found)
        return units[0] if len(units) == 1 else jnp.concatenate(units, axis=1)

    def blocks(self, state: jax.Array) -> jax.Array:
        """A matrix `[keys, values]`, but 0 outside the heads' blocks."""
        if self.shared or self.heads == 1:
            return state
        key = jax.lax.broadcasted_iota(jnp.int32, state.shape, 0) // self.key
        return jnp.where(key == _lane(state) // self.value, state, jnp.zeros((), state.dtype))

    def join_states(self, state: jax.Array) -> jax.Array:
        """`[B, H, K, V]` to `[B, packs, keys, values]`."""
        batch, heads = state.shape[:2]
        state = state.reshape(batch, heads // self.heads, self.heads, self.key, self.value)
        if self.shared:
            return jnp.swapaxes(state, 2, 3).reshape(batch, -1, self.keys, self.values)
        same = jnp.eye(self.heads, dtype=state.dtype)[:, None, :, None]
        return (state[:, :, :, :, None] * same).reshape(batch, -1, self.keys, self.values)

    def part_states(self, state: jax.Array) -> jax.Array:
        """The way back."""
        batch, packs = state.shape[:2]
        if self.shared:
            state = state.reshape(batch, packs, self.key, self.heads, self.value)
            return jnp.swapaxes(state, 2, 3).reshape(batch, -1, self.key, self.value)
        state = state.reshape(batch, packs, self.heads, self.key, self.heads, self.value)
        state = jnp.stack([state[:, :, h, :, h] for h in range(self.heads)], axis=2)
        return state.reshape(batch, -1, self.key, self.value)


def narrow_pack(heads: int, key: int, value: int) -> Pack:
    """The fewest heads whose keys and values fill whole registers; all of them, if none do."""
    for count in range(1, heads):
        if heads % count == 0 and count * key % LANES == 0 and count * value % LANES == 0:
            return Pack(count, key, value)
    return Pack(heads, key, value)


def _lane(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def _keep(x, start, width):
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    return x * ((lane >= start) & (lane < start + width)).astype(x.dtype)

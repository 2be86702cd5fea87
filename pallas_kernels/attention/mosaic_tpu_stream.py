"""Tiles streamed from a TPU's main memory in the order of a list, each fetched while the one before it is worked on.

A grid of Pallas visits all of its steps; which tiles attention visits is known when it runs, and differs for each
outer tile. So the grid here goes over outer tiles only, and each of them walks through its own list: a row of
`plans`, brought to scalar memory for that outer tile alone, so that a list of any length fits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.attention.tiles import Order

# Where a row of a plan holds what: how many tiles need no mask, how many are visited, and from there on which.
UNMASKED, VISITED, TILES = 0, 1, 2


def plans(order: Order) -> Int[Array, "B outer 1 width"]:
    """One row for each outer tile: `[unmasked, visited, tile 0, tile 1, .., first tile of the next row with any, ..]`.

    That tile, or -1, follows the last one of the row, so that to fetch ahead is always to take the next entry.
    """
    inner = order.tiles.shape[-1]
    first = jnp.where(order.visited > 0, order.tiles[..., 0], -1)
    following = jnp.concatenate([first[..., 1:], jnp.full_like(first[..., :1], -1)], axis=-1)
    # The nearest later row that visits any: scanned from the end.
    following = jax.lax.associative_scan(
        lambda later, earlier: jnp.where(earlier >= 0, earlier, later), following, axis=following.ndim - 1, reverse=True
    )
    tiles = jnp.pad(order.tiles, ((0, 0), (0, 0), (0, 1)))
    tiles = jnp.where(jnp.arange(inner + 1)[None, None] < order.visited[..., None], tiles, following[..., None])
    return jnp.concatenate([order.unmasked[..., None], order.visited[..., None], tiles], axis=-1)[:, :, None]


class Stream(NamedTuple):
    """sources: arrays in main memory, `[tiles, ...]` each. buffers: `[2, ...]` each. arrivals: a semaphore for each
    buffer, `[2, sources]`. slot: which of the two the next tile is in; kept from one outer tile to the next."""

    plan: Any
    sources: tuple
    buffers: tuple
    arrivals: Any
    slot: Any

    def _copies(self, tile, slot):
        return [
            pltpu.make_async_copy(source.at[tile], buffer.at[slot], self.arrivals.at[slot, number])
            for number, (source, buffer) in enumerate(zip(self.sources, self.buffers, strict=True))
        ]

    def _fetch(self, n, slot):
        tile = self.tile(n)

        @pl.when(tile >= 0)
        def _():
            for copy in self._copies(tile, slot):
                copy.start()

    @property
    def visited(self):
        return self.plan[0, VISITED]

    def tile(self, n):
        return self.plan[0, TILES + n]

    def walk(self, first: Any, visit: Callable[[bool, Any, Any], None]) -> None:
        """`visit(masked, n, slot)` for the n-th tile of the plan, which lies in `buffers[slot]` by then.

        first: whether no outer tile before this one has fetched ahead.
        """

        @pl.when(first)
        def _():
            self.slot[0] = 0
            self._fetch(0, 0)

        def step(masked, n, slot):
            self._fetch(n + 1, 1 - slot)
            for copy in self._copies(self.tile(n), slot):
                copy.wait()
            visit(masked, n, slot)
            return 1 - slot

        unmasked = self.plan[0, UNMASKED]
        slot = jax.lax.fori_loop(0, unmasked, functools.partial(step, False), self.slot[0])
        self.slot[0] = jax.lax.fori_loop(unmasked, self.visited, functools.partial(step, True), slot)

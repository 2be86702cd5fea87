"""Tiles streamed from a TPU's main memory in the order of a list, each fetched while the one before it is worked on.

A grid of Pallas visits all of its steps; which tiles attention visits is known when it runs, and differs for each
outer tile. So the grid here goes over outer tiles only, and each of them walks through its own list: a row of
`plans`, brought to scalar memory for that outer tile alone. That has room for lists of some hundred thousand tiles: a
million keys are 2,048 in the forward. The backward, whose lists are of pairs of tiles, cuts them (`mosaic_tpu_pairs`).
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
    """sources: arrays in main memory, `[tiles, ...]` each, or `[lines, tiles x lanes]`. buffers: `[slots, ...]` each.

    arrivals: a semaphore for each buffer, `[slots, sources]`. slot: which of them the next tile is in; kept from one
    outer tile to the next.
    """

    plan: Any
    sources: tuple
    buffers: tuple
    arrivals: Any
    slot: Any

    def _copies(self, tile, slot):
        return [
            pltpu.make_async_copy(_tile(source, buffer, tile), buffer.at[slot], self.arrivals.at[slot, number])
            for number, (source, buffer) in enumerate(zip(self.sources, self.buffers, strict=True))
        ]

    def begin(self, first):
        @pl.when(first)
        def _():
            self.slot[0] = 0
            self.fetch(0, 0)

    def wait(self, n, slot):
        for copy in self._copies(self.tile(n), slot):
            copy.wait()

    def fetch(self, n, slot):
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

        self.begin(first)

        def step(masked, n, slot):
            self.fetch(n + 1, 1 - slot)
            self.wait(n, slot)
            visit(masked, n, slot)
            return 1 - slot

        unmasked = self.plan[0, UNMASKED]
        slot = jax.lax.fori_loop(0, unmasked, functools.partial(step, False), self.slot[0])
        self.slot[0] = jax.lax.fori_loop(unmasked, self.visited, functools.partial(step, True), slot)

    def walk_in_stages(
        self, first: Any, score: Callable[[bool, Any, int], None], soften: Callable[[int], None],
        gather: Callable[[Any, int], None],
    ) -> None:  # fmt: skip
        """Of each half (0, 1) of a tile's rows: `score(masked, slot, half)`, `soften(half)`, `gather(slot, half)`.

        The scores of the next half and the values of the last one are worked on beside the softmax of each. What is
        gathered first, for a last half that there was not, has to be 0.

        Four slots: of the tile before, this one, the next one, and one that is fetched.
        """
        self.begin(first)
        base, visited = self.slot[0], self.visited

        def slot(n):
            return (base + jnp.clip(n, 0, visited - 1)) & 3

        def arrive(n):
            @pl.when(n < visited)
            def _():
                self.fetch(n + 1, (base + n + 1) & 3)
                self.wait(n, slot(n))

        def when_any(stage, *arguments):
            pl.when(visited > 0)(lambda: stage(*arguments))

        def step(masked, n, _):
            score(masked, slot(n), 1)
            soften(0)
            gather(slot(n - 1), 1)
            arrive(n + 1)  # in between, so that the compiler schedules each half by itself: both together spill
            score(masked, slot(n + 1), 0)  # after the last tile: that one's once more, for nobody
            soften(1)
            gather(slot(n), 0)

        arrive(0)
        when_any(score, True, slot(0), 0)
        unmasked = jnp.maximum(self.plan[0, UNMASKED] - 1, 0)
        jax.lax.fori_loop(0, unmasked, functools.partial(step, False), None)
        jax.lax.fori_loop(unmasked, visited, functools.partial(step, True), None)
        when_any(gather, slot(visited - 1), 1)
        self.slot[0] = (base + visited) & 3


def _tile(source, buffer, tile):
    if source.ndim == buffer.ndim:
        return source.at[tile]
    lanes = buffer.shape[-1]
    return source.at[:, pl.ds(tile * lanes, lanes)]

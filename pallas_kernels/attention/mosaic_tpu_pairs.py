"""Which pairs of tiles the backward of attention visits on a TPU, and in which order: a list for each outer tile.

An outer tile is some neighbouring tiles of keys. Its pairs are sorted by the tile of queries, so that each of those
comes and goes once: the pairs with one tile of queries are a run. A row of `plans` begins as one of
`mosaic_tpu_stream` does, with runs for tiles and the number of pairs in the first place; the pairs come after them.

Scalar memory holds a row while the next one is brought. Those of a million tokens it may not: so where there are too
many tiles of queries they fall into pages, and an outer tile has a row for each, one after the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention import mosaic_tpu_stream as stream
from pallas_kernels.attention.tiles import Order


MOST = 2**16  # numbers in a row of a plan; scalar memory holds 2**18, and of rows two


def plans(active: Bool[Array, "B queries keys"], together: int) -> Int[Array, "B rows 1 width"]:
    """active: which tiles of queries see something of which tiles of keys. together: tiles of keys in an outer tile."""
    batch, queries, keys = active.shape
    pages = pl.cdiv(queries, (MOST - stream.TILES - 1) // (together + 1))
    active = jnp.pad(active, ((0, 0), (0, -queries % pages), (0, -keys % together)))
    active = active.reshape(batch, pages, -1, active.shape[2] // together, together).transpose(0, 3, 1, 2, 4)
    first = jnp.arange(pages, dtype=jnp.int32) * active.shape[3]
    first = jnp.tile(first, active.shape[1])[None, :, None]  # of the tiles of queries of each row
    active = active.reshape(batch, -1, *active.shape[3:])
    inside = active.any(axis=3)
    runs = Order(
        tiles=jnp.argsort(~inside, axis=2, stable=True).astype(jnp.int32) + first,
        unmasked=active.sum(axis=(2, 3), dtype=jnp.int32),
        visited=inside.sum(axis=2, dtype=jnp.int32),
    )
    run = jnp.cumsum(inside, axis=2, dtype=jnp.int32) - 1
    place = jnp.arange(together, dtype=jnp.int32)[None, None, None]
    pairs = (run[..., None] * together + place).reshape(*run.shape[:2], -1)
    order = jnp.argsort(~active.reshape(pairs.shape), axis=2, stable=True)
    pairs = jnp.take_along_axis(pairs, order, axis=2)
    return jnp.concatenate([stream.plans(runs), pairs[:, :, None]], axis=3)


class Pairs(NamedTuple):
    """A row of `plans` in scalar memory. together: as there, a power of two."""

    plan: Any
    together: int

    @property
    def number(self):
        return self.plan[0, stream.UNMASKED]

    def __getitem__(self, n):
        """The run of the n-th pair, and its tile of keys within the outer tile."""
        queries = (self.plan.shape[1] - stream.TILES - 1) // (self.together + 1)
        pair = self.plan[0, stream.TILES + queries + 1 + n]
        return pair >> (self.together.bit_length() - 1), pair & (self.together - 1)

    def walk(
        self, begin: Callable[[Any], None], soften: Callable[[Any, Any], None], gather: Callable[[Any, Any], None]
    ) -> None:
        """`begin(run)`, then of each of its pairs `soften(n, buffer)` and, beside the next pair, `gather(n, buffer)`.

        buffer: 0 or 1, where the first leaves what the second takes; known when compiled, so that the compiler sees
        two stages touch different ones at a time. All pairs are masked: matrix units take longer than that does.
        """

        def step(n, buffer):
            run = self[n][0]
            # A loop of at most one turn: what depends on a condition the compiler may execute in any case.
            jax.lax.fori_loop(0, (run != self[n - 1][0]).astype(jnp.int32), lambda _, __: begin(run), None)
            soften(n, buffer)
            gather(n - 1, 1 - buffer)

        def two_steps(half, _):
            step(2 * half + 1, 1)
            pl.when(2 * half + 2 < self.number)(lambda: step(2 * half + 2, 0))

        @pl.when(self.number > 0)
        def _():
            begin(0)
            soften(0, 0)

        jax.lax.fori_loop(0, self.number >> 1, two_steps, None)

        @pl.when(self.number > 0)
        def _():
            gather(self.number - 1, (self.number - 1) & 1)

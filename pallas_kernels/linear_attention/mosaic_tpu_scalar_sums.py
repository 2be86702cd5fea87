"""Gradients of sums of log decays, one for each head, that a TPU's kernel finds as columns and writes as rows."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu_blocks import SUBLANES
from pallas_kernels.mosaic_tpu_chunks import LANES


class Sums:
    """Of the packs of a step. columns: `[step, tables, heads / 128, C, 128]`, scratch, a head's in a lane."""

    def __init__(self, chunk, decays, columns):
        self.chunk, self.decays, self.columns = chunk, decays, columns

    @staticmethod
    def scratch(chunk, step):
        return pltpu.VMEM((step, 1 + chunk.exclusive, -(-chunk.pack.heads // LANES), chunk.length, LANES), jnp.float32)

    def put(self, number, table, first, block, found, add=False):
        """found: `[., 1]` of each of the heads from `first` on."""
        for tile in range(first // LANES, (first + len(found) - 1) // LANES + 1):
            old = now = self.columns[number, table, tile, block]
            lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1) + tile * LANES
            for head, x in enumerate(found, first):
                now = jnp.where(lane == head, old + x if add else x, now)
            self.columns[number, table, tile, block] = now

    def put_one(self, number, table, head, block, found):
        """found: `[., 1]` of one head, which may be known only when the kernel runs."""
        tile, lane = (0, head) if self.columns.shape[2] == 1 else (head // LANES, head % LANES)
        at = number, table, tile, block
        lanes = jax.lax.broadcasted_iota(jnp.int32, (found.shape[0], LANES), 1)
        self.columns[at] = jnp.where(lanes == lane, found, self.columns[at])

    def add_to(self, rows, number):
        _, tables, tiles, *_ = self.columns.shape
        for table in range(tables):
            for tile in range(tiles):
                heads = min(LANES, self.chunk.pack.heads - tile * LANES)
                start = self.decays.at((table + 1) * self.decays.parts - 1, tile * LANES)
                rows[number, start : start + heads] += self.columns[number, table, tile].T[:heads]


def fold(x, width):
    """The sum of what lies beside one another."""
    return sum((x[:, start : start + width] for start in range(width, x.shape[1], width)), x[:, :width])


def pieces(x):
    """The sum of the registers that lie beside one another, and what is left of them."""
    whole = x.shape[1] // LANES * LANES
    return [*([fold(x[:, :whole], LANES)] if whole else []), *([x[:, whole:]] if whole < x.shape[1] else [])]


def by_sublanes(x):
    """The sum of the registers that lie below one another."""
    return jnp.sum(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)


def of_head(chunk, head, x):
    """x, in the lanes of values of a group of heads, but 0 outside of those of one of them."""
    if chunk.together == 1:
        return x
    start = head % chunk.together * chunk.pack.value
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= start) & (lane < start + chunk.pack.value), x, 0.0)


def lane_sum(*parts):
    """The sum over the lanes of all, `[., 1]`."""
    if len({x.shape for x in parts}) == 1:
        return jnp.sum(sum(parts[1:], parts[0]), axis=1, keepdims=True)
    return sum(jnp.sum(x, axis=1, keepdims=True) for x in parts)

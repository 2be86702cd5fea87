"""Work on a chunk in stages on a TPU, each a block of instructions small enough for the registers, which leaves what it
found in scratch memory.

Each block has several packs of heads, or units of their values, in it, as one alone would wait for its own products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_tpu_blocks import in_blocks, part
from pallas_kernels.mosaic_tpu_chunks import LANES
from pallas_kernels.mosaic_tpu_packs import Pack, spread

UNITS = 12  # of values, that a stage of products has in a block
READ_UNITS = 4  # where it reads the state as well


def few_packs(keys: int) -> int:
    """So many that a stage works on matrices `[2 C, keys]` of all of them in a block."""
    return max(256 // keys, 1)


class Unit(NamedTuple):
    """Some lanes of the values of the pack `one` of a step: which, of its own and of those of all packs."""

    one: Any
    own: Any
    lanes: Any
    width: int


def in_units(pack: Pack, step: int, at_once: int, body: Callable[[Unit], None]) -> None:
    """body of every unit, `at_once` of them in one block."""
    if pack.heads == 1:
        width = LANES if pack.value % LANES == 0 else pack.value
        count = pack.value // width

        def numbered(number):
            body(Unit(number // count, part(number % count, width), part(number, width), width))

        def whole(one):
            for n in range(count):
                body(Unit(one, part(n, width), part(one * count + n, width), width))

        if at_once < count:
            in_blocks(step * count, at_once, numbered)
        else:
            in_blocks(step, at_once // count, whole)
        return

    def packed(one):
        for own in pack.units:
            start, width = one * pack.values + own.start, own.stop - own.start
            if isinstance(one, int):
                body(Unit(one, own, slice(start, start + width), width))
            else:
                body(Unit(one, own, pl.ds(pl.multiple_of(start, LANES), width), width))

    in_blocks(step, at_once, packed)


def heads_of(pack: Pack, unit: Unit) -> range:
    if pack.heads == 1:
        return range(1)
    return range(unit.own.start // pack.value, -(-unit.own.stop // pack.value))


def by_head(pack: Pack, of_head: Callable[[int], jax.Array], unit: Unit):
    """See `Pack.by_head`."""
    return of_head(0) if pack.heads == 1 else pack.by_head(of_head, unit.own)


def blocks(pack: Pack, x, unit: Unit):
    """See `Pack.blocks`."""
    return x if pack.heads == 1 else pack.blocks(x, unit.own)


def by_keys(pack: Pack, of_head: Callable[[int], jax.Array]):
    """`[rows, keys]`, in the lanes of a head's keys what `of_head(head)` is in all lanes."""
    found = spread(of_head(0), pack.keys)
    lane = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
    for head in range(1, pack.heads):
        found = jnp.where(lane >= head * pack.key, spread(of_head(head), pack.keys), found)
    return found


def by_keys_below(pack: Pack, of_head: Callable[[int], jax.Array]):
    """`[keys, n]`, in the rows of a head's keys the row `of_head(head)`, `[1, n]`."""
    found = of_head(0)
    if pack.heads == 1:
        return found
    found = jnp.broadcast_to(found, (pack.keys, found.shape[1]))
    row = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0)
    for head in range(1, pack.heads):
        found = jnp.where(row >= head * pack.key, of_head(head), found)
    return found

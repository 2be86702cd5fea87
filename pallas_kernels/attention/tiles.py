"""How attention is cut into tiles, and which tiles are worth computing.

A query tile holds `tokens` neighbouring queries of all the query heads of one key-value head, as `tokens x H/G`
rows; a key tile holds neighbouring keys. `summaries` of the documents and positions inside tell, for each pair,
whether any query sees any key (else the tile is skipped) and whether every query sees every key (else it is masked).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Carry = TypeVar("Carry")

# Rows and keys of a tile. On two CPU cores 512 is the fastest of 128 .. 2048 for a head alone or two together: below it
# one core does the work. Of eight heads together smaller tiles keep both cores busy too, and compute less in vain along
# the diagonal and the edge of a window: half of them, where queries reach back over few of them; for a window that is no
# wider than one, 128 however many heads there are.
SIDE = 512
NARROW_SIDE = 128
FEW = 8  # tiles of SIDE


class Band(NamedTuple):
    """Which distances (query position - key position) are seen: 0 and above if causal, those below the window."""

    causal: bool
    window: int | None


class Index(NamedTuple):
    """Documents (0: padding) and positions of queries and keys: `[B, T]` and `[B, S]`, or those of one row's tiles.

    The first axis may be 1 instead of B: all rows are alike. block_mask: `[B, M, N]`, which blocks of keys the queries
    of a block may see, or None for all; among tiles it is `[..., query tiles, key tiles]`.
    """

    documents: Int[Array, "..."]
    kv_documents: Int[Array, "..."]
    positions: Int[Array, "..."]
    kv_positions: Int[Array, "..."]
    block_mask: Bool[Array, "..."] | None = None

    def cut(self, tokens: int, keys: int, block_size: tuple[int, int] | None) -> "Index":
        """`[B, tiles, tokens]` and `[B, tiles, keys]`, ragged ends filled up with padding.

        A tile must lie in one block: where there is a block mask, tokens and keys have to divide the block's.
        """
        sizes = (tokens, keys, tokens, keys)
        cut = [_fill(a, n).reshape(a.shape[0], -1, n) for a, n in zip(self[:4], sizes, strict=True)]
        mask = self.block_mask
        if mask is not None:
            lines = np.arange(cut[0].shape[1]) * tokens // block_size[0]
            columns = np.arange(cut[1].shape[1]) * keys // block_size[1]
            mask = mask[:, lines[:, None], columns[None, :]]
        return Index(*cut, mask)


class Order(NamedTuple):
    """For each outer tile, the inner tiles to visit: first those that need no mask, then those that do."""

    tiles: Int[Array, "..."]
    unmasked: Int[Array, "..."]
    visited: Int[Array, "..."]

    def loop(self, visit: Callable[[bool, Int[Array, ""], Carry], Carry], carry: Carry) -> Carry:
        """`carry = visit(masked, n, carry)` over the tiles `self.tiles[n]` of one outer tile."""
        carry = jax.lax.fori_loop(0, self.unmasked, functools.partial(visit, False), carry)
        return jax.lax.fori_loop(self.unmasked, self.visited, functools.partial(visit, True), carry)


def visible(index: Index, band: Band) -> Bool[Array, "... T S"]:
    """Whether each query sees each key, as far as documents and distances go."""
    distance = index.positions[..., :, None] - index.kv_positions[..., None, :]
    same = index.documents[..., :, None] == index.kv_documents[..., None, :]
    seen = same & (index.kv_documents != 0)[..., None, :]
    if band.causal:
        seen &= distance >= 0
    if band.window is not None:
        seen &= distance < band.window
    return seen


def tile_mask(index: Index, i, j, rows: int, band: Band) -> Bool[Array, "rows keys"]:
    """`visible` for query tile i and key tile j of one row, with a line for each query head."""
    of_tile = Index(index.documents[i], index.kv_documents[j], index.positions[i], index.kv_positions[j])
    seen = visible(of_tile, band)
    tokens, keys = seen.shape
    return jnp.broadcast_to(seen[:, None, :], (tokens, rows // tokens, keys)).reshape(rows, keys)


def tile_bias(index: Index, i, j, slopes: Float[Array, "group"]) -> Float[Array, "rows keys"]:
    """`slope x (query position - key position)` for query tile i and key tile j, with a line for each query head."""
    distance = (index.positions[i][:, None] - index.kv_positions[j][None, :]).astype(slopes.dtype)
    return (slopes[None, :, None] * distance[:, None, :]).reshape(-1, distance.shape[1])


class _Summary(NamedTuple):
    """Least and greatest document and position among a tile's real tokens, and whether all of them are real."""

    first: Int[Array, "n"]
    last: Int[Array, "n"]
    low: Int[Array, "n"]
    high: Int[Array, "n"]
    whole: Bool[Array, "n"]


def _summarise(documents, positions) -> _Summary:
    real = documents != 0
    least, greatest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    return _Summary(
        first=jnp.where(real, documents, greatest).min(axis=1),
        last=jnp.where(real, documents, least).max(axis=1),
        low=jnp.where(real, positions, greatest).min(axis=1),
        high=jnp.where(real, positions, least).max(axis=1),
        whole=real.all(axis=1),
    )


def overlaps(index: Index, band: Band) -> tuple[Bool[Array, "queries keys"], Bool[Array, "queries keys"]]:
    """For each query tile and key tile of one row: whether any query sees any key, whether every one sees every one."""
    query = _Summary(*(a[:, None] for a in _summarise(index.documents, index.positions)))
    key = _Summary(*(a[None, :] for a in _summarise(index.kv_documents, index.kv_positions)))
    active = (query.first <= key.last) & (key.first <= query.last)
    full = (query.first == query.last) & (key.first == key.last) & (query.first == key.first)
    full &= query.whole & key.whole
    if band.causal:
        active &= key.low <= query.high
        full &= key.high <= query.low
    if band.window is not None:
        active &= query.low - key.high < band.window
        full &= query.high - key.low < band.window
    if index.block_mask is not None:
        active &= index.block_mask
    return active, full & active


def schedule(index: Index, band: Band, by_query: bool) -> Order:
    """The tiles to visit in one row: the key tiles of each query tile, or (not by_query) the other way round."""
    active, full = overlaps(index, band)
    rank = jnp.where(full, 0, jnp.where(active, 1, 2))
    rank = rank if by_query else rank.T
    return Order(
        tiles=jnp.argsort(rank, axis=1, stable=True).astype(jnp.int32),
        unmasked=(rank == 0).sum(axis=1, dtype=jnp.int32),
        visited=(rank <= 1).sum(axis=1, dtype=jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class Grid:
    """Cuts `[B, T, H, .]` into `[B, G, tiles, rows, .]` and `[B, S, G, .]` into `[B, G, tiles, keys, .]`, and back.

    Ragged ends are filled up with padding (document 0).
    """

    length: int
    kv_length: int
    kv_heads: int
    group: int
    window: int | None
    block_size: tuple[int, int] | None = None

    @property
    def reach(self) -> int:
        return self.kv_length if self.window is None else min(self.window, self.kv_length)

    @property
    def heads_together(self) -> int:
        """How many key-value heads are computed in one loop: so many products at once are a core's work each."""
        most = 8 if self.reach <= FEW * SIDE else 2
        return next(n for n in (most, 2, 1) if self.kv_heads % n == 0)

    @property
    def side(self) -> int:
        if self.window is not None and self.window <= SIDE:
            return min(SIDE, NARROW_SIDE)
        return SIDE // 2 if self.heads_together == 8 else SIDE

    @property
    def tokens(self) -> int:
        most = max(self.side // self.group, 1)
        return divisor(self.block_size[0], most) if self.block_size else _even(self.length, most)

    @property
    def keys(self) -> int:
        return divisor(self.block_size[1], self.side) if self.block_size else _even(self.kv_length, self.side)

    def cut_index(self, index: Index) -> Index:
        """`[B, tiles, tokens]` and `[B, tiles, keys]`."""
        return index.cut(self.tokens, self.keys, self.block_size)

    def cut_queries(self, x: Array) -> Array:
        x = _fill(x, self.tokens)
        x = x.reshape(x.shape[0], -1, self.tokens, self.kv_heads, self.group, x.shape[3])
        x = x.transpose(0, 3, 1, 2, 4, 5)
        return x.reshape(*x.shape[:3], self.tokens * self.group, x.shape[5])

    def cut_keys(self, x: Array) -> Array:
        x = _fill(x, self.keys)
        return x.reshape(x.shape[0], -1, self.keys, self.kv_heads, x.shape[3]).transpose(0, 3, 1, 2, 4)

    def join_queries(self, x: Array) -> Array:
        x = x.reshape(*x.shape[:3], self.tokens, self.group, x.shape[4]).transpose(0, 2, 3, 1, 4, 5)
        return x.reshape(x.shape[0], -1, self.kv_heads * self.group, x.shape[5])[:, : self.length]

    def join_keys(self, x: Array) -> Array:
        x = x.transpose(0, 2, 3, 1, 4)
        return x.reshape(x.shape[0], -1, self.kv_heads, x.shape[4])[:, : self.kv_length]


def divisor(number: int, most: int) -> int:
    """The largest divisor that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def _even(length: int, most: int) -> int:
    """The tile size that cuts `length` into as few tiles as `most` allows, of equal size (a multiple of 8)."""
    each = math.ceil(length / math.ceil(length / most))
    return min(most, 8 * math.ceil(each / 8))


def _fill(x: Array, multiple: int) -> Array:
    """Zeros after axis 1, up to a multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) if missing else x

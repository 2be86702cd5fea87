"""Attention on a TPU by Pallas kernels (Mosaic): forward, backward and decoding.

The kernels are FlashAttention-2's (arXiv 2307.08691, algorithms 1 and 2) over lists of tiles: `tiles.schedule` says
which tiles each outer tile visits, `mosaic_tpu_stream` brings them in that order, and tiles that are not listed are
neither read nor waited for. The query heads of one key-value head are folded into the rows of a tile, so that keys are
read once for all of them; a decoding call is one outer tile whose rows are heads.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import devices
from pallas_kernels.attention import mosaic_tpu_pairs, mosaic_tpu_stream, tiles
from pallas_kernels.attention.mosaic_tpu_backward import backward
from pallas_kernels.attention.mosaic_tpu_forward import forward
from pallas_kernels.attention.mosaic_tpu_rules import LANES, LOG2_E, NEVER, Rules
from pallas_kernels.attention.mosaic_tpu_vmap import with_more_rows
from pallas_kernels.attention.options import Options

# Rows and keys of a tile, forward and backward: the largest of those tried that compilers schedule without spilling
# registers. Of a v6e's: half of the rows, except where the forward goes in stages, of half a tile each.
FORWARD = (512, 512)
IN_STAGES = (1024, 512)
IN_STAGES_MASKED_TWICE = (1024, 256)  # by documents or a window, beside by order
BACKWARD = (512, 512)
# At most these where a score takes more registers: a soft cap, keys wider than the lanes.
HEAVY_FORWARD = (256, 256)
HEAVY_BACKWARD = (128, 512)
# At most this for float32 products, and for keys wider than twice the lanes.
HEAVIEST = (128, 128)

OUTER = 4096 * LANES  # numbers in the keys of an outer tile of the backward, at most

LEAST_IN_STAGES = 256  # rows: with no more, filling and draining the stages takes as long as it spares

MOST_ROWS_DECODING = 128  # queries x heads
MOST_LISTED = 2**17  # tiles: twice as many do not fit the scalar memory

# Of the least tile of a group of heads, which is of whole tokens and whole registers of lanes: a group of 71 would have
# 9,088. Larger groups get heads of zeros (71: nine, then a tile has 640).
MOST_ROWS = 1024

FAR = 2**30  # a position that no query reaches


@dataclasses.dataclass(frozen=True)
class Grid(tiles.Grid):
    """Tiles of at most so many rows (`tokens` x group) and keys, multiples of the 128 lanes.

    in_stages: how the forward kernel goes through them. dividing: whether tiles of keys are to divide their number, so
    that no key has to be copied to fill one up; wherever a multiple of the lanes does.
    """

    most: tuple[int, int] = FORWARD
    in_stages: bool = False
    dividing: bool = False

    @property
    def tokens(self) -> int:
        unit = LANES // math.gcd(LANES, self.group)
        most = max(self.most[0] // self.group // unit * unit, unit)
        return tiles.divisor(self.block_size[0], most) if self.block_size else _side(self.length, most, unit)

    @property
    def keys(self) -> int:
        most = self.most[1]
        if self.window is not None:  # a tile much wider than the window would be masked in most of it
            most = min(most, LANES * math.ceil(max(self.window, 2 * LANES) / LANES))
        whole = self.block_size[1] if self.block_size else self.kv_length if self.dividing else 0
        if self.block_size or (whole and whole % LANES == 0):
            return LANES * tiles.divisor(max(whole // LANES, 1), most // LANES)
        return _side(self.kv_length, most, LANES)


def supports(q, k, v, slopes, index, options: Options) -> str | None:
    """None, or what about the call is not supported."""
    platform = devices.current().platform
    if platform != "tpu":
        return f"by Mosaic TPU needs a TPU, and this is {platform}"
    if q.dtype not in ("bfloat16", "float32") or k.dtype != q.dtype:
        return f"by Mosaic TPU is for bfloat16 or float32 throughout, and q is {q.dtype}, k {k.dtype}"
    rows, keys, kv_heads = index.documents.shape[0], k.shape[1], k.shape[2]
    if _reads_all_heads(q, k, v, slopes, options) and rows * keys * kv_heads > MOST_LISTED * LANES:
        return (
            f"by Mosaic TPU lists tiles of {LANES} keys of all heads in scalar memory when it decodes, at most "
            f"{MOST_LISTED} for all rows that differ, and here are {rows} of {keys} keys and {kv_heads} heads"
        )
    if options.block_size is not None:
        q = jax.eval_shape(functools.partial(_fill_groups, kv_heads=k.shape[2]), q)
        grids = [_grid(q, k, options, backward) for backward in (False, True)]
        if options.block_size[1] % LANES or any(grid.tokens * grid.group % LANES for grid in grids):
            return (
                f"by Mosaic TPU has tiles whose sides are multiples of {LANES}, within one block of the mask each, and "
                f"blocks are {options.block_size[0]} queries of {grids[0].group} heads by {options.block_size[1]} keys"
            )
    return None


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"] | None,
    slopes: Float[Array, "H"] | None,
    index: tiles.Index,
    options: Options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `api.attention`. Differentiable once, in reverse, in q, k and v, through both results."""
    (*shape, heads, _), kv_heads = q.shape, k.shape[2]
    if slopes is not None:
        slopes = _fill_groups(slopes[:, None], kv_heads)[:, 0]
    results = _attend(options, _fill_groups(q, kv_heads), k, v, slopes, index)
    results = (x.reshape(*shape, kv_heads, -1, *x.shape[3:])[:, :, :, : heads // kv_heads] for x in results)
    o, logsumexp = (x.reshape(*shape, heads, *x.shape[4:]) for x in results)
    return o, logsumexp


def _fill_groups(x, kv_heads: int):
    """`[.., H, K]` with heads of zeros after those of each key-value head, where their number makes too large tiles."""
    *shape, heads, width = x.shape
    group = heads // kv_heads
    whole = next(n for n in itertools.count(group) if math.lcm(n, LANES) <= max(MOST_ROWS, n))
    if whole == group:
        return x
    x = x.reshape(*shape, kv_heads, group, width)
    x = jnp.pad(x, [(0, 0)] * (len(shape) + 1) + [(0, whole - group), (0, 0)])
    return x.reshape(*shape, kv_heads * whole, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, slopes, index):
    return _forward(options, q, k, v, slopes, index)[0]


def _forward(options, q, k, v, slopes, index):
    if _reads_all_heads(q, k, v, slopes, options):
        results = _tiled(*_heads_as_documents(options, q, k, v, index))
        o, logsumexp = (a.reshape(*q.shape[:3], *a.shape[3:]) for a in results)
    else:
        o, logsumexp = _tiled(options, q, k, v, slopes, index)
    return (o, logsumexp), (q, k, v, slopes, index, o, logsumexp)


def _reads_all_heads(q, k, v, slopes, options) -> bool:
    return _is_decoding(q, options) and slopes is None and not _lies_across(q, k, v, options)


def _is_decoding(q, options) -> bool:
    """Few queries: then to copy the keys would take longer than to compute."""
    return q.shape[1] * q.shape[2] <= MOST_ROWS_DECODING and options.block_size is None


def _lies_across(q, k, v, options) -> bool:
    """Few queries, and keys and values lie in memory as `[B, G, K, S]`: where K would be padded, XLA has it so."""
    widths = [k.shape[3]] if v is None else [k.shape[3], v.shape[3]]
    return _is_decoding(q, options) and all(width % LANES for width in widths)


def _heads_as_documents(options, q, k, v, index):
    """The same attention with one head, `[B, T H, 1, K]` and `[B, S G, 1, K]`: reshapes that move nothing in memory.

    Which head a key belongs to is part of the number of its document, so that a query sees those of its own head.
    Every query is compared with the keys of all heads: for few queries that costs less than a copy of the keys.
    """
    heads, kv_heads = q.shape[2], k.shape[2]

    def numbered(documents, head):
        """Documents are numbered by the first query in them, so that no number overflows; 0: padding, or no query's."""
        same = (documents[:, :, None] == index.documents[:, None, :]) & (documents != 0)[:, :, None]
        number = jnp.where(jnp.any(same, axis=2), 1 + jnp.argmax(same, axis=2).astype(jnp.int32), 0)[..., None]
        return jnp.where(number != 0, number * kv_heads + head[None, None], 0).reshape(documents.shape[0], -1)

    index = tiles.Index(
        numbered(index.documents, jnp.arange(heads, dtype=jnp.int32) // (heads // kv_heads)),
        numbered(index.kv_documents, jnp.arange(kv_heads, dtype=jnp.int32)),
        jnp.repeat(index.positions, heads, axis=1),
        jnp.repeat(index.kv_positions, kv_heads, axis=1),
    )
    q, k, v = (None if a is None else a.reshape(a.shape[0], -1, 1, a.shape[3]) for a in (q, k, v))
    return dataclasses.replace(options, plain=False), q, k, v, None, index


def _tiled(options, q, k, v, slopes, index):
    grid, rules = _grid(q, k, options, backward=False), _rules(q, k, v, options)
    cut = grid.cut_index(index)
    order = jax.vmap(functools.partial(tiles.schedule, band=rules.band, by_query=True))(cut)
    queries, keys, values, *index, by_head = _blocks(grid, q, k, v, slopes, cut, options)
    across = _lies_across(q, k, v, options)
    if across:
        keys, values = (None if a is None else _fill_lanes(a.transpose(0, 2, 3, 1), grid.keys) for a in (k, v))

    def run(arrays, slopes):
        return tuple(forward(rules, *arrays, slopes, grid.in_stages, across))

    out, sums = with_more_rows(run)((mosaic_tpu_stream.plans(order), queries, keys, values, *index), by_head)
    logsumexp = grid.join_queries(sums.swapaxes(3, 4))[..., 0] / LOG2_E
    return grid.join_queries(out), logsumexp


def _backward(options, residuals, cotangents):
    q, k, v, slopes, index, o, logsumexp = residuals
    do, of_logsumexp = cotangents
    grid, rules = _grid(q, k, options, backward=True), _rules(q, k, v, options)
    cut = grid.cut_index(index)
    active = jax.vmap(functools.partial(tiles.overlaps, band=rules.band))(cut)[0]
    together = _together(active.shape[2], grid.keys, max(q.shape[3], rules.value_width), q.dtype.itemsize)
    # d scores = weights (d weights - product): the log-sum-exp's derivative in a score is that score's weight
    product = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - of_logsumexp
    # For a row that sees nothing, real or filled in, exp2(score - 1e30) is 0.
    sums = jnp.where(jnp.isneginf(logsumexp), -NEVER, logsumexp * LOG2_E)
    rows = [grid.cut_queries(a[..., None]).swapaxes(3, 4) for a in (sums, product)]
    statistics = jnp.concatenate(rows, axis=3)
    *arrays, by_head = _blocks(grid, q, k, v, slopes, cut, options)

    def run(arrays, slopes):
        return tuple(backward(rules, _gathers_turned(q, options), together, *arrays, slopes))

    plans = mosaic_tpu_pairs.plans(active, together)
    gradients = with_more_rows(run)((plans, *arrays, grid.cut_queries(do), statistics), by_head)
    dq = (grid.join_queries(gradients[0].swapaxes(3, 4)) * options.scale).astype(q.dtype)
    dk = grid.join_keys(gradients[1])
    dv = None if v is None else grid.join_keys(gradients[2])
    dindex = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), index)
    return dq, dk, dv, jax.tree.map(jnp.zeros_like, slopes), dindex


_attend.defvjp(_forward, _backward)


def _blocks(grid, q, k, v, slopes, cut, options):
    """queries, keys, values, query_index, key_index and slopes, as the kernels take them."""
    documents, kv_documents, positions, kv_positions, _ = cut
    real = kv_documents != 0
    kv_documents = jnp.where(real, kv_documents, jnp.iinfo(jnp.int32).min)  # unlike the 0 of a query that is padding
    if options.causal:
        kv_positions = jnp.where(real, kv_positions, FAR)
    query_index = jnp.repeat(jnp.stack([documents, positions], axis=2), grid.group, axis=3)
    key_index = jnp.stack([kv_documents, kv_positions], axis=2)
    by_head = None
    if slopes is not None:
        by_head = jnp.tile(slopes.astype(jnp.float32).reshape(grid.kv_heads, 1, grid.group), (1, 1, grid.tokens))
    values = None if v is None else grid.cut_keys(v)
    return grid.cut_queries(q), grid.cut_keys(k), values, query_index, key_index, by_head


def _grid(q, k, options, backward):
    most, limit = (BACKWARD, HEAVY_BACKWARD) if backward else (FORWARD, HEAVY_FORWARD)
    if q.dtype == jnp.float32 or q.shape[3] > 2 * LANES:
        limit = HEAVIEST
    elif _is_light(q, options):
        limit = most
    most = min(most[0], limit[0]), min(most[1], limit[1])
    if _is_v6e():
        most = max(most[0] // 2, LANES), most[1]
    grid = Grid(
        q.shape[1], k.shape[1], kv_heads=k.shape[2], group=q.shape[2] // k.shape[2], window=options.window,
        block_size=options.block_size, most=most, dividing=not backward and _is_decoding(q, options),
    )  # fmt: skip
    if not backward and _goes_in_stages(q, options):
        once = options.plain and options.causal and options.window is None
        most = IN_STAGES if once else IN_STAGES_MASKED_TWICE
        staged = dataclasses.replace(grid, most=most, in_stages=True)
        return staged if staged.tokens * staged.group > LEAST_IN_STAGES else grid
    return grid


def _together(tiles: int, keys: int, width: int, itemsize: int) -> int:
    """How many tiles of keys make an outer tile of the backward: a power of two, such that fast memory holds them,
    where narrow ones take whole lines of lanes.

    What begins and ends one takes as long as two or three pairs of tiles, and dq is read and written once for each.
    """
    together, size, lines = 1, keys * width, keys * -(-width // LANES) * LANES * itemsize
    while together < tiles and 2 * together * size <= OUTER and 2 * together * lines <= 4 * OUTER:
        together *= 2
    return together


def _fill_lanes(x, multiple):
    missing = -x.shape[3] % multiple
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x


def _is_v6e() -> bool:
    return "v6" in devices.current().kind


def _is_light(q, options) -> bool:
    """Whether a score takes few registers."""
    return q.dtype == jnp.bfloat16 and options.soft_cap is None and q.shape[3] <= LANES


def _goes_in_stages(q, options) -> bool:
    """Of the forward: a v6e's fast matrix units would wait for the softmax, else."""
    return _is_v6e() and _is_light(q, options)


def _gathers_turned(q, options) -> bool:
    """Of the backward: a v6e's wide matrix units would be half empty, were channels their columns."""
    return _is_v6e() and _is_light(q, options)


def _rules(q, k, v, options):
    """Plain causal calls need no documents: padding after the keys lies at a position that no query reaches."""
    return Rules(
        band=tiles.Band(options.causal, options.window),
        by_document=not (options.plain and options.causal),
        scale=options.scale,
        soft_cap=options.soft_cap,
        value_width=options.value_width or v.shape[3],
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
    )


def _side(length: int, most: int, unit: int) -> int:
    """The smallest of `unit` x 1, 2, 4 .. that holds the length, as far as `most` allows.

    Nothing in between: a backward of 384 x 384 spills where 512 x 512 does not.
    """
    side = unit
    while side < length and 2 * side <= most:
        side *= 2
    return side

"""Softmax attention in Pallas kernels for Hopper GPUs (H100, H200), by Mosaic GPU.

Here: which calls they take, sizes of tiles, and how few queries of a long cache are spread over the chip. The kernels
are in `mosaic_gpu_forward`, `mosaic_gpu_backward` and `mosaic_gpu_latent`. No tile outside `tiles.schedule` is read.

Few queries (decoding) are a matter of reading the cache once, at the memory's speed: the query heads of one key-value
head become rows of one tile, and the list of key tiles is split over so many blocks that all of the chip reads.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import devices, mosaic_gpu_products
from pallas_kernels.attention import chunked, mosaic_gpu_latent
from pallas_kernels.attention.mosaic_gpu_backward import OUTER, backward_keys, backward_queries
from pallas_kernels.attention.mosaic_gpu_backward import Plan as BackwardPlan
from pallas_kernels.attention.mosaic_gpu_forward import Plan, forward
from pallas_kernels.attention.mosaic_gpu_tiles import visits
from pallas_kernels.attention.options import Options, merge
from pallas_kernels.attention.tiles import Index
from pallas_kernels.parts import MULTIPROCESSORS

SIDE = 128  # every tile divides it, and it has to divide the blocks of a block mask
GRID = 65_535  # places along all axes but the last two of a CUDA grid: tiles and rows here
MOST = 256  # channels of a head whose output fits a warpgroup's registers
LEAST = 8  # tiles of keys of a part, where they are split: reading fewer takes no longer than merging the parts
STAGES = 4  # of tiles in flight at most: two hide the latency of a copy, four that of a late one


def supports(q, k, v, slopes, index, options: Options) -> str | None:
    """None, or what about the call is not supported."""
    device = devices.current()
    if not device.hopper:
        return f"by Mosaic GPU needs a Hopper GPU (H100, H200), and this is {device.kind or device.platform}"
    if q.dtype not in ("bfloat16", "float16") or k.dtype != q.dtype:
        return f"by Mosaic GPU is for bfloat16 or float16 throughout, and q is {q.dtype}, k {k.dtype}"
    if slopes is not None:
        return "by Mosaic GPU has no slopes"
    widths = q.shape[3], _value_width(v, options)
    if mosaic_gpu_products.swizzle(*widths) is None:
        return f"by Mosaic GPU has widths that are multiples of 32, and these are {widths[0]} and {widths[1]}"
    if max(widths) > MOST and not (v is None and mosaic_gpu_latent.fits(*widths)):
        return (
            f"by Mosaic GPU has widths up to {MOST} (for values that are part of the keys, {mosaic_gpu_latent.WIDEST}, "
            f"multiples of 64 and 128), and these are {widths[0]} and {widths[1]}"
        )
    if options.block_size is not None and any(size % SIDE for size in options.block_size):
        return f"by Mosaic GPU has blocks that are multiples of {SIDE}, and these are {options.block_size}"
    batch, longest = q.shape[0], max(q.shape[1], k.shape[1])
    if batch * math.ceil(longest / mosaic_gpu_products.LINES) > GRID:  # by the smallest tile
        return (
            f"by Mosaic GPU has at most {GRID} tiles of {mosaic_gpu_products.LINES} tokens in all rows, the places along an "
            f"axis of a grid, and these are {batch} rows of {longest} tokens"
        )
    return None


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"] | None,
    slopes: None,
    index: Index,
    options: Options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `api.attention`. Differentiable once, in reverse, in q, k and v."""
    batch, length, heads, width = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    fold = length < SIDE and group > 1
    if fold:  # too few queries for a tile: those of one key-value head, token by token, pass for those of one head
        q = q.reshape(batch, length, kv_heads, group, width).swapaxes(2, 3).reshape(batch, -1, kv_heads, width)
        documents, positions = (jnp.repeat(a, group, axis=1) for a in (index.documents, index.positions))
        index = index._replace(documents=documents, positions=positions)
        if options.block_size is not None:
            options = dataclasses.replace(options, block_size=(options.block_size[0] * group, options.block_size[1]))
    rows = q.shape[1]
    q, k, v = _fill(q), _fill(k), None if v is None else _fill(v)
    o, logsumexp = _attend(options, q, k, v, Index(*(_fill(a) for a in index[:4]), index.block_mask))
    o, logsumexp = o[:, :rows], logsumexp[:, :rows]
    if not fold:
        return o, logsumexp

    def unfold(x):
        return x.reshape(batch, length, group, kv_heads, -1).swapaxes(2, 3).reshape(batch, length, heads, -1)

    return unfold(o), unfold(logsumexp)[..., 0]


def _fill(x):
    """Zeros (of documents: padding) after axis 1, up to a multiple of 8: shared memory is filled in tiles of 8 lines,
    and the copy knows only whole tiles to be outside of an array that has more than one."""
    missing = -x.shape[1] % 8 if x.shape[1] > 8 else 0
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, index):
    width, value_width = q.shape[3], _value_width(v, options)
    if max(width, value_width) > MOST:
        kernel, plan = mosaic_gpu_latent.forward, mosaic_gpu_latent.plan(q, k, split)
    else:
        kernel, plan = forward, _forward_plan(q, k, width, value_width)
    o, logsumexp = kernel(plan, options, q, k, v, visits(index, options, plan.queries, plan.keys, by_query=True))
    logsumexp = logsumexp[..., : q.shape[1]].swapaxes(2, 3)
    logsumexp = jnp.where(logsumexp == jnp.inf, -jnp.inf, logsumexp * math.log(2))
    return merge(o, logsumexp) if plan.splits > 1 else (o[0], logsumexp[0])


def _forward(options, q, k, v, index):
    o, logsumexp = _attend(options, q, k, v, index)
    return (o, logsumexp), (q, k, v, index, o, logsumexp)


def _backward(options, residuals, cotangents):
    q, k, v, index, o, logsumexp = residuals
    dindex = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), index)
    if max(q.shape[3], _value_width(v, options)) > MOST:
        # Nothing is trained at these widths (a decoding form's), so what is there is not worth a kernel.
        _, pullback = jax.vjp(lambda q, k: chunked.run(q, k, None, None, index, options), q, k)
        return *pullback(cotangents), None, dindex
    cotangent, of_logsumexp = cotangents
    values = options.values(k, v)
    product = (o.astype(jnp.float32) * cotangent.astype(jnp.float32)).sum(axis=-1) - of_logsumexp
    logsumexp = jnp.where(logsumexp == -jnp.inf, jnp.inf, logsumexp / math.log(2))
    statistics = jnp.stack([logsumexp, product], axis=1).transpose(0, 3, 1, 2)
    statistics = jnp.pad(statistics, ((0, 0),) * 3 + ((0, -q.shape[1] % OUTER),))

    arrays = q, k, values, cotangent, statistics
    of_queries, of_keys = _backward_plans(q.shape[3], values.shape[3])
    listed = visits(index, options, OUTER, of_queries.inner, by_query=True)
    dq = backward_queries(of_queries, options, *arrays, listed)
    results = {}
    for wanted, plan in of_keys.items():
        listed = visits(index, options, plan.inner, OUTER, by_query=False)
        results |= zip(wanted, backward_keys(plan, options, wanted, *arrays, listed), strict=True)
    dk, dv = results["k"], results["v"]
    if v is None:
        return dq, dk.at[..., : options.value_width].add(dv), None, dindex
    return dq, dk, dv, dindex


_attend.defvjp(_forward, _backward)


def _value_width(v, options):
    return options.value_width if v is None else v.shape[3]


def _forward_plan(q, k, width, value_width):
    """128 queries by 128 keys, so that a warpgroup's scores and output take 128 of its 232 registers at width 128; 64
    keys where the output alone takes those."""
    warpgroups = 1 if q.shape[1] <= mosaic_gpu_products.LINES else 2
    keys = SIDE if value_width <= 128 else SIDE // 2
    own, each = warpgroups * mosaic_gpu_products.LINES * width, keys * (width + value_width)
    blocks = math.ceil(q.shape[1] / (warpgroups * mosaic_gpu_products.LINES)) * q.shape[0] * q.shape[2]
    splits = split(blocks, math.ceil(k.shape[1] / keys))
    return Plan(warpgroups, keys, _stages(own, each), splits)


def _backward_plans(width, value_width):
    """Of dq, and of dk and dv: by one kernel where a warpgroup's registers hold both, else by two."""
    own, both = OUTER * (width + value_width), max(width, value_width)
    swizzle, inner = mosaic_gpu_products.swizzle(width, value_width), 64
    if both > 192:  # two tiles of 64 in flight would not fit beside the block's own
        swizzle, inner = 64, 32
    each = inner * (width + value_width)
    plan = BackwardPlan(inner, _stages(own, each), swizzle)
    if both <= 128:
        return plan, {("k", "v"): plan}
    return plan, {("k",): plan, ("v",): plan}


def _stages(own, each):
    """How many tiles of `each` numbers fit beside the block's own."""
    return min(STAGES, (mosaic_gpu_products.SHARED_MEMORY // 2 - own) // each)


def split(blocks: int, tiles: int) -> int:
    """Into how many parts the keys are split, where so many blocks each have at most so many tiles of keys to read.

    The chip works in waves of one block for each multiprocessor; n parts take ceil(blocks n / multiprocessors) waves of
    1 / n each. The least n within a twentieth of the best is taken, of those that leave LEAST tiles to a part. Blocks
    for more than two waves are not split: what that could save is less than the partial results cost.
    """
    if blocks > 2 * MULTIPROCESSORS:
        return 1
    counts = range(1, min(max(tiles // LEAST, 1), MULTIPROCESSORS) + 1)
    costs = [math.ceil(blocks * n / MULTIPROCESSORS) / n for n in counts]
    return next(n for n, cost in zip(counts, costs, strict=True) if cost <= 1.05 * min(costs))

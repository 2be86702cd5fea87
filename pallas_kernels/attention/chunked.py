"""Softmax attention in tiles with an online softmax, in plain JAX: the default wherever no kernel applies.

Memory is that of a few tiles, forward and backward: the backward recomputes each tile's weights from the
log-sum-exp of its rows (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2). A tile in which no query sees a
key is never computed: `tiles.schedule` lists the others beforehand, and the loops run over that list.

On a CPU a matrix product with many batch dimensions runs at half the speed of a plain one, so rows and groups of
key-value heads are looped over, and the query heads of one key-value head are folded into the rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.attention import tiles
from pallas_kernels.attention.options import Options, log_sum

NEVER = -1e30  # below every score, yet finite, so that a row that has seen nothing gives no NaN


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"] | None,
    slopes: Float[Array, "H"] | None,
    index: tiles.Index,
    options: Options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """See `api.attention`. Differentiable once, in reverse, in q, k and v."""
    slopes = None if slopes is None else slopes.astype(_arithmetic(q)[0])
    if q.shape[1] == 1:
        return _single_query(q, k, v, slopes, index, options)
    index = jax.tree.map(lambda a: jnp.broadcast_to(a, (q.shape[0], *a.shape[1:])), index)
    return _tiled(options, q, k, options.values(k, v), index, slopes)


def _single_query(q, k, v, slopes, index, options):
    """One query per row (decoding): the scores of a row fit, so one pass over the cache and no tiles.

    Every head is multiplied with the keys of all G heads, the others' with zeros: G times the arithmetic, yet the
    cache is read once, as it lies. Products head by head make XLA copy it, which takes three to five times as long.
    """
    batch, _, heads, width = q.shape
    kv_length, kv_heads = k.shape[1], k.shape[2]
    dtype, precision = _arithmetic(q)
    own = jnp.eye(kv_heads, dtype=dtype)
    groups = q.reshape(batch, kv_heads, heads // kv_heads, width).astype(dtype) * options.scale
    spread = jnp.einsum("bgrk,gn->bgknr", groups, own, precision=precision).reshape(batch, kv_heads * width, heads)
    keys = k.reshape(batch, kv_length, kv_heads * width).astype(dtype)
    scores = jnp.einsum("bsc,bch->bsh", keys, spread, precision=precision)
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    if slopes is not None:
        distance = (index.positions - index.kv_positions).astype(dtype)
        scores -= slopes[None, None, :] * distance[:, :, None]
    seen = tiles.visible(index, tiles.Band(options.causal, options.window))[:, 0, :, None]
    if index.block_mask is not None:
        seen &= jnp.repeat(index.block_mask[:, 0], options.block_size[1], axis=1)[:, :kv_length, None]
    seen = jnp.broadcast_to(seen, scores.shape)
    weights = jax.nn.softmax(scores, axis=1, where=seen)
    values = options.values(k, v)
    width = values.shape[3]
    out = jnp.einsum("bsh,bsc->bhc", weights, values.reshape(batch, kv_length, -1).astype(dtype), precision=precision)
    out = out.reshape(batch, kv_heads, heads // kv_heads, kv_heads, width)
    o = jnp.einsum("bgrgv->bgrv", out).reshape(batch, 1, heads, width).astype(q.dtype)
    return o, log_sum(scores, seen, axis=1)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(options, q, k, v, index, slopes):
    return _forward(options, q, k, v, index, slopes)[0]


def _forward(options, q, k, v, index, slopes):
    """Returns the results and what the backward needs: the inputs, the output and each row's log-sum-exp."""
    band, grid = tiles.Band(options.causal, options.window), _grid(q, k, options)
    by_group = None if slopes is None else slopes.reshape(k.shape[2], -1)

    def row(args):
        tile_index, blocks = args
        order = tiles.schedule(tile_index, band, by_query=True)

        def head(args):
            slopes, blocks = args
            return _forward_head(band, options.scale, options.soft_cap, tile_index, slopes, order, *blocks)

        return jax.lax.map(head, (by_group, blocks), batch_size=grid.heads_together)

    blocks = grid.cut_queries(q), grid.cut_keys(k), grid.cut_keys(v)
    out, logsumexp = jax.lax.map(row, (grid.cut_index(index), blocks))
    o = grid.join_queries(out).astype(q.dtype)
    seen = grid.join_queries(logsumexp[..., None])[..., 0]
    return (o, jnp.where(seen == jnp.inf, -jnp.inf, seen)), (q, k, v, index, slopes, o, logsumexp)


def _forward_head(band, scale, soft_cap, index, slopes, order, queries, keys, values):
    """All query tiles of one key-value head: queries [tiles, rows, K], keys [tiles, C, K], values [tiles, C, V]."""
    dtype, precision = _arithmetic(queries)
    rows = queries.shape[1]

    def query_tile(args):
        i, q, listed = args
        q = q.astype(dtype) * scale

        def visit(masked, n, carry):
            j = listed.tiles[n]
            peak, total, out = carry
            scores, _ = _scores(q, keys[j].astype(dtype), soft_cap, precision)
            if slopes is not None:
                scores -= tiles.tile_bias(index, i, j, slopes)
            if masked:
                scores = jnp.where(tiles.tile_mask(index, i, j, rows, band), scores, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            weights = jnp.exp(scores - new_peak[:, None])
            kept = jnp.exp(peak - new_peak)
            added = jnp.dot(weights, values[j].astype(dtype), precision=precision)
            return new_peak, total * kept + weights.sum(axis=1), out * kept[:, None] + added

        carry = (
            jnp.full((rows,), NEVER, dtype), jnp.zeros((rows,), dtype), jnp.zeros((rows, values.shape[2]), dtype)
        )  # fmt: skip
        peak, total, out = listed.loop(visit, carry)
        logsumexp = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1)), jnp.inf)
        return out / jnp.where(total > 0, total, 1)[:, None], logsumexp

    return jax.lax.map(query_tile, (jnp.arange(queries.shape[0]), queries, order))


def _backward(options, residuals, cotangents):
    q, k, v, index, slopes, o, logsumexp = residuals
    cotangent, of_logsumexp = cotangents
    band, grid = tiles.Band(options.causal, options.window), _grid(q, k, options)
    by_group = None if slopes is None else slopes.reshape(k.shape[2], -1)
    dtype = _arithmetic(q)[0]
    # d scores = weights (d weights - product): the log-sum-exp's derivative in a score is that score's weight
    product = jnp.sum(o.astype(dtype) * cotangent.astype(dtype), axis=-1, keepdims=True) - of_logsumexp[..., None]

    def row(args):
        tile_index, blocks = args
        order = tiles.schedule(tile_index, band, by_query=False)

        def head(args):
            slopes, blocks = args
            return _backward_head(band, options.scale, options.soft_cap, tile_index, slopes, order, *blocks)

        return jax.lax.map(head, (by_group, blocks), batch_size=grid.heads_together)

    blocks = grid.cut_queries(q), grid.cut_keys(k), grid.cut_keys(v)
    blocks += grid.cut_queries(cotangent), logsumexp, grid.cut_queries(product)[..., 0]
    dq, dk, dv = jax.lax.map(row, (grid.cut_index(index), blocks))
    dq = (grid.join_queries(dq) * options.scale).astype(q.dtype)
    dk, dv = grid.join_keys(dk).astype(k.dtype), grid.join_keys(dv).astype(v.dtype)
    dindex = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), index)
    return dq, dk, dv, dindex, jax.tree.map(jnp.zeros_like, slopes)


def _backward_head(band, scale, soft_cap, index, slopes, order, queries, keys, values, cotangents, logsumexp, products):
    """One pass over the key tiles: each gathers its own dk, dv, and adds its part to dq, which is carried.

    Scores are [keys, rows] and dq is [tiles, K, rows] here: then no product contracts two leading axes, which on a
    CPU takes twice as long.
    """
    dtype, precision = _arithmetic(queries)
    tile_count, rows, width = queries.shape

    def key_tile(dq, args):
        j, k, v, listed = args
        k, v = k.astype(dtype), v.astype(dtype)
        k_turned = k.T

        def visit(masked, n, carry):
            i = listed.tiles[n]
            dq, dk, dv = carry
            q, do = queries[i].astype(dtype) * scale, cotangents[i].astype(dtype)
            scores, bend = _scores(k, q, soft_cap, precision)
            if slopes is not None:
                scores -= tiles.tile_bias(index, i, j, slopes).T
            weights = jnp.exp(scores - logsumexp[i][None, :])
            if masked:
                weights = jnp.where(tiles.tile_mask(index, i, j, rows, band).T, weights, 0)
            dweights = jax.lax.dot_general(v, do, (((1,), (1,)), ((), ())), precision=precision)
            dscores = weights * (dweights - products[i][None, :]) * bend
            return (
                dq.at[i].add(jnp.dot(k_turned, dscores, precision=precision)),
                dk + jnp.dot(dscores, q, precision=precision),
                dv + jnp.dot(weights, do, precision=precision),
            )

        dq, dk, dv = listed.loop(visit, (dq, jnp.zeros_like(k), jnp.zeros_like(v)))
        return dq, (dk, dv)

    dq = jnp.zeros((tile_count, width, rows), dtype)
    dq, (dk, dv) = jax.lax.scan(key_tile, dq, (jnp.arange(keys.shape[0]), keys, values, order))
    return dq.swapaxes(1, 2), dk, dv


_tiled.defvjp(_forward, _backward)


def _grid(q, k, options):
    return tiles.Grid(
        q.shape[1], k.shape[1], kv_heads=k.shape[2], group=q.shape[2] // k.shape[2], window=options.window,
        block_size=options.block_size,
    )  # fmt: skip


def _scores(lines, columns, soft_cap, precision):
    """Capped scores of one tile, and their derivative in the scores before the cap."""
    scores = jax.lax.dot_general(lines, columns, (((1,), (1,)), ((), ())), precision=precision)
    if soft_cap is None:
        return scores, 1
    bent = jnp.tanh(scores / soft_cap)
    return soft_cap * bent, 1 - bent * bent


def _arithmetic(x):
    """float32 at least, at full precision; of narrower inputs the default products lose nothing worth keeping."""
    wide = np.promote_types(x.dtype, np.float32)
    return wide, jax.lax.Precision.HIGHEST if wide == x.dtype else jax.lax.Precision.DEFAULT

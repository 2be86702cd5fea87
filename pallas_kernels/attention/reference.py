"""Softmax attention with every score written out: the truth that every other implementation is held to."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.attention.options import Options, log_sum
from pallas_kernels.attention.tiles import Index


def run(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"] | None,
    slopes: Float[Array, "H"] | None,
    index: Index,
    options: Options,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """`softmax(soft_cap(scale q k^T) - slopes distance, over the keys that are seen) v`, 0 where no key is seen; and
    the logarithm of each softmax's sum.

    See `api.attention`.
    """
    batch, length, heads, _ = q.shape
    dtype = np.promote_types(q.dtype, np.float32)
    groups = q.reshape(batch, length, k.shape[2], -1, q.shape[3]).astype(dtype)  # G groups of H / G heads
    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btgrk,bsgk->bgrts", groups, k.astype(dtype), precision=precision) * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)

    distance = index.positions[:, :, None] - index.kv_positions[:, None, :]
    if slopes is not None:
        by_group = slopes.astype(dtype).reshape(1, k.shape[2], -1, 1, 1)
        scores -= by_group * distance.astype(dtype)[:, None, None]
    seen = (index.documents[:, :, None] == index.kv_documents[:, None, :]) & (index.kv_documents[:, None, :] != 0)
    if options.causal:
        seen &= distance >= 0
    if options.window is not None:
        seen &= distance < options.window
    if index.block_mask is not None:
        lines, columns = options.block_size
        spread = jnp.repeat(jnp.repeat(index.block_mask, lines, axis=1), columns, axis=2)
        seen &= spread[:, :length, : k.shape[1]]
    seen = jnp.broadcast_to(seen[:, None, None], scores.shape)
    weights = jax.nn.softmax(scores, axis=-1, where=seen)
    o = jnp.einsum("bgrts,bsgv->btgrv", weights, options.values(k, v).astype(dtype), precision=precision)
    logsumexp = log_sum(scores, seen, axis=-1).transpose(0, 3, 1, 2)
    return o.reshape(batch, length, heads, -1).astype(q.dtype), logsumexp.reshape(batch, length, heads)

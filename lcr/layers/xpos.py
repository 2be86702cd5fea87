"""xPos (arXiv 2212.10554): rotary positions whose products also shrink with the distance.

The rotated query at position p times the rotated key at s, summed over channel pairs i, becomes

    sum_i zeta_i^((p - s) / 512) q_i(p) . k_i(s),        zeta_i = (2 i / K + 0.4) / 1.4        (Algorithm 1)

The paper multiplies queries with zeta^(p / 512) and divides keys by zeta^(s / 512), which leaves float32 at some
36,000 tokens. Any reference r may be taken off both positions, so here each block of queries has its own: its first
token. Queries are then multiplied with zeta^((p - r) / 512), at least e^-10 in a block, and keys with
zeta^((r - s) / 512): at most e^10 in the block, below 1 before it, where what underflows to 0 is far away. So the
cache holds keys that are rotated and no more, and they are multiplied (copied, therefore) each time they are used,
in a decoding step too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pallas_kernels.attention import attention

from lcr.typing import Array, Float, Int

GAMMA = 0.4
SCALE_BASE = 512
BLOCK = 4_096  # queries with one reference; zeta_0^(-4096 / 512) = e^10


def xpos_decays(width: int) -> np.ndarray:
    """`ln(zeta_i) / 512` for i in 0 .. width/2 - 1, what each token of distance adds to the logarithm; float64."""
    zeta = (np.arange(0, width, 2, dtype=np.float64) / width + GAMMA) / (1 + GAMMA)
    return np.log(zeta) / SCALE_BASE


def xpos_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    **options: Any,
) -> Float[Array, "B T H V"]:
    """`pallas_kernels.attention` of rotated queries and keys (pairs of channels i and i + K / 2) with xPos's factors.

    Positions must grow by at most one from a query to the next, through all documents of a row, and give the distance
    of any two tokens of one document. A query must not see keys after it. Otherwise as `attention`.
    """
    index = segment_ids, q_positions
    length = q.shape[1]

    def attend(block):
        q, ids, positions = block
        reference = positions[:, :1]
        return attention(
            _scaled(q, jnp.maximum(positions - reference, 0)),  # below 0: what only fills the last block
            # Later keys, which no query of the block sees, are held to what is finite.
            _scaled(k, jnp.maximum(reference - kv_positions, -BLOCK)),
            v,
            segment_ids=ids,
            kv_segment_ids=kv_segment_ids,
            q_positions=positions,
            kv_positions=kv_positions,
            **options,
        )

    if length <= BLOCK:
        return attend((q, *index))

    def cut(x):
        filled = jnp.pad(x, ((0, 0), (0, -length % BLOCK)) + ((0, 0),) * (x.ndim - 2))
        return filled.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]).swapaxes(0, 1)

    # Without the checkpoint each block would keep its scaled copy of all the keys for the backward.
    o = jax.lax.map(jax.checkpoint(attend), tuple(cut(x) for x in (q, *index))).swapaxes(0, 1)
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]


def _scaled(x: Float[Array, "B T H K"], distances: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
    """`x zeta_i^(distance / 512)`, in float32 at least."""
    dtype = np.promote_types(x.dtype, np.float32)
    decays = np.tile(xpos_decays(x.shape[-1]), 2).astype(dtype)
    factors = jnp.exp(distances.astype(dtype)[:, :, None] * decays[None, None, :])[:, :, None, :]
    return (x.astype(dtype) * factors).astype(x.dtype)

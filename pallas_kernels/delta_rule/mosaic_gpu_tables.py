"""The delta rule's chunks without the state: what all chunks at once can be made into before the state is known.

With M = (I - A_ab)^-1, the scores P_u, P_v of queries with b and k (a token's own on the diagonal), and the decays
`since`, `until`, `token` of `decays.Factors`, a chunk of C tokens is (arXiv 2406.06484 section 3.2, 2412.06464 section 3.3)

    o = read S + own V               read = q token since + P_u M (a since)        own = P_v + P_u M A_ak
    S <- total S + key^T V + back^T (seen S)
                                     seen = M (a since)    back = b until          key = k until + (M A_ak)^T back

in which S, the only thing that depends on what came before, is met by three matrix products.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.delta_rule.blocks import product, unit_inverse
from pallas_kernels.delta_rule.decays import factors, scores
from pallas_kernels.delta_rule.reference import Tokens

CHUNK = 64


class Tables(NamedTuple):
    """Of all chunks, in the inputs' dtype, `total` in float32; n = T / C, and G is K, or 1 with one decay a head."""

    read: Float[Array, "B T H K"]
    own: Float[Array, "B T H C"]
    seen: Float[Array, "B T H K"]
    key: Float[Array, "B T H K"]
    back: Float[Array, "B T H K"]
    total: Float[Array, "B n H G"]


def tables(tokens: Tokens, scale: float) -> Tables:
    """In plain JAX. T is a multiple of the chunk."""
    dtype, (batch, length, heads, _) = tokens.q.dtype, tokens.q.shape
    count = length // CHUNK

    def chunks(x):  # [B T H K] -> [B n, H, C, K]
        return x.astype(jnp.float32).reshape(batch * count, CHUNK, heads, -1).swapaxes(1, 2)

    def tokens_first(x):
        return x.astype(dtype).swapaxes(1, 2).reshape(batch, length, heads, -1)

    q, k, a, b, log_decay = (chunks(x) for x in (tokens.q, tokens.k, tokens.a, tokens.b, tokens.log_decay))
    decays = factors(log_decay)
    q = q * scale
    rows, columns = jnp.stack([a, q * decays.token]), jnp.stack([b, k])
    (a_b, a_k), (q_b, q_k) = scores(rows, columns, decays)
    own = jnp.sum(q[None] * columns, axis=-1)[..., None] * jnp.eye(CHUNK)
    q_b, q_k = q_b + own[0], q_k + own[1]
    inverse = unit_inverse(a_b)
    seen, inner = _times(inverse, a * decays.since), _times(inverse, a_k)
    back = b * decays.until
    results = (
        rows[1] * decays.since + _times(q_b, seen),
        q_k + _times(q_b, inner),
        seen,
        k * decays.until + product("bhtj,bhtk->bhjk", inner, back),
        back,
    )
    return Tables(*map(tokens_first, results), decays.total.reshape(batch, count, heads, -1))


def _times(x, y):
    return product("bhtj,bhjk->bhtk", x, y)

"""The delta rule's chunks without the state: what all chunks at once can be made into before the state is known.

With M = (I - A_ab)^-1, the scores P_u, P_v of queries with b and k (a token's own on the diagonal), and the decays
`since`, `until`, `token` of `decays.Factors`, a chunk of C tokens is (arXiv 2406.06484 section 3.2, 2412.06464 section
3.3)

    o = read S + own V               read = q token since + P_u M (a since)        own = P_v + P_u M A_ak
    S <- total S + key^T V + back^T (seen S)
                                     seen = M (a since)    back = b until          key = k until + (M A_ak)^T back

in which S, the only thing that depends on what came before, is met by three matrix products.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.delta_rule import mosaic_gpu_scalar, mosaic_gpu_scalar_backward, mosaic_gpu_vector
from pallas_kernels.delta_rule.blocks import product, unit_inverse
from pallas_kernels.delta_rule.decays import factors, finite, scores
from pallas_kernels.delta_rule.mosaic_gpu_split import CHUNK


class Tables(NamedTuple):
    """Of all chunks, in the inputs' dtype, `total` in float32; n = T / C, and G is K, or 1 with one decay a head."""

    read: Float[Array, "B T H K"]
    own: Float[Array, "B T H C"]
    seen: Float[Array, "B T H K"]
    key: Float[Array, "B T H K"]
    back: Float[Array, "B T H K"]
    total: Float[Array, "B n H G"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def tables(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H G"],
    scale: float,
) -> Tables:
    """T is a multiple of the chunk, log_decay float32. Differentiable once, in reverse; all is computed again."""
    if log_decay.shape[3] > 1:
        return Tables(*mosaic_gpu_vector.forward(q, k, a, b, log_decay, scale))
    sums, total = running_sums(finite(log_decay))
    return Tables(*mosaic_gpu_scalar.forward(q, k, a, b, sums, scale), total)


def running_sums(log_decay: Float[Array, "B T H 1"]) -> tuple[Float[Array, "B n H 5 C"], Float[Array, "B n H 1"]]:
    """Of each chunk the sums up to every token in two parts, these without the token's own, and those after it; and
    what is left of a state after all of the chunk.

    One float32 sum will not do: once a gate of -100 has gone into it, differences of it no longer know a gate of -1e-6.
    So each log decay is cut into a multiple of 1/512, of which sums are exact, and a small rest.
    """
    batch, length, heads, _ = log_decay.shape
    log_decay = jax.lax.optimization_barrier(log_decay)  # sums of zeros, of no decay, are slow to fold
    gates = log_decay.reshape(batch, length // CHUNK, CHUNK, heads).swapaxes(2, 3)
    coarse = jax.lax.stop_gradient(jnp.round(gates * 512) / 512)
    parts = coarse, gates - coarse
    written = [jnp.cumsum(part, axis=-1) for part in parts]
    found = [x - part for x, part in zip(written, parts, strict=True)]
    until = sum(x[..., -1:] - x for x in written)
    return jnp.stack([*written, *found, until], axis=3), jnp.exp(sum(x[..., -1:] for x in written))


def _forward(*arguments):
    *arrays, scale = arguments
    return tables(*arrays, scale), arrays


def _backward(scale, arrays, cotangents):
    q, k, a, b, log_decay = arrays
    if log_decay.shape[3] > 1:
        return jax.vjp(functools.partial(plain, scale=scale), *arrays)[1](cotangents)
    (sums, _), pullback = jax.vjp(lambda log_decay: running_sums(finite(log_decay)), log_decay)
    *of_made, of_total = cotangents
    of_inputs, of_sums = mosaic_gpu_scalar_backward.backward(q, k, a, b, sums, of_made, scale)
    return *of_inputs, *pullback((of_sums, of_total))


tables.defvjp(_forward, _backward)


def plain(q, k, a, b, log_decay, scale: float) -> Tables:
    """What the kernels compute, in plain JAX."""
    dtype, (batch, length, heads, _) = q.dtype, q.shape
    count = length // CHUNK

    def chunks(x):  # [B T H K] -> [B n, H, C, K]
        return x.astype(jnp.float32).reshape(batch * count, CHUNK, heads, -1).swapaxes(1, 2)

    def tokens_first(x):
        return x.astype(dtype).swapaxes(1, 2).reshape(batch, length, heads, -1)

    q, k, a, b, log_decay = (chunks(x) for x in (q, k, a, b, log_decay))
    decays = factors(log_decay)
    q = q * scale
    rows, columns = jnp.stack([a, q * decays.token]), jnp.stack([b, k])
    (a_b, a_k), (q_b, q_k) = scores(rows, columns, decays)
    own = jnp.sum(q[None] * columns, axis=-1)[..., None] * jnp.eye(CHUNK)[None, None, None]
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

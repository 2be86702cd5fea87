"""What an implementation of `attention` is told when it is traced, and what all of them share."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """scale, soft_cap, causal, window: as in `api.attention`.

    value_width: where values are the first so many channels of the keys (v is None then); else None.
    block_size: tokens of a query block and of a key block, where the index has a block mask; else None.
    plain: whether nothing is known but lengths: no ids, no positions and no block mask were given.
    with_logsumexp: whether the log-sum-exp is asked for; else an implementation may give None for it.
    """

    causal: bool = True
    window: int | None = None
    scale: float
    soft_cap: float | None = None
    value_width: int | None = None
    block_size: tuple[int, int] | None = None
    plain: bool = True
    with_logsumexp: bool = False

    def values(self, k: Array, v: Array | None) -> Array:
        return k[..., : self.value_width] if v is None else v


def merge(
    outputs: Float[Array, "P B T H V"], logsumexps: Float[Array, "P B T H"]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attention to all keys from attention to P disjoint parts of them (ring attention, split decoding).

        logsumexp = log sum_p exp(logsumexp_p)        o = sum_p exp(logsumexp_p - logsumexp) o_p

    in float32 at least; outputs keep their dtype. A part in which a query saw nothing has logsumexp -inf, and a query
    that saw nothing anywhere gives 0 and -inf.
    """
    peak = logsumexps.max(axis=0)
    seen = peak > -jnp.inf
    weights = jnp.exp(logsumexps - jnp.where(seen, peak, 0)[None])
    total = weights.sum(axis=0)
    weights = weights / jnp.where(seen, total, 1)[None]
    o = (weights[..., None] * outputs.astype(weights.dtype)).sum(axis=0).astype(outputs.dtype)
    return o, jnp.where(seen, peak + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)


def log_sum(scores: Float[Array, "..."], seen: Bool[Array, "..."], axis: int) -> Float[Array, "..."]:
    """log of the sum of exp(scores) over what is seen along an axis; -inf, without a gradient, where nothing is."""
    any_seen = seen.any(axis=axis, keepdims=True)
    masked = jnp.where(seen | ~any_seen, scores, -jnp.inf)  # where nothing is seen: anything finite, for the gradient
    return jnp.where(any_seen.squeeze(axis), jax.nn.logsumexp(masked, axis=axis), -jnp.inf)

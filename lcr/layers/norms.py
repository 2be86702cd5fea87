"""Root-mean-square normalisation (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.typing import Array, Float


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * scale over the last axis; computed in float32, returned in x's dtype.

    use_scale: without it, y has no scale.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, use_scale: bool = True):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), group="no_decay") if use_scale else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
        y = exact * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.scale is not None:
            y = y * self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return y.astype(x.dtype)

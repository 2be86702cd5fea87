"""Normalisation over the channels: by root mean square (arXiv 1910.07467), or LayerNorm (arXiv 1607.06450)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.typing import Array, Float


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * (offset + scale) over the last axis; computed in float32, returned in x's
    dtype.

    use_scale: without it, y has no scale. offset: 0, or 1 as Gemma has it (arXiv 2403.08295): what is learned (and
    initially 0) is then by how much the scale differs from 1.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, use_scale: bool = True, offset: float = 0.0):
        initial = jnp.full((width,), 1.0 - offset, jnp.float32)
        self.scale = nnx.Param(initial, group="no_decay") if use_scale else None
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
        y = exact * jax.lax.rsqrt(mean_square + self.epsilon)
        if self.scale is not None:
            scale = self.scale[...] + self.offset if self.offset else self.scale[...]
            y = y * scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias over the last axis; computed in float32, returned in
    x's dtype. use_bias: without it, y has no bias."""

    def __init__(self, width: int, *, epsilon: float = 1e-5, use_bias: bool = True):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), group="no_decay")
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32), group="no_decay") if use_bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        row = (1,) * (x.ndim - 1) + (-1,)
        exact = x.astype(jnp.float32)
        exact = exact - jnp.mean(exact, axis=-1, keepdims=True)
        y = exact * jax.lax.rsqrt(jnp.mean(jnp.square(exact), axis=-1, keepdims=True) + self.epsilon)
        y = y * self.scale[...].reshape(row)
        if self.bias is not None:
            y = y + self.bias[...].reshape(row)
        return y.astype(x.dtype)


NORMS = {
    "rms": RMSNorm,
    "rms_offset": functools.partial(RMSNorm, offset=1.0),
    "layer": LayerNorm,
    "layer_without_bias": functools.partial(LayerNorm, use_bias=False),
}

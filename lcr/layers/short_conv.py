"""Causal depthwise convolution over the last few tokens, with its state and document boundaries."""

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.layers.segments import Segments
from lcr.typing import Activations, Array, Float


class ShortConv(nnx.Module):
    """y_t[d] = bias[d] + sum_{j < width} weight[j, d] x_{t-j}[d], over real tokens of t's own document.

    The state is the last `width - 1` real inputs, [B, width - 1, D], in the compute dtype. Which of them belong
    to the document in hand follows from its `position`, so nothing is zeroed at a boundary; padding is skipped:
    it neither contributes nor counts as a step. Initialised as a uniform in +-width^-0.5 (the default of the
    framework that Mamba was written in). use_bias: without it, y has no bias term.
    """

    def __init__(self, d_model: int, width: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs):
        bound = width**-0.5

        def initial(shape):
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)

        self.weight = nnx.Param(initial((width, d_model)))
        self.bias = nnx.Param(initial((d_model,))) if use_bias else None
        self.width = width
        self.dtype = dtype

    def init_state(self, batch: int, dtype) -> Float[Array, "B J D"]:
        return jnp.zeros((batch, self.width - 1, self.weight.shape[1]), dtype)

    def __call__(
        self, x: Activations, state: Float[Array, "B J D"], segments: Segments
    ) -> tuple[Activations, Float[Array, "B J D"]]:
        length, taps = x.shape[1], self.width
        positions = segments.positions
        x = x.astype(self.dtype)
        if segments.ids is not None:
            # Real tokens first, in order, so that "the token before" is the row before; undone at the end.
            valid = segments.ids != 0
            order = jnp.argsort(~valid, axis=1, stable=True)
            count = valid.sum(axis=1, dtype=jnp.int32)
            x = jnp.take_along_axis(x, order[..., None], axis=1)
            positions = jnp.take_along_axis(positions, order, axis=1)
        history = jnp.concatenate([state.astype(self.dtype), x], axis=1)
        weight = self.weight[...].astype(self.dtype)
        y = jnp.zeros_like(x)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)[None, None]
        for j in range(taps):
            tap = history[:, taps - 1 - j : taps - 1 - j + length]
            inside = (positions >= j)[..., None]  # token t - j is of the same document
            y = y + weight[j][None, None] * jnp.where(inside, tap, 0)
        if segments.ids is None:
            return y, history[:, length:].astype(state.dtype)
        rank = jnp.argsort(order, axis=1)
        y = jnp.where(valid[..., None], jnp.take_along_axis(y, rank[..., None], axis=1), 0)
        last = count[:, None] + jnp.arange(taps - 1, dtype=jnp.int32)[None]
        return y, jnp.take_along_axis(history, last[..., None], axis=1).astype(state.dtype)

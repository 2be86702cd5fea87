"""The gated feed-forward: SwiGLU and its relatives (arXiv 2002.05202, equations 5 and 6)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.typing import Activations

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "mish": jax.nn.mish,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
}


def default_d_ff(d_model: int) -> int:
    """8/3 of the width (as many parameters as a two-matrix MLP of 4 d_model), rounded up to a multiple of 16."""
    return -(-8 * d_model // 48) * 16


class SwiGLU(nnx.Module):
    """out = (activation(x W_gate) * (x W_up)) W_down: SwiGLU where the activation is silu, GeGLU where it is gelu.

    use_bias: each of the three products has a bias added.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, activation: str = "silu", use_bias: bool = False, dtype, rngs: nnx.Rngs
    ):
        self.gate_up = nnx.Linear(d_model, 2 * d_ff, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(d_ff, d_model, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Activations) -> Activations:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.activation](gate) * up)

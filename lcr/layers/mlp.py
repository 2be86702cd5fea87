"""The SwiGLU feed-forward (arXiv 2002.05202, equation 6)."""

import jax.numpy as jnp
from flax import nnx

from lcr.typing import Activations


def default_d_ff(d_model: int) -> int:
    """8/3 of the width (as many parameters as a two-matrix MLP of 4 d_model), rounded up to a multiple of 16."""
    return -(-8 * d_model // 48) * 16


class SwiGLU(nnx.Module):
    """out = (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(self, d_model: int, d_ff: int, *, dtype, rngs: nnx.Rngs):
        self.gate_up = nnx.Linear(d_model, 2 * d_ff, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(d_ff, d_model, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Activations) -> Activations:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(nnx.silu(gate) * up)

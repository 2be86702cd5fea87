"""What DeltaNet and Gated DeltaNet share: from activations to heads and back (arXiv 2406.06484, section 3.3)."""

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.layers.norms import RMSNorm
from lcr.layers.segments import Segments
from lcr.layers.short_conv import ShortConv
from lcr.typing import Activations, Array, Float


def unit_length(x: Float[Array, "*batch K"], epsilon: float = 1e-6) -> Float[Array, "*batch K"]:
    """x / sqrt(sum(x^2) + epsilon) over the last axis; computed in float32, returned in x's dtype."""
    exact = x.astype(jnp.float32)
    return (exact * jax.lax.rsqrt(jnp.sum(jnp.square(exact), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def linear(inputs: int, outputs: int, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, precision=jax.lax.Precision.HIGHEST, rngs=rngs)


class DeltaHeads(nnx.Module):
    """q, k, v = silu(conv(x W)) by head, q and k of unit length. The state is the convolution's: its last inputs,
    `[B, conv_width - 1, 2 H K + H V]`."""

    def __init__(self, d_model: int, sizes: tuple[int, int, int], conv_width: int, *, dtype, rngs: nnx.Rngs):
        """sizes: H, K and V."""
        self.num_heads, self.key_width, self.value_width = heads, keys, values = sizes
        self.proj = linear(d_model, heads * (2 * keys + values), dtype, rngs)
        self.conv = ShortConv(heads * (2 * keys + values), conv_width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Activations, state: Float[Array, "B J inner"], segments: Segments
    ) -> tuple[
        tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H V"]], Float[Array, "B J inner"]
    ]:
        """`((q, k, v), new state)`."""
        x, state = self.conv(self.proj(x), state, segments)
        keys = self.num_heads * self.key_width
        q, k, v = (
            y.reshape(*y.shape[:2], self.num_heads, -1) for y in jnp.split(nnx.silu(x), [keys, 2 * keys], axis=-1)
        )
        return (unit_length(q), unit_length(k), v), state


class HeadsOut(nnx.Module):
    """y = (norm_h(o) silu(x W_g)) W_o, the norm a root-mean-square norm of each head; without the gate if so asked."""

    def __init__(self, d_model: int, sizes: tuple[int, int, int], *, gate: bool, epsilon: float, dtype, rngs: nnx.Rngs):
        """sizes: H, K and V."""
        heads, _, values = sizes
        self.gate_proj = linear(d_model, heads * values, dtype, rngs) if gate else None
        self.norm = RMSNorm(values, epsilon=epsilon)
        self.proj = linear(heads * values, d_model, dtype, rngs)

    def __call__(self, o: Float[Array, "B T H V"], x: Activations) -> Activations:
        y = self.norm(o).reshape(*o.shape[:2], -1)
        if self.gate_proj is not None:
            y = y * nnx.silu(self.gate_proj(x))
        return self.proj(y)


def learning_rates(x: Activations, kernel: Float[Array, "D H"], largest: float) -> Float[Array, "B T H"]:
    """beta = largest sigmoid(x W), float32."""
    return largest * jax.nn.sigmoid(jnp.einsum("btd,dh->bth", x.astype(jnp.float32), kernel, precision="highest"))


def gate_kernel(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Param:
    """The kernel of a projection to one number a head, which is not decayed and computed with in float32."""
    initial = nnx.initializers.lecun_normal()(rngs.params(), (inputs, outputs), jnp.float32)
    return nnx.Param(initial, group="no_decay")

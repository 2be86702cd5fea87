"""DeltaNet: linear attention that corrects what its state says of a key, by the delta rule (arXiv 2406.06484)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule

from lcr.checks import check_call, check_compute, check_flags, check_positive, check_whole
from lcr.layers.delta_heads import DeltaHeads, HeadsOut, gate_kernel, learning_rates
from lcr.layers.heads import default_num_heads, head_width
from lcr.layers.segments import forget, read_segments
from lcr.typing import Activations, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """Options of `DeltaNet`.

    num_heads: H. None: as many heads of width 64 as fit; if that makes fewer than four, of width 32, then 16.
    key_factor, value_factor: width of all keys and of all values together, as multiples of d_model.
    conv_width: taps of the short convolutions.
    gate: multiply the normed heads by silu(x W_g) (not in the paper; in the authors' code an option).
    negative_eigenvalues: beta up to 2 instead of 1, so that a step can also turn a key's entry over (arXiv 2411.12537).
    norm_eps: of the root-mean-square norm of each head.
    dtype: of the compute; parameters are float32. implementation: of `delta_rule`.
    """

    num_heads: int | None = None
    key_factor: float = 1.0
    value_factor: float = 1.0
    conv_width: int = 4
    gate: bool = False
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)
        check_positive(key_factor=self.key_factor, value_factor=self.value_factor, norm_eps=self.norm_eps)
        check_whole(conv_width=self.conv_width)
        check_flags(gate=self.gate, negative_eigenvalues=self.negative_eigenvalues)
        if self.num_heads is not None:
            check_whole(num_heads=self.num_heads)

    def head_sizes(self, d_model: int) -> tuple[int, int, int]:
        """H, K and V for a model of this width. Raises: ValueError where the heads do not divide."""
        heads = self.num_heads or default_num_heads(d_model)
        keys = head_width("key_factor", self.key_factor, d_model, heads)
        return heads, keys, head_width("value_factor", self.value_factor, d_model, heads)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "DeltaNet":
        return DeltaNet(self, d_model, rngs=rngs)


@struct.dataclass
class DeltaNetState:
    """memory: S; conv: the last conv_width - 1 inputs of the convolutions of q, k and v; and the two counters.

    Bytes per sequence: 4 H K V + H (2 K + V) (conv_width - 1) itemsize + 8.
    """

    memory: Leaf  # float32[B, H, K, V]
    conv: Leaf  # [B, conv_width - 1, H (2 K + V)]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class DeltaNet(nnx.Module):
    """q, k, v = silu(conv(x W)), q and k of unit length; beta = sigmoid(x W_b), one for each head;

        S_t = S_{t-1} + beta_t k_t (v_t - k_t S_{t-1})^T        o_t = K^-0.5 q_t S_t        y = norm_h(o) W_o

    (equation 2 and section 3.3): what the state says of a key moves towards the value by beta. For the op this is
    a = k, b = -beta k, v -> beta v.
    """

    def __init__(self, config: DeltaNetConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.sizes = config.head_sizes(d_model)
        self.heads = DeltaHeads(d_model, self.sizes, config.conv_width, dtype=config.dtype, rngs=rngs)
        self.beta = gate_kernel(d_model, self.sizes[0], rngs)
        self.out = HeadsOut(
            d_model, self.sizes, gate=config.gate, epsilon=config.norm_eps, dtype=config.dtype, rngs=rngs
        )

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> DeltaNetState:
        """An empty state; `capacity` is ignored (constant size). dtype: of the convolutions' inputs."""
        zero = jnp.zeros((batch,), jnp.int32)
        return DeltaNetState(
            memory=jnp.zeros((batch, *self.sizes), jnp.float32),
            conv=self.heads.conv.init_state(batch, dtype or self.config.dtype),
            segment_id=zero,
            position=zero,
        )

    def __call__(
        self, x: Activations, state: DeltaNetState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, DeltaNetState]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)
        (q, k, v), conv = self.heads(x, state.conv, segments)
        beta = learning_rates(x, self.beta[...], 2.0 if self.config.negative_eigenvalues else 1.0)
        beta = beta.astype(v.dtype)[..., None]
        o, memory = delta_rule(
            q,
            k,
            beta * v,
            k,
            -beta * k,
            initial_state=forget(state.memory, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        return self.out(o, x), DeltaNetState(
            memory=memory, conv=conv, segment_id=segments.segment_id, position=segments.position
        )

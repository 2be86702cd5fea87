"""Gated linear attention: a data-dependent decay for each key channel (arXiv 2312.06635)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.linear_attention.api import IMPLEMENTATIONS, linear_attention

from lcr.checks import check_call, check_compute, check_flags, check_positive, check_whole, is_number
from lcr.layers.heads import default_num_heads, head_width
from lcr.layers.norms import RMSNorm
from lcr.layers.segments import forget, read_segments
from lcr.typing import Activations, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAConfig:
    """Options of `GLA`.

    num_heads: H. None: as many heads with values of width 64 as fit; if that makes fewer than four, 32, then 16.
    key_factor, value_factor: width of all keys and of all values together, as multiples of d_model.
    gate_rank: rank of the decays' projection.
    gate_normalizer: tau, what the log of the sigmoid is divided by: a sigmoid of 1/2 decays by 2^(-1 / tau) a token.
    least_log_decay: the logarithm that no token's decay falls below (flash-linear-attention's clamp_min); None: none.
    gate: whether the output is gated by swish(x W_g). norm_eps: of the root-mean-square norm of each head. norm_scale:
        whether that norm has a learned scale.
    dtype: of the compute; parameters are float32. implementation: of `linear_attention`.
    """

    num_heads: int | None = None
    key_factor: float = 0.5
    value_factor: float = 1.0
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    least_log_decay: float | None = None
    gate: bool = True
    norm_eps: float = 1e-5
    norm_scale: bool = True
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)
        for name in ("key_factor", "value_factor", "gate_normalizer", "norm_eps"):
            check_positive(**{name: getattr(self, name)})
        check_whole(gate_rank=self.gate_rank)
        check_flags(gate=self.gate, norm_scale=self.norm_scale)
        if self.least_log_decay is not None and not (is_number(self.least_log_decay) and self.least_log_decay < 0):
            raise ValueError(f"least_log_decay={self.least_log_decay!r}: expected None, or a number below 0")
        if self.num_heads is not None:
            check_whole(num_heads=self.num_heads)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "GLA":
        return GLA(self, d_model, rngs=rngs)


@struct.dataclass
class GLAState:
    """memory: S, the decayed sum of k v^T; and the two counters.

    Bytes per sequence: 4 H K V + 8 = 4 key_factor value_factor d_model^2 / H + 8.
    """

    memory: Leaf  # float32[B, H, K, V]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class GLA(nnx.Module):
    """q, k, v = x W_q, x W_k, x W_v; alpha_t = sigmoid(x W_1 W_2 + b)^(1 / tau), one for each key channel;

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T        o_t = K^-0.5 q_t S_t
        y = (swish(x W_g) * norm_h(o)) W_o

    (section 4.4), with a root-mean-square norm for each head h, whose scale the heads share.
    """

    def __init__(self, config: GLAConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.num_heads = heads = config.num_heads or default_num_heads(d_model)
        self.key_width = head_width("key_factor", config.key_factor, d_model, heads)
        self.value_width = head_width("value_factor", config.value_factor, d_model, heads)
        keys, values = heads * self.key_width, heads * self.value_width

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, rngs=rngs)

        def gate(*shape):
            initial = nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32)
            return nnx.Param(initial, group="no_decay")

        self.q_proj = linear(d_model, keys)
        self.k_proj = linear(d_model, keys)
        self.v_proj = linear(d_model, values)
        self.gate_proj = linear(d_model, values) if config.gate else None
        self.decay_down = gate(d_model, config.gate_rank)
        self.decay_up = gate(config.gate_rank, keys)
        self.decay_bias = nnx.Param(jnp.zeros((keys,), jnp.float32), group="no_decay")
        self.norm = RMSNorm(self.value_width, epsilon=config.norm_eps, use_scale=config.norm_scale)
        self.out_proj = linear(values, d_model)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> GLAState:
        """An empty state; `capacity` and `dtype` are ignored (constant size, float32)."""
        zero = jnp.zeros((batch,), jnp.int32)
        shape = (batch, self.num_heads, self.key_width, self.value_width)
        return GLAState(memory=jnp.zeros(shape, jnp.float32), segment_id=zero, position=zero)

    def __call__(
        self, x: Activations, state: GLAState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, GLAState]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)

        def heads(projected):
            return projected.reshape(batch, length, self.num_heads, -1)

        # Decays in float32: those near 1 decide how far the memory reaches.
        decay = jnp.einsum("btd,dr->btr", x.astype(jnp.float32), self.decay_down[...], precision="highest")
        decay = jnp.einsum("btr,rk->btk", decay, self.decay_up[...], precision="highest")
        decay = jax.nn.log_sigmoid(decay + self.decay_bias[...][None, None]) / self.config.gate_normalizer
        if self.config.least_log_decay is not None:
            decay = jnp.maximum(decay, self.config.least_log_decay)
        o, memory = linear_attention(
            heads(self.q_proj(x)),
            heads(self.k_proj(x)),
            heads(self.v_proj(x)),
            heads(decay),
            initial_state=forget(state.memory, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        y = self.norm(o)
        if self.gate_proj is not None:
            y = y * nnx.silu(heads(self.gate_proj(x)))
        y = self.out_proj(y.reshape(batch, length, -1))
        return y, GLAState(memory=memory, segment_id=segments.segment_id, position=segments.position)

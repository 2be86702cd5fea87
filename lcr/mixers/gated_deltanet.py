"""Gated DeltaNet: the delta rule with a decay for each head, as in Mamba-2 (arXiv 2412.06464)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule

from lcr.checks import check_call, check_compute, check_flags, check_positive, check_whole
from lcr.layers.delta_heads import DeltaHeads, HeadsOut, gate_kernel, learning_rates
from lcr.layers.heads import default_num_heads
from lcr.layers.segments import forget, read_segments
from lcr.layers.step_sizes import check_step_sizes, decay_rates, initial_dt_bias
from lcr.typing import Activations, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig:
    """Options of `GatedDeltaNet`.

    num_heads, head_dim: H and K; one of them gives the other as d_model / it, both together need not multiply to
        d_model. By default as many heads of width 64 as fit; if that makes fewer than four, of width 32, then 16.
    expand_v: V as a multiple of K.
    conv_width: taps of the short convolutions.
    gate: multiply the normed heads by silu(x W_g).
    negative_eigenvalues: beta up to 2 instead of 1, so that a step can also turn a key's entry over (arXiv 2411.12537).
    dt_min, dt_max: the initial steps softplus(dt_bias) are log-uniform in [dt_min, dt_max]. decay_max: the initial
        rates exp(A_log) are uniform in (0, decay_max]; a step decays by exp(-rate softplus(x W_dt + dt_bias)).
    norm_eps: of the root-mean-square norm of each head.
    dtype: of the compute; parameters are float32. implementation: of `delta_rule`.
    """

    num_heads: int | None = None
    head_dim: int | None = None
    expand_v: float = 2.0
    conv_width: int = 4
    gate: bool = True
    negative_eigenvalues: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    decay_max: float = 16.0
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)
        check_step_sizes(self.dt_min, self.dt_max)
        check_flags(gate=self.gate, negative_eigenvalues=self.negative_eigenvalues)
        for name in ("expand_v", "decay_max", "norm_eps"):
            check_positive(**{name: getattr(self, name)})
        check_whole(conv_width=self.conv_width)
        for name in ("num_heads", "head_dim"):
            if getattr(self, name) is not None:
                check_whole(**{name: getattr(self, name)})

    def head_sizes(self, d_model: int) -> tuple[int, int, int]:
        """H, K and V for a model of this width. Raises: ValueError where the heads do not divide."""
        heads, width = self.num_heads, self.head_dim
        if heads is None:
            heads = default_num_heads(d_model) if width is None else _divide(d_model, "head_dim", width)
        width = width or _divide(d_model, "num_heads", heads)
        values = self.expand_v * width
        if values != int(values) or values < 1:
            raise ValueError(
                f"expand_v={self.expand_v} with heads of width {width}: expected values of a whole width, not "
                f"{values:g}; choose a multiple of 1 / {width}"
            )
        return heads, width, int(values)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "GatedDeltaNet":
        return GatedDeltaNet(self, d_model, rngs=rngs)


def _divide(d_model, name, part):
    if d_model % part:
        raise ValueError(
            f"{name}={part} does not divide d_model={d_model}: expected a divisor, or both num_heads and head_dim"
        )
    return d_model // part


@struct.dataclass
class GatedDeltaNetState:
    """memory: S; conv: the last conv_width - 1 inputs of the convolutions of q, k and v; and the two counters.

    Bytes per sequence: 4 H K V + H (2 K + V) (conv_width - 1) itemsize + 8.
    """

    memory: Leaf  # float32[B, H, K, V]
    conv: Leaf  # [B, conv_width - 1, H (2 K + V)]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class GatedDeltaNet(nnx.Module):
    """q, k, v = silu(conv(x W)), q and k of unit length; for each head beta = sigmoid(x W_b) and
    alpha = exp(-exp(A_log) softplus(x W_dt + dt_bias));

        S_t = (I - beta_t k_t k_t^T) alpha_t S_{t-1} + beta_t k_t v_t^T        o_t = K^-0.5 q_t S_t
        y = (norm_h(o) silu(x W_g)) W_o

    (equation 10 and section 3.4). For the op this is a = alpha k, b = -beta k, v -> beta v.
    """

    def __init__(self, config: GatedDeltaNetConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.sizes = config.head_sizes(d_model)
        num_heads = self.sizes[0]
        self.heads = DeltaHeads(d_model, self.sizes, config.conv_width, dtype=config.dtype, rngs=rngs)
        self.beta = gate_kernel(d_model, num_heads, rngs)
        self.dt_kernel = gate_kernel(d_model, num_heads, rngs)
        self.dt_bias = initial_dt_bias(num_heads, config.dt_min, config.dt_max, rngs=rngs)
        rate = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1e-3 * config.decay_max, config.decay_max)
        self.A_log = nnx.Param(jnp.log(rate), group="no_decay")
        self.out = HeadsOut(
            d_model, self.sizes, gate=config.gate, epsilon=config.norm_eps, dtype=config.dtype, rngs=rngs
        )

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> GatedDeltaNetState:
        """An empty state; `capacity` is ignored (constant size). dtype: of the convolutions' inputs."""
        zero = jnp.zeros((batch,), jnp.int32)
        return GatedDeltaNetState(
            memory=jnp.zeros((batch, *self.sizes), jnp.float32),
            conv=self.heads.conv.init_state(batch, dtype or self.config.dtype),
            segment_id=zero,
            position=zero,
        )

    def __call__(
        self, x: Activations, state: GatedDeltaNetState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, GatedDeltaNetState]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)
        (q, k, v), conv = self.heads(x, state.conv, segments)
        beta = learning_rates(x, self.beta[...], 2.0 if self.config.negative_eigenvalues else 1.0)
        beta = beta.astype(v.dtype)[..., None]
        log_decay = self._log_decay(x)
        o, memory = delta_rule(
            q,
            k,
            beta * v,
            k * jnp.exp(log_decay).astype(k.dtype)[..., None],
            -beta * k,
            log_decay,
            initial_state=forget(state.memory, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        return self.out(o, x), GatedDeltaNetState(
            memory=memory, conv=conv, segment_id=segments.segment_id, position=segments.position
        )

    def _log_decay(self, x):
        """log alpha `[B, T, H]`, float32: decays near 1 decide how far the memory reaches."""
        dt = jnp.einsum("btd,dh->bth", x.astype(jnp.float32), self.dt_kernel[...], precision="highest")
        return -decay_rates(self.A_log[...])[None, None] * jax.nn.softplus(dt + self.dt_bias[...][None, None])

"""RetNet: multi-scale retention (arXiv 2307.08621)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from pallas_kernels.linear_attention.api import IMPLEMENTATIONS, linear_attention

from lcr.checks import check_call, check_compute, check_flags, check_positive, check_whole
from lcr.layers.heads import default_num_heads
from lcr.layers.norms import RMSNorm
from lcr.layers.rope import rotate
from lcr.layers.segments import forget, read_segments
from lcr.typing import Activations, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNetConfig:
    """Options of `RetNet`.

    num_heads: H, each with keys of width d_model / H (even). None: as many heads of width 64 as fit; if that makes
        fewer than four, of width 32, then 16.
    value_factor: width of all values together, as a multiple of d_model.
    decay_exponents: e_h of the decay 1 - 2^-e_h of each head; None: 5, 6, 7, ... as in the paper. A head remembers
        about 2^e_h tokens, so with four heads the longest memory is 2^8 tokens.
    rotation_base: the slowest channel pair turns by 1 / rotation_base radians per token, the fastest by 1.
    gate: whether the output is gated. norm_eps: of the root-mean-square norm of each head. norm_scale: whether that
        norm has a learned scale, which the heads share (as in flash-linear-attention; not in the paper's own code).
    dtype: of the compute; parameters are float32. implementation: of `linear_attention`.
    """

    num_heads: int | None = None
    value_factor: float = 2
    decay_exponents: Sequence[float] | None = None
    rotation_base: float = 10_000.0
    gate: bool = True
    norm_eps: float = 1e-6
    norm_scale: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_positive(value_factor=self.value_factor, rotation_base=self.rotation_base, norm_eps=self.norm_eps)
        if self.num_heads is not None:
            check_whole(num_heads=self.num_heads)
        if self.decay_exponents is not None:
            if not isinstance(self.decay_exponents, Sequence):
                raise ValueError(f"decay_exponents={self.decay_exponents!r}: expected a tuple, a number a head")
            for exponent in self.decay_exponents:
                check_positive(decay_exponents=exponent)
            # hashable, as a part of a jitted module is
            object.__setattr__(self, "decay_exponents", tuple(self.decay_exponents))
        check_flags(gate=self.gate, norm_scale=self.norm_scale)
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "RetNet":
        return RetNet(self, d_model, rngs=rngs)


@struct.dataclass
class RetentionState:
    """retention: S, the decayed sum of k v^T, with k rotated by its absolute position; and the two counters.

    Bytes per sequence: 4 H K V + 8 = 4 value_factor d_model^2 / H + 8.
    """

    retention: Leaf  # float32[B, H, K, V]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class RetNet(nnx.Module):
    """q, k, v = x W_q, x W_k, x W_v; q and k turned by their positions; for each head h with decay gamma_h

        S_t = gamma_h S_{t-1} + k_t v_t^T        o_t = K^-0.5 q_t S_t        gamma_h = 1 - 2^-(5 + h)
        y = (swish(x W_g) * norm_h(o)) W_o

    (equations 5 to 9). The norm of each head, a group norm in the paper, divides by the root mean square and has no
    scale of its own, as in the authors' code (torchscale). That code also divides o_t by sqrt(sum_{j<=t}
    gamma^(t-j)) and, in its parallel form, by the sum of the row's scores where above 1: such factors, one for each
    row and head, drop out in the norm (up to norm_eps), and this module leaves them out. Its three forms are those
    of `linear_attention`: the parallel form is one chunk, the chunkwise form many, the recurrent form single tokens.
    """

    def __init__(self, config: RetNetConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.num_heads, self.key_width, self.value_width = _sizes(config, d_model)
        values = self.num_heads * self.value_width

        def linear(inputs, outputs, gain):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=config.dtype,
                precision=jax.lax.Precision.HIGHEST,
                kernel_init=nnx.initializers.variance_scaling(gain**2, "fan_avg", "uniform"),
                rngs=rngs,
            )

        self.q_proj = linear(d_model, d_model, 2**-2.5)
        self.k_proj = linear(d_model, d_model, 2**-2.5)
        self.v_proj = linear(d_model, values, 2**-2.5)
        self.gate_proj = linear(d_model, values, 2**-2.5) if config.gate else None
        self.norm = RMSNorm(self.value_width, epsilon=config.norm_eps, use_scale=config.norm_scale)
        self.out_proj = linear(values, d_model, 2**-1)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> RetentionState:
        """An empty state; `capacity` and `dtype` are ignored (constant size, float32)."""
        zero = jnp.zeros((batch,), jnp.int32)
        shape = (batch, self.num_heads, self.key_width, self.value_width)
        return RetentionState(retention=jnp.zeros(shape, jnp.float32), segment_id=zero, position=zero)

    def __call__(
        self, x: Activations, state: RetentionState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, RetentionState]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)

        def heads(projection):
            return projection(x).reshape(batch, length, self.num_heads, -1)

        frequencies = retention_frequencies(self.key_width, self.config.rotation_base)
        o, retention = linear_attention(
            rotate(heads(self.q_proj), segments.positions, frequencies, interleaved=True),
            rotate(heads(self.k_proj), segments.positions, frequencies, interleaved=True),
            heads(self.v_proj),
            jnp.asarray(log_decays(self.num_heads, self.config.decay_exponents), jnp.float32),
            initial_state=forget(state.retention, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        y = self.norm(o)
        if self.gate_proj is not None:
            y = y * nnx.silu(heads(self.gate_proj))
        y = self.out_proj(y.reshape(batch, length, -1))
        return y, RetentionState(retention=retention, segment_id=segments.segment_id, position=segments.position)


def log_decays(num_heads: int, exponents: tuple[float, ...] | None = None) -> np.ndarray:
    """log(1 - 2^-e) for each head, float64; e = 5, 6, 7, ... if `exponents` is None."""
    e = np.arange(5.0, 5.0 + num_heads) if exponents is None else np.asarray(exponents, np.float64)
    return np.log1p(-(2.0**-e))


def retention_frequencies(width: int, base: float = 10_000.0) -> np.ndarray:
    """RetNet's rotation, radians per token: from 1 to 1 / base, both included (RoPE stops one step short)."""
    return np.float64(base) ** -np.linspace(0.0, 1.0, width // 2)


def _sizes(config, d_model):
    """H, K and V; raises ValueError where they do not divide."""
    num_heads = config.num_heads or default_num_heads(d_model)
    if d_model % num_heads or d_model // num_heads % 2:
        fits = [h for h in range(1, d_model // 2 + 1) if d_model % (2 * h) == 0]
        raise ValueError(
            f"num_heads={num_heads} with d_model={d_model}: expected heads of an even width d_model / num_heads. "
            f"For this width num_heads can be {', '.join(map(str, fits)) or 'nothing: make d_model even'}."
        )
    values = config.value_factor * d_model
    if values % num_heads:
        raise ValueError(
            f"value_factor={config.value_factor} with d_model={d_model}: the values' width {values} does not divide "
            f"by num_heads={num_heads}. Choose a value_factor that is a multiple of {num_heads} / {d_model}."
        )
    if config.decay_exponents is not None and len(config.decay_exponents) != num_heads:
        raise ValueError(
            f"decay_exponents={config.decay_exponents}: expected one for each of num_heads={num_heads} heads"
        )
    return num_heads, d_model // num_heads, int(values) // num_heads

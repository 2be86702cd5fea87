"""Mamba-2: a state-space model with one decay a head, computed as linear attention (arXiv 2405.21060)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.linear_attention.api import IMPLEMENTATIONS, linear_attention

from lcr.checks import check_call, check_choice, check_compute, check_flags, check_positive, check_whole
from lcr.layers.mlp import ACTIVATIONS
from lcr.layers.segments import forget, read_segments
from lcr.layers.short_conv import ShortConv
from lcr.layers.step_sizes import check_step_sizes, decay_rates, initial_dt_bias
from lcr.typing import Activations, Array, Float, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Options of `Mamba2`.

    state_size: N. expand: inner width as a multiple of d_model. conv_width: taps of the short convolution.
    head_width: P; None: the widest of 64, 32 and 16 that gives at least four heads, else 16.
    num_groups: G; the heads of a group share B and C. Divides the number of heads.
    dt_min, dt_max, dt_floor: the initial step sizes are log-uniform in [dt_min, dt_max], not below dt_floor.
    dt_limit: the step sizes are held within these two.
    decay_range: the initial -A of the heads are uniform in these two.
    norm_before_gate: whether the norm comes before the gate is multiplied in; the paper's comes after.
    norm_eps: of that norm, which is over the channels of a group, as in the authors' code.
    proj_bias, conv_bias: whether the projections in and out, and the convolution, have a bias added.
    activation: of the convolved channels, a name of `lcr.layers.mlp.ACTIVATIONS`.
    dtype: of the compute; parameters are float32. implementation: of `linear_attention`.
    """

    state_size: int = 64
    expand: int = 2
    conv_width: int = 4
    head_width: int | None = None
    num_groups: int = 1
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dt_limit: Sequence[float] = (0.0, math.inf)
    decay_range: Sequence[float] = (1.0, 16.0)
    norm_before_gate: bool = False
    norm_eps: float = 1e-5
    proj_bias: bool = False
    conv_bias: bool = True
    activation: str = "silu"
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)
        for name in ("state_size", "expand", "conv_width", "num_groups"):
            check_whole(**{name: getattr(self, name)})
        if self.head_width is not None:
            check_whole(head_width=self.head_width)
        check_step_sizes(self.dt_min, self.dt_max, self.dt_floor)
        check_positive(norm_eps=self.norm_eps)
        for name in ("norm_before_gate", "proj_bias", "conv_bias"):
            check_flags(**{name: getattr(self, name)})
        check_choice("activation", self.activation, ACTIVATIONS)
        for name, good, expected in (
            ("dt_limit", lambda low, high: 0 <= low < high, "0 <= low < high"),
            ("decay_range", lambda low, high: 0 < low <= high < math.inf, "0 < low <= high, both finite"),
        ):
            value = getattr(self, name)
            pair = isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
            if not pair or not good(*value):
                raise ValueError(f"{name}={value!r}: expected two numbers (low, high) with {expected}")
            object.__setattr__(self, name, tuple(value))  # hashable, as a part of a jitted module is

    def width_of_heads(self, d_model: int) -> int:
        """P for a model of this width. Raises: ValueError where it does not divide the inner width."""
        inner = self.expand * d_model
        if self.head_width is None:
            return next((width for width in (64, 32) if inner % width == 0 and inner // width >= 4), 16)
        if inner % self.head_width:
            raise ValueError(
                f"head_width={self.head_width} with an inner width of {inner} (expand d_model): expected a divisor of "
                "that"
            )
        return self.head_width

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "Mamba2":
        return Mamba2(self, d_model, rngs=rngs)


@struct.dataclass
class Mamba2State:
    """conv: the last conv_width - 1 inputs of the convolution; ssm: S, float32; and the two counters.

    Bytes per sequence: (inner + 2 G N) (conv_width - 1) itemsize + 4 inner N + 8, with inner = expand d_model.
    """

    conv: Leaf  # [B, conv_width - 1, inner + 2 G N]
    ssm: Leaf  # float32[B, H, N, P]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class Mamba2(nnx.Module):
    """z, xBC, dt = split(x W_in); x, B, C = split(silu(conv(xBC))); dt = clip(softplus(dt + b), dt_limit);

        S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T        y_t = C_t S_t + D x_t
        out = norm(y silu(z)) W_out                         (norm_before_gate: (norm(y) silu(z)) W_out)

    with A = -exp(A_log), dt and D one number for each head, and B and C shared by the heads of a group (sections 2
    and 7; listing 1). As linear attention: q = C, k = B, v = dt x, log decay dt A.
    """

    def __init__(self, config: Mamba2Config, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.inner = inner = config.expand * d_model
        self.num_heads = heads = inner // config.width_of_heads(d_model)
        if heads % config.num_groups:
            raise ValueError(f"num_groups={config.num_groups}: expected a divisor of the number of heads, {heads}")
        self.conv_channels = inner + 2 * config.num_groups * config.state_size

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=config.proj_bias, dtype=config.dtype, rngs=rngs)

        self.in_proj = linear(d_model, inner + self.conv_channels + heads)
        options = {"use_bias": config.conv_bias, "dtype": config.dtype, "rngs": rngs}
        self.conv = ShortConv(self.conv_channels, config.conv_width, **options)
        self.dt_bias = initial_dt_bias(heads, config.dt_min, config.dt_max, floor=config.dt_floor, rngs=rngs)
        rate = jax.random.uniform(rngs.params(), (heads,), jnp.float32, *config.decay_range)
        self.A_log = nnx.Param(jnp.log(rate), group="no_decay")
        self.D = nnx.Param(jnp.ones((heads,), jnp.float32), group="no_decay")
        self.norm_scale = nnx.Param(jnp.ones((inner,), jnp.float32), group="no_decay")
        self.out_proj = linear(inner, d_model)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> Mamba2State:
        """An empty state; `capacity` is ignored (constant size). dtype: of the convolution's inputs."""
        zero = jnp.zeros((batch,), jnp.int32)
        shape = (batch, self.num_heads, self.config.state_size, self.inner // self.num_heads)
        return Mamba2State(
            conv=self.conv.init_state(batch, dtype or self.config.dtype),
            ssm=jnp.zeros(shape, jnp.float32),
            segment_id=zero,
            position=zero,
        )

    def __call__(
        self, x: Activations, state: Mamba2State | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, Mamba2State]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        config = self.config
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)

        z, channels, dt = jnp.split(self.in_proj(x), [self.inner, self.inner + self.conv_channels], axis=-1)
        channels, conv = self.conv(channels, state.conv, segments)
        group_width = config.num_groups * config.state_size
        x, B, C = jnp.split(ACTIVATIONS[config.activation](channels), [self.inner, self.inner + group_width], axis=-1)
        y, ssm = state_space(
            x.reshape(batch, length, self.num_heads, -1),
            dt,
            self.dt_bias[...],
            -decay_rates(self.A_log[...]),
            B.reshape(batch, length, config.num_groups, -1),
            C.reshape(batch, length, config.num_groups, -1),
            self.D[...],
            dt_limit=config.dt_limit,
            initial_state=forget(state.ssm, segments.continues),
            segment_ids=segments.ids,
            implementation=config.implementation,
        )
        y, gate = y.reshape(batch, length, -1), nnx.silu(z)
        y = self._norm(y) * gate if config.norm_before_gate else self._norm(y * gate)
        y = self.out_proj(y)
        if config.proj_bias and segments.ids is not None:
            y = jnp.where((segments.ids != 0)[..., None], y, 0)
        return y, Mamba2State(conv=conv, ssm=ssm, segment_id=segments.segment_id, position=segments.position)


    def _norm(self, y):
        """Divides the channels of each group by their root mean square; computed in float32."""
        groups = y.astype(jnp.float32).reshape(*y.shape[:2], self.config.num_groups, -1)
        mean_square = jnp.mean(jnp.square(groups), axis=-1, keepdims=True)
        exact = (groups * jax.lax.rsqrt(mean_square + self.config.norm_eps)).reshape(y.shape)
        return (exact * self.norm_scale[...][None, None]).astype(y.dtype)


def state_space(
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    dt_bias: Float[Array, "H"],
    A: Float[Array, "H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    D: Float[Array, "H"],
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Float[Array, "B H N P"] | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B H N P"]]:
    """The recurrence of `Mamba2`, from x, B and C after the convolution and dt as projected: y and the last S.

    Step sizes in float32 (small ones decide how far the memory reaches); y in x's dtype, S in float32.
    """
    dtype = jnp.float32 if x.dtype == jnp.bfloat16 else x.dtype
    steps = jax.nn.softplus(dt.astype(dtype) + dt_bias.astype(dtype)[None, None])
    steps = jnp.clip(steps, *dt_limit)
    v = (steps[..., None] * x.astype(dtype)).astype(x.dtype)
    y, state = linear_attention(
        C,
        B,
        v,
        steps * A.astype(dtype)[None, None],
        scale=1.0,
        initial_state=initial_state,
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return y + D.astype(x.dtype)[None, None, :, None] * x, state

"""Mamba: a selective state-space model with a short convolution (arXiv 2312.00752, section 3.4 and figure 3)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.selective_scan.api import IMPLEMENTATIONS, selective_scan

from lcr.checks import check_call, check_choice, check_compute, check_flags, check_positive, check_whole
from lcr.layers.mlp import ACTIVATIONS
from lcr.layers.norms import RMSNorm
from lcr.layers.segments import forget, read_segments
from lcr.layers.short_conv import ShortConv
from lcr.layers.step_sizes import check_step_sizes, decay_rates, initial_dt_bias
from lcr.typing import Activations, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Options of `Mamba`.

    state_size:  N, states per channel. expand: inner width as a multiple of d_model. conv_width: taps of the
    short convolution. dt_rank: rank of the step-size projection (None: ceil(d_model / 16)).
    dt_min, dt_max, dt_floor: the initial step sizes are log-uniform in [dt_min, dt_max], not below dt_floor.
    dt_scale: the step-size projection starts uniform in +-dt_scale dt_rank^-0.5. A large one makes the steps of
        different tokens differ by orders of magnitude from the start, which is what a channel needs to write some
        tokens and pass over others.
    decay_scale: the initial A is -decay_scale n, n = 1 .. N (1: as in the paper). A state decays by exp(dt A) a step
        and is written with dt B x, so a small decay_scale gives long memories that are still written to: nearly a
        linear attention, whose keys B and queries C have to keep apart what is to be kept (arXiv 2410.11135).
    inner_norm: what is done to the low-rank step sizes, B and C before they are used: "none"; "scaled", a
        root-mean-square norm of each with a learned scale, as in Jamba (arXiv 2403.19887, section 6.4); "plain", the
        same without a scale, as in Falcon-Mamba (arXiv 2410.05355, section 2.3). inner_norm_eps: of these norms.
    proj_bias, conv_bias: whether the projections in and out, and the convolution, have a bias added.
    activation: of the convolved channels, a name of `lcr.layers.mlp.ACTIVATIONS`.
    dtype: of the compute; parameters are float32. implementation: of `selective_scan`.
    """

    state_size: int = 16
    expand: int = 2
    conv_width: int = 4
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dt_scale: float = 1.0
    decay_scale: float = 1.0
    inner_norm: str = "none"
    inner_norm_eps: float = 1e-6
    proj_bias: bool = False
    conv_bias: bool = True
    activation: str = "silu"
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_whole(state_size=self.state_size, expand=self.expand, conv_width=self.conv_width)
        if self.dt_rank is not None:
            check_whole(dt_rank=self.dt_rank)
        check_step_sizes(self.dt_min, self.dt_max, self.dt_floor)
        for name in ("dt_scale", "decay_scale", "inner_norm_eps"):
            check_positive(**{name: getattr(self, name)})
        check_flags(proj_bias=self.proj_bias, conv_bias=self.conv_bias)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("inner_norm", self.inner_norm, ("none", "scaled", "plain"))
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "Mamba":
        return Mamba(self, d_model, rngs=rngs)


@struct.dataclass
class MambaState:
    """conv: the last conv_width - 1 inputs of the convolution; ssm: h, float32; and the two counters.

    Bytes per sequence: inner (conv_width - 1) itemsize + 4 inner state_size + 8, with inner = expand d_model.
    """

    conv: Leaf  # [B, conv_width - 1, inner]
    ssm: Leaf  # float32[B, inner, N]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class Mamba(nnx.Module):
    """x, z = split(x W_in); x = silu(conv(x)); dt, B, C = split(x W_x); y = scan(x, softplus(dt W_dt + b), A, B, C)
    silu(z); out = y W_out, with A = -exp(A_log) and the scan and its gate of `pallas_kernels.selective_scan`."""

    def __init__(self, config: MambaConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.inner = inner = config.expand * d_model
        self.dt_rank = config.dt_rank or math.ceil(d_model / 16)

        def linear(inputs, outputs, use_bias=False):
            return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=config.dtype, rngs=rngs)

        self.in_proj = linear(d_model, 2 * inner, config.proj_bias)
        self.conv = ShortConv(inner, config.conv_width, use_bias=config.conv_bias, dtype=config.dtype, rngs=rngs)
        self.x_proj = linear(inner, self.dt_rank + 2 * config.state_size)
        bound = config.dt_scale * self.dt_rank**-0.5
        self.dt_kernel = nnx.Param(
            jax.random.uniform(rngs.params(), (self.dt_rank, inner), jnp.float32, -bound, bound), group="no_decay"
        )
        self.dt_bias = initial_dt_bias(inner, config.dt_min, config.dt_max, floor=config.dt_floor, rngs=rngs)
        n = config.decay_scale * jnp.arange(1, config.state_size + 1, dtype=jnp.float32)
        self.A_log = nnx.Param(jnp.tile(jnp.log(n)[None], (inner, 1)), group="no_decay")
        self.D = nnx.Param(jnp.ones((inner,), jnp.float32), group="no_decay")
        self.out_proj = linear(inner, d_model, config.proj_bias)
        if config.inner_norm != "none":
            options = {"epsilon": config.inner_norm_eps, "use_scale": config.inner_norm == "scaled"}
            self.dt_norm = RMSNorm(self.dt_rank, **options)
            self.B_norm = RMSNorm(config.state_size, **options)
            self.C_norm = RMSNorm(config.state_size, **options)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> MambaState:
        """An empty state; `capacity` is ignored (constant size). dtype: of the convolution's inputs."""
        zero = jnp.zeros((batch,), jnp.int32)
        return MambaState(
            conv=self.conv.init_state(batch, dtype or self.config.dtype),
            ssm=jnp.zeros((batch, self.inner, self.config.state_size), jnp.float32),
            segment_id=zero,
            position=zero,
        )

    def __call__(
        self, x: Activations, state: MambaState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, MambaState]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)

        x, z = jnp.split(self.in_proj(x), 2, axis=-1)
        x, conv = self.conv(x, state.conv, segments)
        x = ACTIVATIONS[self.config.activation](x)
        dt, B, C = jnp.split(self.x_proj(x), [self.dt_rank, self.dt_rank + self.config.state_size], axis=-1)
        if self.config.inner_norm != "none":
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        # Step sizes in float32: small ones decide how far the memory reaches.
        dt = jnp.einsum("btr,rd->btd", dt.astype(jnp.float32), self.dt_kernel[...], precision="highest")
        y, ssm = selective_scan(
            x,
            jax.nn.softplus(dt + self.dt_bias[...][None, None]),
            -decay_rates(self.A_log[...]),
            B,
            C,
            self.D[...],
            gate=z,
            initial_state=forget(state.ssm, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        y = self.out_proj(y)
        if self.config.proj_bias and segments.ids is not None:
            y = jnp.where((segments.ids != 0)[..., None], y, 0)
        return y, MambaState(conv=conv, ssm=ssm, segment_id=segments.segment_id, position=segments.position)

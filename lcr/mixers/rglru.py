"""Griffin's recurrent block: a gate, a short convolution and the RG-LRU (arXiv 2402.19427)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.selective_scan.api import IMPLEMENTATIONS, selective_scan

from lcr.checks import check_call, check_compute, check_positive, check_whole
from lcr.layers.heads import default_num_heads
from lcr.layers.segments import forget, read_segments
from lcr.layers.short_conv import ShortConv
from lcr.typing import Activations, Array, Bool, Float, Leaf, SegmentIds

SHARPNESS = 8.0  # c of the paper
# Of -log a. A float32 a is 1 from 3e-8 on, and what the input is multiplied by is 1.4e-9 here; the square of a smaller
# one would leave float32 in the gradient of the quotient below.
SMALLEST_RATE = 1e-18


@dataclasses.dataclass(frozen=True, kw_only=True)
class RGLRUConfig:
    """Options of `RGLRU`.

    width: R, of both branches; None: d_model. num_heads: blocks of the gates' block-diagonal weights, a divisor of R;
        None: blocks of width 64 (of 32 or 16 where those would be fewer than four).
    conv_width: taps of the short convolution.
    decay_min, decay_max: a fully open recurrence gate starts with a decay, a step, uniform in between.
    dtype: of the compute; parameters are float32, and so is the recurrence with its gates. implementation: of
        `selective_scan`.
    """

    width: int | None = None
    num_heads: int | None = None
    conv_width: int = 4
    decay_min: float = 0.9
    decay_max: float = 0.999
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_whole(conv_width=self.conv_width)
        for name in ("width", "num_heads"):
            if getattr(self, name) is not None:
                check_whole(**{name: getattr(self, name)})
        check_positive(decay_min=self.decay_min, decay_max=self.decay_max)
        if not self.decay_min <= self.decay_max < 1:
            raise ValueError(
                f"decay_min={self.decay_min}, decay_max={self.decay_max}: expected decay_min <= decay_max < 1"
            )
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)

    def sizes(self, d_model: int) -> tuple[int, int]:
        """R and the number of heads. Raises: ValueError where the heads do not divide."""
        width = self.width or d_model
        heads = self.num_heads or default_num_heads(width)
        if width % heads:
            raise ValueError(f"num_heads={heads} does not divide the width {width}: expected a divisor")
        return width, heads

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "RGLRU":
        return RGLRU(self, d_model, rngs=rngs)


@struct.dataclass
class RGLRUState:
    """conv: the last conv_width - 1 inputs of the convolution; hidden: h, float32; and the two counters.

    Bytes per sequence: R (conv_width - 1) itemsize + 4 R + 8.
    """

    conv: Leaf  # [B, conv_width - 1, R]
    hidden: Leaf  # float32[B, R]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class RGLRU(nnx.Module):
    """out = (gelu(x W_gate) * h) W_out, where h is the RG-LRU of u = conv(x W_in) (section 2.3 and figure 2):

        r_t = sigmoid(W_a u_t + b_a)        i_t = sigmoid(W_x u_t + b_x)        log a_t = -8 softplus(Lambda) r_t
        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t        and h_0 = i_0 u_0 at a document's first token

    (equations 1 to 4; W_a and W_x block-diagonal; the first token as in the authors' code). Linear layers have no
    biases, where the released RecurrentGemma has them. Lambda starts as the paper says, a decay of `decay_min` to
    `decay_max` a step with the gate open; in the authors' code those are the bounds of its eighth root.
    """

    def __init__(self, config: RGLRUConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.width, heads = width, self.num_heads = config.sizes(d_model)

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, rngs=rngs)

        def gate_kernel():
            shape = (heads, width // heads, width // heads)
            kernel = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)(rngs.params(), shape)
            return nnx.Param(kernel, group="no_decay")

        self.gate_proj = linear(d_model, width)
        self.in_proj = linear(d_model, width)
        self.conv = ShortConv(width, config.conv_width, dtype=config.dtype, rngs=rngs)
        self.recurrence_kernel, self.input_kernel = gate_kernel(), gate_kernel()
        self.recurrence_bias = nnx.Param(jnp.zeros((width,), jnp.float32), group="no_decay")
        self.input_bias = nnx.Param(jnp.zeros((width,), jnp.float32), group="no_decay")
        decay = jax.random.uniform(rngs.params(), (width,), jnp.float32, config.decay_min, config.decay_max)
        rate = -jnp.log(decay) / SHARPNESS
        self.Lambda = nnx.Param(rate + jnp.log(-jnp.expm1(-rate)), group="no_decay")  # softplus^-1(rate)
        self.out_proj = linear(width, d_model)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> RGLRUState:
        """An empty state; `capacity` is ignored (constant size). dtype: of the convolution's inputs."""
        zero = jnp.zeros((batch,), jnp.int32)
        return RGLRUState(
            conv=self.conv.init_state(batch, dtype or self.config.dtype),
            hidden=jnp.zeros((batch, self.width), jnp.float32),
            segment_id=zero,
            position=zero,
        )

    def __call__(
        self, x: Activations, state: RGLRUState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, RGLRUState]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)
        u, conv = self.conv(self.in_proj(x), state.conv, segments)
        exact = u.astype(jnp.float32)
        h, hidden = rg_lru(
            exact,
            self._gate(exact, self.recurrence_kernel, self.recurrence_bias),
            self._gate(exact, self.input_kernel, self.input_bias),
            self.Lambda[...],
            segments.positions == 0,
            initial_state=forget(state.hidden, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        y = self.out_proj(nnx.gelu(self.gate_proj(x)) * h.astype(u.dtype))
        return y, RGLRUState(conv=conv, hidden=hidden, segment_id=segments.segment_id, position=segments.position)

    def _gate(self, u, kernel, bias):
        blocks = u.reshape(*u.shape[:2], self.num_heads, -1)
        y = jnp.einsum("bthi,hij->bthj", blocks, kernel[...], precision="highest")
        return jax.nn.sigmoid(y.reshape(u.shape) + bias[...][None, None])


def rg_lru(
    u: Float[Array, "B T R"],
    recurrence_gate: Float[Array, "B T R"],
    input_gate: Float[Array, "B T R"],
    Lambda: Float[Array, "R"],
    first: Bool[Array, "B T"],
    *,
    initial_state: Float[Array, "B R"] | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T R"], Float[Array, "B R"]]:
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t with a_t = exp(-8 softplus(Lambda) r_t); h_t = i_t u_t at `first`.

    As a selective scan of one state per channel: steps -log a, A = -1, B = C = 1, inputs sqrt(1 - a^2) i u / -log a.
    u, recurrence_gate (r), input_gate (i): `[B, T, R]`. first: a document's first tokens; what `initial_state` holds
    there must have been forgotten. segment_ids, implementation: of `selective_scan`. Returns `(h, final_state)`.
    """
    batch, length, width = u.shape
    # No step reaches a first token's past, which is zero, so there any will do; with 1 nothing is divided.
    rate = jnp.maximum(SHARPNESS * jax.nn.softplus(Lambda)[None, None] * recurrence_gate, SMALLEST_RATE)
    rate = jnp.where(first[..., None], 1, rate)
    written = jnp.where(first[..., None], 1, jnp.sqrt(-jnp.expm1(-2 * rate)))
    one = jnp.ones((batch, length, 1), u.dtype)
    h, final = selective_scan(
        written * input_gate * u / rate,
        rate,
        -jnp.ones((width, 1), u.dtype),
        one,
        one,
        initial_state=None if initial_state is None else initial_state[..., None],
        segment_ids=segment_ids,
        implementation=implementation,
    )
    return h, final[..., 0]

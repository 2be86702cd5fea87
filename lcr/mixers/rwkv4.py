"""RWKV-4: time mixing by the WKV recurrence, a decay for each channel (arXiv 2305.13048)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.wkv.api import IMPLEMENTATIONS, WKVState, wkv

from lcr.checks import check_call, check_compute, check_whole
from lcr.layers.segments import forget, read_segments
from lcr.layers.token_shift import token_shift
from lcr.typing import Activations, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV4Config:
    """Options of `RWKV4`.

    attention_width: A, how many channels have sums (`attention_hidden_size` in transformers). None: d_model.
    dtype: of the compute; parameters and sums are float32. implementation: of `wkv`.
    """

    attention_width: int | None = None
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)
        if self.attention_width is not None:
            check_whole(attention_width=self.attention_width)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "RWKV4":
        return RWKV4(self, d_model, rngs=rngs)


@struct.dataclass
class RWKV4State:
    """wkv: the two sums and the logarithm of their scale; shift: the last real input; and the two counters.

    Bytes per sequence: d_model itemsize + 12 A + 8.
    """

    wkv: WKVState  # three of float32[B, A]
    shift: Leaf  # [B, D]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class RWKV4(nnx.Module):
    """With x' the real token before x in its document, and m one number for each channel, for each of r, k, v

        x_r = m_r x + (1 - m_r) x'    r, k, v = x_r W_r, x_k W_k, x_v W_v

        num_t = exp(-w) num_{t-1} + exp(k_t) v_t        den_t = exp(-w) den_{t-1} + exp(k_t)
        y = (sigmoid(r_t) * (num_{t-1} + exp(u + k_t) v_t) / (den_{t-1} + exp(u + k_t))) W_o

    (equations 11 to 16), with w = exp(time_decay).
    """

    def __init__(self, config: RWKV4Config, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.d_model = d_model
        self.attention_width = width = config.attention_width or d_model

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, rngs=rngs)

        def no_decay(initial):
            return nnx.Param(initial, group="no_decay")

        # The authors' initial values for a layer in the middle of the model
        channel = jnp.arange(d_model, dtype=jnp.float32) / d_model
        self.time_mix_r = no_decay(channel**0.25)
        self.time_mix_k = no_decay(channel**0.5)
        self.time_mix_v = no_decay(channel**0.5 + 0.15)
        place = jnp.linspace(0.0, 1.0, width, dtype=jnp.float32)
        self.time_decay = no_decay(-5 + 8 * place**1.35)
        zigzag = (jnp.arange(width, dtype=jnp.float32) + 1) % 3 - 1
        self.bonus = no_decay(jnp.log(0.3) + 0.5 * zigzag)  # u
        self.r_proj = linear(d_model, width)
        self.k_proj = linear(d_model, width)
        self.v_proj = linear(d_model, width)
        self.out_proj = linear(width, d_model)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> RWKV4State:
        """An empty state; `capacity` is ignored (constant size). dtype: of the input that is kept."""
        zero = jnp.zeros((batch,), jnp.int32)
        sums = jnp.zeros((batch, self.attention_width), jnp.float32)
        return RWKV4State(
            shift=jnp.zeros((batch, self.d_model), dtype or self.config.dtype),
            wkv=WKVState(sums, sums, sums),
            segment_id=zero,
            position=zero,
        )

    def __call__(
        self, x: Activations, state: RWKV4State | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, RWKV4State]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        dtype = self.config.dtype
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)
        x = x.astype(dtype)
        previous, shift = token_shift(x, state.shift, segments)

        def mixed(mix):
            return previous + mix[...].astype(dtype)[None, None] * (x - previous)

        y, sums = wkv(
            self.k_proj(mixed(self.time_mix_k)),
            self.v_proj(mixed(self.time_mix_v)),
            # exp(-exp(10)) is 0 already; an infinite decay would have no gradient that is a number.
            -jnp.exp(jnp.minimum(self.time_decay[...], 10.0)),
            self.bonus[...],
            initial_state=forget(state.wkv, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        y = self.out_proj(nnx.sigmoid(self.r_proj(mixed(self.time_mix_r))) * y)
        return y, RWKV4State(shift=shift, wkv=sums, segment_id=segments.segment_id, position=segments.position)

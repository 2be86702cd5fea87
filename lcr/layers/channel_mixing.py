"""The feed-forward of the RWKV family, channel mixing, which sees the token before (arXiv 2305.13048, section 3.1)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx, struct

from lcr.checks import check_call, check_choice, check_compute, check_flags, check_whole
from lcr.layers.segments import read_segments
from lcr.layers.token_shift import token_shift
from lcr.typing import Activations, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelMixingConfig:
    """Options of `ChannelMixing`.

    d_ff: inner width; None: 4 d_model, as in RWKV-4 and -7 (RWKV-6 has 3.5 d_model).
    mix_of: whether mu is the share of the "previous" token, as in RWKV-6 and -7, or of the "current" one, as in RWKV-4.
    receptance: whether a sigmoid gates the output, as in RWKV-4 to -6; RWKV-7 has no such gate.
    dtype: of the compute and of the state; parameters are float32.
    """

    d_ff: int | None = None
    mix_of: str = "previous"
    receptance: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_compute(self.dtype, None, ())
        check_choice("mix_of", self.mix_of, ("previous", "current"))
        check_flags(receptance=self.receptance)
        if self.d_ff is not None:
            check_whole(d_ff=self.d_ff)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "ChannelMixing":
        return ChannelMixing(self, d_model, rngs=rngs)


@struct.dataclass
class ChannelMixingState:
    """shift: the last real input; and the two counters. Bytes per sequence: d_model itemsize + 8."""

    shift: Leaf  # [B, D]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class ChannelMixing(nnx.Module):
    """With x' the real token before x in its document, and mu one number for each channel,

        k = relu((x + mu_k (x' - x)) W_k)^2        y = sigmoid((x + mu_r (x' - x)) W_r) * (k W_v)

    or, without receptance, y = k W_v; where mu is of the current token, x and x' change places. (RWKV-4: arXiv
    2305.13048, equations 17 and 18; RWKV-7: arXiv 2503.14456, section 4.)

    The interface is that of a mixer, `(x, state, segment_ids) -> (y, state)`, and so are its laws.
    """

    def __init__(self, config: ChannelMixingConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.d_model = d_model
        d_ff = config.d_ff or 4 * d_model

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=config.dtype, rngs=rngs)

        def mix():
            current = jnp.arange(d_model, dtype=jnp.float32) / d_model
            return nnx.Param(current if config.mix_of == "current" else 1 - current, group="no_decay")

        self.key_mix = mix()
        self.key = linear(d_model, d_ff)
        self.value = linear(d_ff, d_model)
        if config.receptance:
            self.receptance_mix = mix()
            self.receptance = linear(d_model, d_model)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> ChannelMixingState:
        """An empty state; `capacity` is ignored (constant size). dtype: of the input that is kept."""
        zero = jnp.zeros((batch,), jnp.int32)
        shift = jnp.zeros((batch, self.d_model), dtype or self.config.dtype)
        return ChannelMixingState(shift=shift, segment_id=zero, position=zero)

    def __call__(
        self, x: Activations, state: ChannelMixingState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, ChannelMixingState]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        dtype = self.config.dtype
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)
        x = x.astype(dtype)
        previous, shift = token_shift(x, state.shift, segments)

        one, other = (previous, x) if self.config.mix_of == "previous" else (x, previous)

        def mixed(mix):
            return other + mix[...].astype(dtype)[None, None] * (one - other)

        y = self.value(jnp.square(nnx.relu(self.key(mixed(self.key_mix)))))
        if self.config.receptance:
            y = nnx.sigmoid(self.receptance(mixed(self.receptance_mix))) * y
        if segments.ids is not None:
            y = jnp.where((segments.ids != 0)[..., None], y, 0)
        return y, ChannelMixingState(shift=shift, segment_id=segments.segment_id, position=segments.position)

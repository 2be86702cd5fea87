"""RWKV-7's time mixing: a delta rule with a decay and a learning rate for each channel (arXiv 2503.14456)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from pallas_kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule

from lcr.checks import check_call, check_compute, check_positive, check_whole
from lcr.layers.delta_heads import unit_length
from lcr.layers.heads import default_num_heads
from lcr.layers.segments import forget, read_segments
from lcr.layers.token_shift import token_shift
from lcr.typing import Activations, Array, Float, Leaf, SegmentIds

SLOWEST = -0.606531  # log decays lie between this, -exp(-1/2), and 0
SHIFTED = ("r", "w", "k", "v", "a", "g")  # what is computed from a mix of a token and the one before it


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """Options of `RWKV7`.

    num_heads: H, a divisor of d_model; K = V = d_model / H. None: as many heads of width 64 as fit; if that makes
        fewer than four, of width 32, then 16.
    decay_rank, rate_rank, value_rank, gate_rank: ranks of the nets that make the decay, the learning rate, the value
        residual and the gate. None: as the authors, 2.5, 2.5, 1.7 and 5 times sqrt(d_model), rounded to a multiple
        of 32 and at least 32.
    norm_eps: of the group norm of each head; the authors' code has 64e-5 for heads of any width.
    dtype: of the compute; parameters are float32. implementation: of `delta_rule`.
    """

    num_heads: int | None = None
    decay_rank: int | None = None
    rate_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    norm_eps: float = 64e-5
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)
        check_positive(norm_eps=self.norm_eps)
        for name in ("num_heads", "decay_rank", "rate_rank", "value_rank", "gate_rank"):
            if getattr(self, name) is not None:
                check_whole(**{name: getattr(self, name)})

    def head_sizes(self, d_model: int) -> tuple[int, int]:
        """H and K for a model of this width. Raises: ValueError where the heads do not divide."""
        heads = self.num_heads or default_num_heads(d_model)
        if d_model % heads:
            raise ValueError(f"num_heads={heads} does not divide d_model={d_model}: expected a divisor")
        return heads, d_model // heads

    def ranks(self, d_model: int) -> dict[str, int]:
        """The rank of each low-rank net."""
        multiples = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}
        return {
            name: getattr(self, name) or max(32, round(multiple * d_model**0.5 / 32) * 32)
            for name, multiple in multiples.items()
        }

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "RWKV7":
        return RWKV7(self, d_model, rngs=rngs)


@struct.dataclass
class RWKV7State:
    """memory: S; shift: the last real token; and the two counters.

    Bytes per sequence: 4 H K V + d_model itemsize + 8 = 4 d_model^2 / H + d_model itemsize + 8.
    """

    memory: Leaf  # float32[B, H, K, V]
    shift: Leaf  # [B, D]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class RWKV7(nnx.Module):
    """x_c = x_t + mu_c (x_{t-1} - x_t) for c in r, w, k, v, a, g; r, k', v' = x_r W_r, x_k W_k, x_v W_v;

        decay       log w = -e^-1/2 sigmoid(w_0 + tanh(x_w W_1) W_2)
        rate        eta = sigmoid(a_0 + x_a A_1 A_2)
        removed     kk = unit length, by head, of k' k_k
        key         k = k' (1 + (eta - 1) k_a)
        value       v = v' + (v_first - v') sigmoid(v_0 + x_v V_1 V_2)
        S_t = (diag(w_t) - (kk_t eta_t) kk_t^T) S_{t-1} + k_t v_t^T        o_t = r_t S_t
        y = ((group_norm(o) + (sum_i r_i k_i r_k,i) v) (sigmoid(x_g G_1) G_2)) W_o

    (section 4; the state here is the transpose of the paper's). v_first is v' of the first such layer of a model: a
    decoder gets it from that layer's `values` and hands it to all of them as `first_values`. A layer that is given none
    is the first one, whose v_first is its own v', so that v = v'.

    The authors start each layer by its depth; here all start as a layer half way up would, and W_o not at zero.
    """

    def __init__(self, config: RWKV7Config, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.num_heads, width = config.head_sizes(d_model)
        ranks = config.ranks(d_model)
        channel = np.arange(d_model) / max(d_model - 1, 1)  # 0 to 1
        inside = 2 * (np.arange(d_model) % width) / max(width - 1, 1) - 1  # -1 to 1 in each head
        zigzag = inside * np.abs(inside)

        def parameter(value):
            return nnx.Param(jnp.asarray(np.broadcast_to(value, (d_model,)), jnp.float32), group="no_decay")

        def linear(gain):
            return nnx.Linear(
                d_model,
                d_model,
                use_bias=False,
                dtype=config.dtype,
                precision=jax.lax.Precision.HIGHEST,
                kernel_init=nnx.initializers.orthogonal(gain),
                rngs=rngs,
            )

        power = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        start = np.arange(d_model) / d_model
        self.mix = nnx.Param(
            jnp.asarray(np.stack([1 - start ** (0.5 * power[c]) for c in SHIFTED]), jnp.float32), group="no_decay"
        )
        self.r_proj, self.k_proj, self.v_proj, self.out_proj = linear(1.0), linear(0.1), linear(1.0), linear(1.0)
        self.decay = LowRank(d_model, ranks["decay_rank"], -5.5 + 6 * channel**1.8 + 2.5 * zigzag, rngs=rngs)
        self.rate = LowRank(d_model, ranks["rate_rank"], -0.19 + 0.3 * zigzag + 0.4 * (channel - 0.5), rngs=rngs)
        self.value = LowRank(d_model, ranks["value_rank"], 0.73 - 0.4 * (channel - 0.5), rngs=rngs)
        self.gate = LowRank(d_model, ranks["gate_rank"], None, rngs=rngs)
        self.k_k = parameter(0.71 - 0.1 * (channel - 0.5))
        self.k_a = parameter(1.02)
        self.r_k = parameter(-0.04)
        self.scale = parameter(1.0)
        self.bias = parameter(0.0)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> RWKV7State:
        """An empty state; `capacity` is ignored (constant size). dtype: of the last token."""
        zero = jnp.zeros((batch,), jnp.int32)
        d_model = self.r_k.shape[0]
        width = d_model // self.num_heads
        return RWKV7State(
            memory=jnp.zeros((batch, self.num_heads, width, width), jnp.float32),
            shift=jnp.zeros((batch, d_model), dtype or self.config.dtype),
            segment_id=zero,
            position=zero,
        )

    def values(
        self, x: Activations, state: RWKV7State | None = None, segment_ids: SegmentIds | None = None
    ) -> Activations:
        """v' of this layer, `[B, T, D]`, given what `__call__` is given; it reads the state and leaves it alone."""
        shifted, _, _ = self._shift(x, state, segment_ids)
        return self.v_proj(shifted["v"])

    def __call__(
        self,
        x: Activations,
        state: RWKV7State | None = None,
        segment_ids: SegmentIds | None = None,
        first_values: Activations | None = None,
    ) -> tuple[Activations, RWKV7State]:
        """See `lcr.mixers.interface.Mixer`. first_values: v' of the first layer of this kind for the same tokens,
        `[B, T, D]`; None: this is the first.

        Raises: ValueError for first_values of another shape than x.
        """
        check_call(self, x, state, segment_ids)
        if first_values is not None and first_values.shape != x.shape:
            raise ValueError(
                f"first_values of shape {first_values.shape} with x of shape {x.shape}: expected the values of the "
                "first layer for the same tokens"
            )
        if state is None:
            state = self.init_state(x.shape[0])
        shifted, shift, segments = self._shift(x, state, segment_ids)
        v = self.v_proj(shifted["v"])
        if first_values is not None:
            share = jax.nn.sigmoid(self.value(shifted["v"])).astype(v.dtype)
            v = v + (first_values.astype(v.dtype) - v) * share
        rate = jax.nn.sigmoid(self.rate(shifted["a"]))
        r, k = self.r_proj(shifted["r"]), self.k_proj(shifted["k"])
        removed = unit_length(self._heads(k * _row(self.k_k, k.dtype)), 1e-12)
        k = (k.astype(jnp.float32) * (1 + (rate - 1) * _row(self.k_a))).astype(k.dtype)
        r, k, v, rate = self._heads(r), self._heads(k), self._heads(v), self._heads(rate)
        o, memory = delta_rule(
            r,
            k,
            v,
            -removed,
            removed * rate.astype(k.dtype),
            self._heads(SLOWEST * jax.nn.sigmoid(self.decay(shifted["w"], jnp.tanh))),
            scale=1.0,
            initial_state=forget(state.memory, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        y = self._group_norm(o) + self._own(r, k) * v
        y = self.out_proj(y.reshape(x.shape) * self.gate(shifted["g"], jax.nn.sigmoid).astype(y.dtype))
        if segments.ids is not None:  # the norm's bias and the token's own term know no padding
            y = jnp.where(segments.ids[..., None] != 0, y, jnp.zeros((), y.dtype))
        return y, RWKV7State(
            memory=memory, shift=shift, segment_id=segments.segment_id, position=segments.position
        )

    def _shift(self, x, state, segment_ids):
        """The mixes of each token with the one before it, by name; the new last token; the segments."""
        if state is None:
            state = self.init_state(x.shape[0])
        segments = read_segments(segment_ids, state.segment_id, state.position, x.shape[1])
        x = x.astype(self.config.dtype)
        previous, shift = token_shift(x, state.shift, segments)
        mix = self.mix[...].astype(x.dtype)
        shifted = {name: x + (previous - x) * mix[i][None, None] for i, name in enumerate(SHIFTED)}
        return shifted, shift, segments

    def _heads(self, x):
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def _own(self, r, k):
        """sum_i r_i k_i r_k,i of each head, `[B, T, H, 1]`: what the token's own value is added by."""
        weights = self._heads(_row(self.r_k))
        return jnp.sum(r.astype(jnp.float32) * k.astype(jnp.float32) * weights, -1, keepdims=True).astype(r.dtype)

    def _group_norm(self, o: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
        exact = o.astype(jnp.float32)
        centred = exact - jnp.mean(exact, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.config.norm_eps)
        return (normed * self._heads(_row(self.scale)) + self._heads(_row(self.bias))).astype(o.dtype)


class LowRank(nnx.Module):
    """f(x) = bias + activation(x W_1) W_2, float32; W_1 starts at zero, as the authors have it."""

    def __init__(self, d_model: int, rank: int, bias: np.ndarray | None, *, rngs: nnx.Rngs):
        self.down = nnx.Param(jnp.zeros((d_model, rank), jnp.float32), group="no_decay")
        up = nnx.initializers.orthogonal(0.1)(rngs.params(), (rank, d_model), jnp.float32)
        self.up = nnx.Param(up, group="no_decay")
        self.bias = None if bias is None else nnx.Param(jnp.asarray(bias, jnp.float32), group="no_decay")

    def __call__(self, x: Activations, activation=lambda x: x) -> Activations:
        inner = activation(jnp.einsum("btd,dr->btr", x.astype(jnp.float32), self.down[...], precision="highest"))
        y = jnp.einsum("btr,rd->btd", inner, self.up[...], precision="highest")
        return y if self.bias is None else y + _row(self.bias)


def _row(parameter, dtype=jnp.float32):
    return parameter[...].astype(dtype)[None, None]

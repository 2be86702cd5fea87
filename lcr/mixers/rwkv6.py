"""RWKV-6 (Finch): time mixing with a data-dependent token shift and decay (arXiv 2404.05892)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.linear_attention.api import IMPLEMENTATIONS, linear_attention

from lcr.checks import check_call, check_compute, check_positive, check_whole
from lcr.layers.heads import default_num_heads, head_width
from lcr.layers.segments import forget, read_segments
from lcr.layers.token_shift import token_shift
from lcr.typing import Activations, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV6Config:
    """Options of `RWKV6`.

    num_heads: H. None: as many heads with values of width 64 as fit; if that makes fewer than four, 32, then 16.
    key_factor, value_factor: width of all keys and of all values together, as multiples of d_model.
    mix_rank: rank of each of the five projections that say how much of the token before to mix in.
    decay_rank: rank of the decays' projection.
    norm_eps: of the group norm of the heads (64e-5 in the authors' code).
    dtype: of the compute; parameters are float32. implementation: of `linear_attention`.
    """

    num_heads: int | None = None
    key_factor: float = 1.0
    value_factor: float = 1.0
    mix_rank: int = 32
    decay_rank: int = 64
    norm_eps: float = 64e-5
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)
        for name in ("key_factor", "value_factor", "norm_eps"):
            check_positive(**{name: getattr(self, name)})
        check_whole(mix_rank=self.mix_rank, decay_rank=self.decay_rank)
        if self.num_heads is not None:
            check_whole(num_heads=self.num_heads)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "RWKV6":
        return RWKV6(self, d_model, rngs=rngs)


@struct.dataclass
class RWKV6State:
    """shift: the last real input; memory: S, the decayed sum of k v^T; and the two counters.

    Bytes per sequence: d_model itemsize + 4 H K V + 8, with H K V = key_factor value_factor d_model^2 / H.
    """

    shift: Leaf  # [B, D]
    memory: Leaf  # float32[B, H, K, V]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class RWKV6(nnx.Module):
    """With x' the real token before x in its document, and for each of r, w, k, v, g

        x_r = x + (x' - x) * (m_r + tanh((x + (x' - x) * m_x) W_1r) W_2r)          and so on
        r, k, v, g = x_r W_r, x_k W_k, x_v W_v, x_g W_g        w = exp(-exp(b + tanh(x_w A_1) A_2))

        o_t = r_t (S_{t-1} + diag(u) k_t v_t^T)        S_t = diag(w_t) S_{t-1} + k_t v_t^T
        y = (groupnorm(o) * swish(g)) W_o

    (equations 13 to 20), the norm over each head with a scale and a bias for each channel.
    """

    def __init__(self, config: RWKV6Config, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.d_model = d_model
        self.num_heads = heads = config.num_heads or default_num_heads(d_model)
        self.key_width = head_width("key_factor", config.key_factor, d_model, heads)
        self.value_width = head_width("value_factor", config.value_factor, d_model, heads)
        keys, values = heads * self.key_width, heads * self.value_width

        def linear(inputs, outputs, dtype=config.dtype):
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

        def no_decay(initial):
            return nnx.Param(initial, group="no_decay")

        def uniform(*shape):
            return jax.random.uniform(rngs.params(), shape, jnp.float32, -0.01, 0.01)

        # The authors' initial values for a layer in the middle of the model
        channel = jnp.arange(d_model, dtype=jnp.float32) / d_model
        slow, fast = 1 - channel**0.5, 1 - channel**0.25
        self.shift_mix = no_decay(slow)  # m_x
        self.mix = no_decay(jnp.stack([fast, slow, slow, slow - 0.15, fast]))  # m for r, w, k, v, g
        self.mix_down = no_decay(uniform(d_model, 5, config.mix_rank))
        self.mix_up = no_decay(uniform(5, config.mix_rank, d_model))
        place = jnp.linspace(0.0, 1.0, keys, dtype=jnp.float32)
        self.decay_bias = no_decay(-6 + 5 * place**1.35)
        self.decay_down = no_decay(uniform(d_model, config.decay_rank))
        self.decay_up = no_decay(uniform(config.decay_rank, keys))
        zigzag = (jnp.arange(keys, dtype=jnp.float32) + 1) % 3 - 1
        self.bonus = no_decay((0.5 * (1 - place) + 0.1 * zigzag).reshape(heads, -1))
        # In float32, for the sake of r u k in `__call__`.
        self.r_proj = linear(d_model, keys, jnp.float32)
        self.k_proj = linear(d_model, keys, jnp.float32)
        self.v_proj = linear(d_model, values)
        self.gate_proj = linear(d_model, values)
        self.norm_scale = no_decay(jnp.ones((values,), jnp.float32))
        self.norm_bias = no_decay(jnp.zeros((values,), jnp.float32))
        self.out_proj = linear(values, d_model)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> RWKV6State:
        """An empty state; `capacity` is ignored (constant size). dtype: of the input that is kept."""
        zero = jnp.zeros((batch,), jnp.int32)
        return RWKV6State(
            shift=jnp.zeros((batch, self.d_model), dtype or self.config.dtype),
            memory=jnp.zeros((batch, self.num_heads, self.key_width, self.value_width), jnp.float32),
            segment_id=zero,
            position=zero,
        )

    def __call__(
        self, x: Activations, state: RWKV6State | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, RWKV6State]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        segments = read_segments(segment_ids, state.segment_id, state.position, length)
        x = x.astype(self.config.dtype)
        previous, shift = token_shift(x, state.shift, segments)
        of_r, of_w, of_k, of_v, of_g = self._mixed(x, previous)

        def heads(projected):
            return projected.reshape(batch, length, self.num_heads, -1)

        r, k, v = heads(self.r_proj(of_r)), heads(self.k_proj(of_k)), heads(self.v_proj(of_v))
        o, memory = linear_attention(
            r.astype(v.dtype),
            k.astype(v.dtype),
            v,
            heads(self._log_decay(of_w)),
            bonus=jnp.zeros_like(self.bonus[...]),
            scale=1.0,
            initial_state=forget(state.memory, segments.continues),
            segment_ids=segments.ids,
            implementation=self.config.implementation,
        )
        # What a token reads of its own value, in float32: a document's first o is (r u k) v, and where that sum all but
        # cancels, the norm magnifies its error (in bfloat16 to 9% of the largest output; other tokens are within 1%).
        own = jnp.sum(r * k * self.bonus[...][None, None], axis=-1, keepdims=True)
        o = o.astype(jnp.float32) + own * v.astype(jnp.float32)
        y = self.out_proj(self._norm(o) * nnx.silu(self.gate_proj(of_g)))
        if segments.ids is not None:  # the norm's bias lets padding through
            y = jnp.where((segments.ids != 0)[..., None], y, 0)
        return y, RWKV6State(
            shift=shift, memory=memory, segment_id=segments.segment_id, position=segments.position
        )

    def _mixed(self, x, previous):
        """x and the token before, mixed for r, w, k, v and g; in float32."""
        x = x.astype(jnp.float32)
        delta = previous.astype(jnp.float32) - x
        hidden = x + delta * self.shift_mix[...][None, None]
        hidden = jnp.einsum("btd,dnr->btnr", hidden, self.mix_down[...], precision="highest")
        mix = jnp.einsum("btnr,nrd->nbtd", jnp.tanh(hidden), self.mix_up[...], precision="highest")
        return x[None] + delta[None] * (mix + self.mix[...][:, None, None])

    def _log_decay(self, x):
        """log w in float32: decays near 1 decide how far the memory reaches."""
        hidden = jnp.einsum("btd,dr->btr", x.astype(jnp.float32), self.decay_down[...], precision="highest")
        logits = jnp.einsum("btr,rk->btk", jnp.tanh(hidden), self.decay_up[...], precision="highest")
        # exp(-exp(10)) is 0 already; an infinite decay would have no gradient that is a number.
        return -jnp.exp(jnp.minimum(logits + self.decay_bias[...][None, None], 10.0))

    def _norm(self, o):
        """The group norm of the heads; computed in float32. [B, T, H, V] to [B, T, H V]."""
        exact = o.astype(jnp.float32)
        exact = exact - jnp.mean(exact, axis=-1, keepdims=True)
        exact = exact * jax.lax.rsqrt(jnp.mean(jnp.square(exact), axis=-1, keepdims=True) + self.config.norm_eps)
        exact = exact.reshape(*o.shape[:2], -1) * self.norm_scale[...][None, None] + self.norm_bias[...][None, None]
        return exact.astype(self.config.dtype)

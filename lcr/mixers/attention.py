"""Softmax attention with a key-value cache: MHA, MQA and GQA, with relative positions and a sliding window."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from pallas_kernels.attention.api import IMPLEMENTATIONS

from lcr.checks import check_call, check_choice, check_compute, check_flags, check_positive, check_whole
from lcr.layers.alibi import alibi_slopes
from lcr.layers.cache import append, attend_new, attend_slots, attend_slots_and_new
from lcr.layers.norms import RMSNorm
from lcr.layers.rope import apply_rope
from lcr.layers.rope_scaling import check_rope_base, freeze_rope_scaling, read_rope_scaling
from lcr.layers.segments import read_segments
from lcr.layers.xpos import xpos_attention
from lcr.typing import Activations, Leaf, SegmentIds


ROTARY = ("rope", "xpos")
POSITIONS = (*ROTARY, "alibi", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of `Attention`.

    num_heads, head_dim: H and K; one of them gives the other as d_model / it, both together need not multiply to
        d_model, and by default heads are as wide (16 to 128) as leaves at least four of them where that is possible.
    num_kv_heads: G, a divisor of H; None: H.
    window: a token sees so many tokens of its document, itself among them; None: all before it.
    positions: "rope" (rotary, arXiv 2104.09864); "xpos" (rotary, with products that shrink with the distance, arXiv
        2212.10554); "alibi" (scores less a multiple of the distance, arXiv 2108.12409); or "none".
    rope_base: base of the wavelengths of "rope" and "xpos".
    rope_scaling: how these are scaled to longer contexts: a mapping as `lcr.layers.rope_scaling` describes it, or None.
    rope_width: how many of a head's channels are turned, the first ones; None: all.
    qk_norm: RMS norm with a learned scale over the channels of each query and key head, before RoPE: False, True, or
        "offset" for a scale that is learned as its difference from 1. norm_epsilon: of that norm.
    qkv_bias, out_bias: whether the projections to queries, keys and values, and the one back, have a bias added.
    scale: of the scores; None: K^-0.5.
    soft_cap: scores become soft_cap tanh(score / soft_cap).
    dtype: of the compute; parameters are float32. implementation: of `pallas_kernels.attention`.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    positions: str = "rope"
    rope_base: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    rope_width: int | None = None
    qk_norm: bool | str = False
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        for check, names in (
            (check_whole, ("num_heads", "num_kv_heads", "head_dim", "window", "rope_width")),
            (check_positive, ("soft_cap", "scale", "norm_epsilon")),
        ):
            check(**{name: getattr(self, name) for name in names if getattr(self, name) is not None})
        check_rope_base(self.rope_base)
        check_flags(qkv_bias=self.qkv_bias, out_bias=self.out_bias)
        if self.qk_norm not in (False, True, "offset"):
            raise ValueError(f"qk_norm={self.qk_norm!r}: expected False, True or 'offset'")
        check_choice("positions", self.positions, POSITIONS)
        object.__setattr__(self, "rope_scaling", freeze_rope_scaling(self.rope_scaling))
        if self.rope_scaling is not None and self.positions not in ROTARY:
            raise ValueError(
                f"rope_scaling={dict(self.rope_scaling)!r} beside positions={self.positions!r}, which turn nothing: "
                "expected None, or positions 'rope' or 'xpos'"
            )
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)

    def head_sizes(self, d_model: int) -> tuple[int, int, int]:
        """`(H, G, K)` for a model of this width. Raises: ValueError where they do not divide."""
        width = self.head_dim
        if self.num_heads is None:
            width = width or _default_head_dim(d_model)
            heads = _divide(d_model, "head_dim", width)
        else:
            heads = self.num_heads
            width = width or _divide(d_model, "num_heads", heads)
        kv_heads = self.num_kv_heads or self.default_kv_heads(heads)
        if heads % kv_heads:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(f"num_kv_heads={kv_heads} does not divide num_heads={heads}: expected one of {divisors}")
        if self.rope_width is not None:
            if self.positions != "rope":
                raise ValueError(f"rope_width={self.rope_width} beside positions={self.positions!r}: expected 'rope'")
            if self.rope_width % 2 or self.rope_width > width:
                raise ValueError(f"rope_width={self.rope_width}: expected an even one, at most the head_dim {width}")
        elif self.positions in ROTARY and width % 2:
            raise ValueError(
                f"head_dim={width}: {self.positions} turns pairs of channels; expected an even one, or no positions"
            )
        return heads, kv_heads, width

    def default_kv_heads(self, num_heads: int) -> int:
        return num_heads

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "Attention":
        return Attention(self, d_model, rngs=rngs)


class MHAConfig(AttentionConfig):
    """Multi-head attention (arXiv 1706.03762): a key-value head for each query head."""

    def head_sizes(self, d_model: int) -> tuple[int, int, int]:
        heads, kv_heads, width = super().head_sizes(d_model)
        if kv_heads != heads:
            raise ValueError(
                f"num_kv_heads={kv_heads} with {heads} heads: multi-head attention has a key-value head for each; "
                "leave it out, or take the mixer 'gqa'"
            )
        return heads, kv_heads, width


class MQAConfig(AttentionConfig):
    """Multi-query attention (arXiv 1911.02150): one key-value head for all."""

    def head_sizes(self, d_model: int) -> tuple[int, int, int]:
        heads, kv_heads, width = super().head_sizes(d_model)
        if kv_heads != 1:
            raise ValueError(
                f"num_kv_heads={kv_heads}: multi-query attention has one key-value head; "
                "leave it out, or take the mixer 'gqa'"
            )
        return heads, kv_heads, width

    def default_kv_heads(self, num_heads: int) -> int:
        return 1


class GQAConfig(AttentionConfig):
    """Grouped-query attention (arXiv 2305.13245): by default groups of 4 heads from 8 heads on, else groups of 2."""

    def default_kv_heads(self, num_heads: int) -> int:
        for group in (4, 2):
            if num_heads % group == 0 and num_heads >= 2 * group:
                return num_heads // group
        return 1


def _default_head_dim(d_model: int) -> int:
    for width, least_heads in ((128, 16), (64, 4), (32, 4)):
        if d_model % width == 0 and d_model // width >= least_heads:
            return width
    return 16


def _divide(d_model: int, name: str, part: int) -> int:
    if d_model % part:
        raise ValueError(
            f"{name}={part} does not divide d_model={d_model}: expected a divisor, or both num_heads and head_dim"
        )
    return d_model // part


@struct.dataclass
class KVCache:
    """The keys (after norm and RoPE) and values of the last S tokens of the document in hand, and the two counters.

    The token at position p of its document lies in slot p % S; slots not yet written are zero. With a window W,
    S = min(capacity, W), but for RoPE that is scaled by the length, where S = capacity. Bytes per sequence:
    2 S G K itemsize + 8.
    """

    keys: Leaf  # [B, S, G, K]
    values: Leaf  # [B, S, G, K]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class Attention(nnx.Module):
    """q, k, v = x W_q, x W_k, x W_v; o = attention(rope(norm(q)), rope(norm(k)), v); out = o W_o.
    (xPos and ALiBi: `lcr.layers.xpos`, `lcr.layers.alibi`.)

    Positions count the real tokens of a document. A call sees at most as many tokens as its state holds: past its
    capacity S a cache is a sliding window of S, and then a sequence fed whole to that state gives what it gives
    piece by piece. `state=None` makes a cache for the T tokens of the call (fewer if the window is shorter).
    New keys and values are rounded to the cache's dtype before they are attended to.
    """

    def __init__(self, config: AttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.heads, self.kv_heads, self.head_dim = config.head_sizes(d_model)
        self.rope_scaling = read_rope_scaling(config.rope_scaling)

        def linear(inputs, outputs, use_bias):
            return nnx.Linear(
                inputs, outputs, use_bias=use_bias, dtype=config.dtype, precision=jax.lax.Precision.HIGHEST, rngs=rngs
            )

        self.query = linear(d_model, self.heads * self.head_dim, config.qkv_bias)
        self.key = linear(d_model, self.kv_heads * self.head_dim, config.qkv_bias)
        self.value = linear(d_model, self.kv_heads * self.head_dim, config.qkv_bias)
        self.out = linear(self.heads * self.head_dim, d_model, config.out_bias)
        if config.qk_norm:
            options = {"epsilon": config.norm_epsilon, "offset": 1.0 if config.qk_norm == "offset" else 0.0}
            self.query_norm = RMSNorm(self.head_dim, **options)
            self.key_norm = RMSNorm(self.head_dim, **options)

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> KVCache:
        """An empty cache for `capacity` tokens (for the window, if that is shorter)."""
        check_whole(capacity=capacity)
        # where the frequencies depend on how long the text is to be, the number of slots is what says so
        narrow = self.config.window is not None and not self.rope_scaling.by_length
        slots = min(capacity, self.config.window) if narrow else capacity
        shape = (batch, slots, self.kv_heads, self.head_dim)
        return KVCache(
            keys=jnp.zeros(shape, dtype or self.config.dtype),
            values=jnp.zeros(shape, dtype or self.config.dtype),
            segment_id=jnp.zeros((batch,), jnp.int32),
            position=jnp.zeros((batch,), jnp.int32),
        )

    def __call__(
        self, x: Activations, state: KVCache | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, KVCache]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        before = self.init_state(batch, length) if state is None else state
        segments = read_segments(segment_ids, before.segment_id, before.position, length)
        q, k, v = self._project(x, segments.positions, slots=before.keys.shape[1])
        k, v = k.astype(before.keys.dtype), v.astype(before.values.dtype)
        cache = before.keys, before.values
        keys, values = append(cache, (k, v), segments)
        config = self.config
        options = {"soft_cap": config.soft_cap, "scale": config.scale, "implementation": config.implementation}
        if self.config.positions == "alibi":
            options["alibi_slopes"] = jnp.asarray(alibi_slopes(self.heads), np.promote_types(q.dtype, np.float32))
        elif self.config.positions == "xpos":
            options["attend"] = xpos_attention
        if length == 1:
            # Without the barrier XLA fuses the write into each of its readers, each with a copy of the whole cache.
            keys, values = jax.lax.optimization_barrier((keys, values))
            o = attend_slots(q, keys, values, segments, self.config.window, **options)
        elif state is None:
            o = attend_new(q, k, v, segments, window=self.config.window, **options)
        else:
            o = attend_slots_and_new(q, cache, (k, v), before.position, segments, self.config.window, **options)
        after = KVCache(keys=keys, values=values, segment_id=segments.segment_id, position=segments.position)
        y = self.out(o.reshape(batch, length, -1))
        if config.out_bias and segments.ids is not None:
            y = jnp.where((segments.ids != 0)[..., None], y, 0)
        return y, after

    def _project(self, x, positions, slots):
        """Queries, keys and values by head, `[B, T, H or G, K]`, normed and turned."""

        def split(y):
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.config.positions in ROTARY:
            options = {"base": self.config.rope_base, "scaling": self.rope_scaling, "length": slots}
            q, k = (self._turn(y, positions, options) for y in (q, k))
        return q, k, v

    def _turn(self, y, positions, options):
        width = self.config.rope_width or self.head_dim
        turned = apply_rope(y[..., :width], positions, **options)
        return turned if width == self.head_dim else jnp.concatenate([turned, y[..., width:]], axis=-1)

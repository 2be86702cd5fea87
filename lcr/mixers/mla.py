"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from pallas_kernels.attention.api import IMPLEMENTATIONS

from lcr.checks import check_call, check_compute, check_flags, check_positive, check_whole
from lcr.layers.cache import append, attend_new, attend_slots, attend_slots_and_new
from lcr.layers.heads import default_num_heads
from lcr.layers.norms import RMSNorm
from lcr.layers.rope import apply_rope
from lcr.layers.rope_scaling import check_rope_base, freeze_rope_scaling, read_rope_scaling
from lcr.layers.segments import read_segments
from lcr.typing import Activations, Array, Float, Int, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Options of `MLA`; None: a default that goes with the width.

    num_heads: H; None: heads of width 64 (of 32 or 16 in models too narrow for four of those).
    nope_head_dim, value_head_dim: widths of a head's keys without rotation and of its values; None: d_model / H.
    rope_head_dim: width (even) of the rotated part, whose key all heads share; None: half of nope_head_dim.
    kv_lora_rank: width of the latent; None: twice a head's width.
    q_lora_rank: rank of the queries' projection; None: full.
    rope_base: base of RoPE's wavelengths. rope_interleaved: whether pairs are neighbouring channels, as in the authors'
        code, or (i, i + width / 2).
    rope_scaling: how RoPE is scaled to longer contexts: a mapping as `lcr.layers.rope_scaling` describes it, or None.
    norm_epsilon: of the norms of the latents.
    scale: of the scores; None: (nope_head_dim + rope_head_dim)^-0.5, for YaRN with `mscale_all_dim` multiplied by
        mscale(factor, mscale_all_dim)^2.
    bias: whether the projections down to the latents, and the one out, have a bias added (not the ones up from them).
    dtype: of the compute; parameters are float32. implementation: of `pallas_kernels.attention`.
    """

    num_heads: int | None = None
    nope_head_dim: int | None = None
    rope_head_dim: int | None = None
    value_head_dim: int | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    rope_base: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    norm_epsilon: float = 1e-6
    scale: float | None = None
    bias: bool = False
    rope_interleaved: bool = True
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        check_positive(norm_epsilon=self.norm_epsilon)
        check_flags(bias=self.bias, rope_interleaved=self.rope_interleaved)
        check_rope_base(self.rope_base)
        if self.scale is not None:
            check_positive(scale=self.scale)
        object.__setattr__(self, "rope_scaling", freeze_rope_scaling(self.rope_scaling))
        for name in (
            "num_heads", "nope_head_dim", "rope_head_dim", "value_head_dim", "kv_lora_rank", "q_lora_rank"
        ):  # fmt: skip
            if getattr(self, name) is not None:
                check_whole(**{name: getattr(self, name)})
        if self.rope_head_dim is not None and self.rope_head_dim % 2:
            raise ValueError(f"rope_head_dim={self.rope_head_dim}: expected an even width, as pairs are rotated")
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)

    def sized(self, d_model: int) -> "MLAConfig":
        """With every size filled in. Raises: ValueError where the heads do not divide the width."""
        heads = self.num_heads or default_num_heads(d_model)
        nope = self.nope_head_dim
        if nope is None and d_model % heads:
            raise ValueError(
                f"num_heads={heads} does not divide d_model={d_model}: expected a divisor, or nope_head_dim"
            )
        nope = nope or d_model // heads
        return dataclasses.replace(
            self,
            num_heads=heads,
            nope_head_dim=nope,
            value_head_dim=self.value_head_dim or nope,
            rope_head_dim=self.rope_head_dim or max(2, nope // 4 * 2),
            kv_lora_rank=self.kv_lora_rank or 2 * nope,
        )

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "MLA":
        return MLA(self, d_model, rngs=rngs)


@struct.dataclass
class LatentCache:
    """What keys and values of the last S tokens are made from, and the two counters; no keys or values.

    latent: the normed compressed key-value, and after it the rotated key that all heads share.
    Bytes per sequence: S (kv_lora_rank + rope_head_dim) itemsize + 8.
    """

    latent: Leaf  # [B, S, kv_lora_rank + rope_head_dim]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class MLA(nnx.Module):
    """c = norm(x W_dkv); for each head h: k_h = [c W_uk_h, rope(x W_kr)], v_h = c W_uv_h (equations 9 to 19),
    q_h = [q' W_uq_h, rope(q' W_qr_h)] with q' = norm(x W_dq), or x where q_lora_rank is None; softmax(q k) v, W_o.

    Fed whole without a state, keys and values are expanded as above. With a state, so also when it decodes, the
    up-projections are absorbed: q_h W_uk_h^T and the rotated query meet the cached latent and rotated key, one
    key-value head for all, and W_uv_h is applied to what comes out: the cache is read as it lies. Both are one
    formula, associated differently. Past its capacity the cache is a sliding window, as in `Attention`.
    """

    def __init__(self, config: MLAConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config = config.sized(d_model)
        heads, rank = config.num_heads, config.kv_lora_rank
        key_width = config.nope_head_dim + config.rope_head_dim
        self.rope_scaling = read_rope_scaling(config.rope_scaling)
        self.rope_scaling.frequencies(config.rope_head_dim, config.rope_base, 1)  # raises where it cannot scale these
        self.scale = config.scale
        if self.scale is None:
            self.scale = key_width**-0.5 * self.rope_scaling.softmax_factor

        def linear(inputs, outputs, use_bias=config.bias):
            return nnx.Linear(
                inputs, outputs, use_bias=use_bias, dtype=config.dtype, precision=jax.lax.Precision.HIGHEST, rngs=rngs
            )

        queries = d_model
        if config.q_lora_rank is not None:
            queries = config.q_lora_rank
            self.query_down = linear(d_model, queries)
            self.query_norm = RMSNorm(queries, epsilon=config.norm_epsilon)
        self.query = linear(queries, heads * key_width, False)
        self.kv_down = linear(d_model, rank + config.rope_head_dim)
        self.kv_norm = RMSNorm(rank, epsilon=config.norm_epsilon)

        def up(width):
            std = rank**-0.5
            return nnx.Param(std * jax.random.truncated_normal(rngs.params(), -2, 2, (rank, heads, width)))

        self.key_up = up(config.nope_head_dim)
        self.value_up = up(config.value_head_dim)
        self.out = linear(heads * config.value_head_dim, d_model)

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> LatentCache:
        """An empty cache for the latents of `capacity` tokens."""
        check_whole(capacity=capacity)
        width = self.config.kv_lora_rank + self.config.rope_head_dim
        zero = jnp.zeros((batch,), jnp.int32)
        return LatentCache(
            latent=jnp.zeros((batch, capacity, width), dtype or self.config.dtype), segment_id=zero, position=zero
        )

    def __call__(
        self, x: Activations, state: LatentCache | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, LatentCache]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        before = self.init_state(batch, length) if state is None else state
        segments = read_segments(segment_ids, before.segment_id, before.position, length)
        slots = before.latent.shape[1]
        q_nope, q_rope = self._queries(x, segments.positions, slots)
        latent = self._latents(x, segments.positions, slots).astype(before.latent.dtype)
        (cached,) = append((before.latent,), (latent,), segments)
        options = {"scale": self.scale, "implementation": self.config.implementation}
        if state is None:
            q = jnp.concatenate([q_nope, q_rope], axis=-1)
            o = attend_new(q, *self._expand(latent), segments, **options)
        else:
            q = jnp.concatenate([self._product("bthk,rhk->bthr", q_nope, self.key_up), q_rope], axis=-1)
            options["value_width"] = self.config.kv_lora_rank  # values: the latent, which is the front of the keys
            if length == 1:
                cached = jax.lax.optimization_barrier(cached)
                o = attend_slots(q, self._shared(cached), None, segments, **options)
            else:
                shared = (self._shared(before.latent), None), (self._shared(latent), None)
                o = attend_slots_and_new(q, *shared, before.position, segments, **options)
            o = self._product("bthr,rhv->bthv", o, self.value_up)
        after = LatentCache(latent=cached, segment_id=segments.segment_id, position=segments.position)
        y = self.out(o.reshape(batch, length, -1))
        if self.config.bias and segments.ids is not None:
            y = jnp.where((segments.ids != 0)[..., None], y, 0)
        return y, after

    def _turn(self, x: Float[Array, "B T H K"], positions: Int[Array, "B T"], slots: int) -> Float[Array, "B T H K"]:
        options = {"base": self.config.rope_base, "scaling": self.rope_scaling, "length": slots}
        return apply_rope(x, positions, **options, interleaved=self.config.rope_interleaved)

    def _queries(self, x: Activations, positions: Int[Array, "B T"], slots: int):
        config = self.config
        if config.q_lora_rank is not None:
            x = self.query_norm(self.query_down(x))
        q = self.query(x).reshape(*x.shape[:2], config.num_heads, -1)
        nope, rope = jnp.split(q, [config.nope_head_dim], axis=-1)
        return nope, self._turn(rope, positions, slots)

    def _latents(self, x: Activations, positions: Int[Array, "B T"], slots: int) -> Float[Array, "B T R"]:
        config = self.config
        latent, rope = jnp.split(self.kv_down(x), [config.kv_lora_rank], axis=-1)
        rope = self._turn(rope[:, :, None], positions, slots)[:, :, 0]
        return jnp.concatenate([self.kv_norm(latent), rope], axis=-1)

    def _expand(self, latent: Float[Array, "B T R"]):
        """Keys and values of every head."""
        latent, rope = jnp.split(latent.astype(self.config.dtype), [self.config.kv_lora_rank], axis=-1)
        nope = self._product("btr,rhk->bthk", latent, self.key_up)
        rope = jnp.broadcast_to(rope[:, :, None], (*nope.shape[:3], rope.shape[-1]))
        return jnp.concatenate([nope, rope], axis=-1), self._product("btr,rhv->bthv", latent, self.value_up)

    def _shared(self, latent: Float[Array, "B S R"]) -> Float[Array, "B S 1 R"]:
        """The keys of the one key-value head of the absorbed form."""
        return latent.astype(self.config.dtype)[:, :, None]

    def _product(self, formula, x, weight):
        x, weight = x.astype(self.config.dtype), weight[...].astype(self.config.dtype)
        return jnp.einsum(formula, x, weight, precision=jax.lax.Precision.HIGHEST)

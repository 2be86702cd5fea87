"""Infini-attention (arXiv 2404.07143): attention inside segments, and a compressive memory of the segments before."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from pallas_kernels.attention.api import IMPLEMENTATIONS, attention

from lcr.checks import check_call, check_choice, check_compute, check_whole, is_number
from lcr.layers.cache import append
from lcr.layers.compressive_memory import Boundaries, Memory, compressive_memory, find_boundaries
from lcr.layers.rope import apply_rope
from lcr.layers.rope_scaling import check_rope_base
from lcr.layers.segments import Segments, read_segments
from lcr.mixers.attention import AttentionConfig
from lcr.typing import Activations, Array, Bool, Float, Int, Leaf, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniConfig:
    """Options of `InfiniAttention`.

    num_heads, num_kv_heads, head_dim: H, G and K = V, as in `AttentionConfig`. Each key-value head has a memory.
    segment_length: L, in tokens. What matters in training is how many segments the gradient passes through: a gate
        learns nothing of a memory read once or twice. 64 makes sixteen segments of a sequence of 1,024 tokens, the
        size of experiment at which others saw the gates move; the paper has 2,048 (in sequences of 32,768).
    update: "delta" (the paper's linear + delta, a little better there) or "linear".
    rope_base: base of RoPE's wavelengths.
    gate_init: beta of every head at the start; 0 weighs memory and segment alike.
    dtype: of the compute; parameters are float32. implementation: of `pallas_kernels.attention`; "reference" also
        takes the memory token by token.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    segment_length: int = 64
    update: str = "delta"
    rope_base: float = 10_000.0
    gate_init: float = 0.0
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        self._heads()
        check_whole(segment_length=self.segment_length)
        check_choice("update", self.update, ("delta", "linear"))
        check_rope_base(self.rope_base)
        if not is_number(self.gate_init):
            raise ValueError(f"gate_init={self.gate_init!r}: expected a finite number, such as 0.0")
        check_compute(self.dtype, self.implementation, IMPLEMENTATIONS)

    def _heads(self) -> AttentionConfig:
        return AttentionConfig(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)

    def head_sizes(self, d_model: int) -> tuple[int, int, int]:
        """`(H, G, K)` for a model of this width. Raises: ValueError where they do not divide."""
        return self._heads().head_sizes(d_model)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> "InfiniAttention":
        return InfiniAttention(self, d_model, rngs=rngs)


@struct.dataclass
class InfiniState:
    """The memory of the segments before the running one, what the running one will add to it, and the running one's
    keys (after RoPE) and values; and the two counters.

    The token at position p of its document lies in slot p % L, so the running segment fills the slots 0 to
    (position - 1) % L; what stands in later ones is old and not read. It joins the memory when its successor starts.
    Bytes per sequence, whatever was read: 8 G K (V + 1) + 2 L G K itemsize + 8.
    """

    memory: Leaf  # float32[B, G, K, V]
    normalizer: Leaf  # float32[B, G, K]
    running_memory: Leaf  # float32[B, G, K, V]
    running_normalizer: Leaf  # float32[B, G, K]
    keys: Leaf  # [B, L, G, K]
    values: Leaf  # [B, L, G, V]
    segment_id: Leaf  # int32[B]
    position: Leaf  # int32[B]


class InfiniAttention(nnx.Module):
    """q, k, v = x W_q, x W_k, x W_v; for each head, with M and z those of the segments before the token's own,

        A_dot = attention(rope(q), rope(k), v) inside the segment          A_mem = sigma(q) M / (sigma(q) z)
        A = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot                out = A W_o                (eqs. 3 and 6)

    and M, z updated with the segment's own (unturned) keys and values as `lcr.layers.compressive_memory` says
    (equations 4 and 5). A document's segments count from its first token, whatever the calls; in its first, A_mem is
    0. Gate and memory are computed in float32 at least. beta is in the parameter group "memory_gate": at the learning
    rate of the other weights, and with decay, it hardly leaves 0 (huggingface.co/blog/infini-attention).
    """

    def __init__(self, config: InfiniConfig, d_model: int, *, rngs: nnx.Rngs):
        check_whole(d_model=d_model)
        self.config = config
        self.heads, self.kv_heads, self.head_dim = config.head_sizes(d_model)

        def linear(inputs, outputs):
            return nnx.Linear(
                inputs, outputs, use_bias=False, dtype=config.dtype, precision=jax.lax.Precision.HIGHEST, rngs=rngs
            )

        self.query = linear(d_model, self.heads * self.head_dim)
        self.key = linear(d_model, self.kv_heads * self.head_dim)
        self.value = linear(d_model, self.kv_heads * self.head_dim)
        self.beta = nnx.Param(jnp.full((self.heads,), config.gate_init, jnp.float32), group="memory_gate")
        self.out = linear(self.heads * self.head_dim, d_model)

    def init_state(self, batch: int, capacity: int = 0, dtype: Any = None) -> InfiniState:
        """An empty state with room for one segment's keys and values, in `dtype`; `capacity` is ignored."""
        heads, width = self.kv_heads, self.head_dim
        accumulate, cached = np.promote_types(self.config.dtype, np.float32), dtype or self.config.dtype
        zero = jnp.zeros((batch,), jnp.int32)
        return InfiniState(
            memory=jnp.zeros((batch, heads, width, width), accumulate),
            normalizer=jnp.zeros((batch, heads, width), accumulate),
            running_memory=jnp.zeros((batch, heads, width, width), accumulate),
            running_normalizer=jnp.zeros((batch, heads, width), accumulate),
            keys=jnp.zeros((batch, self.config.segment_length, heads, width), cached),
            values=jnp.zeros((batch, self.config.segment_length, heads, width), cached),
            segment_id=zero,
            position=zero,
        )

    def __call__(
        self, x: Activations, state: InfiniState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, InfiniState]:
        check_call(self, x, state, segment_ids)
        batch, length, _ = x.shape
        before = self.init_state(batch) if state is None else state
        segments = read_segments(segment_ids, before.segment_id, before.position, length)
        boundaries = find_boundaries(segments, self.config.segment_length)
        q, k, v = (y(x).reshape(batch, length, -1, self.head_dim) for y in (self.query, self.key, self.value))
        remembered, memory = compressive_memory(
            q, k, v, boundaries,
            Memory.join(before.memory, before.normalizer, before.running_memory, before.running_normalizer),
            delta=self.config.update == "delta", token_by_token=self.config.implementation == "reference",
        )  # fmt: skip
        local, keys, values = self._attend(q, k, v, before, segments, boundaries)
        gate = nnx.sigmoid(self.beta[...].astype(remembered.dtype))[None, None, :, None]
        o = gate * remembered + (1 - gate) * local.astype(remembered.dtype)
        past, past_normalizer, running, running_normalizer = memory.parts()
        after = InfiniState(
            memory=past, normalizer=past_normalizer, running_memory=running, running_normalizer=running_normalizer,
            keys=keys, values=values, segment_id=segments.segment_id, position=segments.position,
        )  # fmt: skip
        return self.out(o.astype(self.config.dtype).reshape(batch, length, -1)), after

    def _attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G V"],
        before: InfiniState,
        segments: Segments,
        boundaries: Boundaries,
    ):
        """A_dot, and the running segment's keys and values after the call."""
        length, slots = q.shape[1], self.config.segment_length
        q, k = (apply_rope(y, segments.positions, base=self.config.rope_base) for y in (q, k))
        k, v = k.astype(before.keys.dtype), v.astype(before.keys.dtype)
        cache = before.keys, before.values
        keys, values = append(cache, (k, v), segments)
        if length == 1:
            # Without the barrier XLA fuses the write into each of its readers, each with a copy of the whole cache.
            keys, values = jax.lax.optimization_barrier((keys, values))
            _, held = running_slots(segments.position, slots)
            o = attention(
                q, keys, values, causal=False, segment_ids=boundaries.valid.astype(jnp.int32),
                kv_segment_ids=held.astype(jnp.int32), implementation=self.config.implementation,
            )  # fmt: skip
            return o, keys, values
        # Segments are numbered over the documents of a row; 1 is the one that the state's tokens are of.
        number = jnp.where(boundaries.valid, 1 + jnp.cumsum(boundaries.starts, axis=1, dtype=jnp.int32), 0)
        positions, held = running_slots(before.position, slots)
        o = attention(
            q,
            *(jnp.concatenate(pair, axis=1) for pair in zip(cache, (k, v), strict=True)),
            window=slots,  # implied by the segments, but tells the op how narrow the band is
            segment_ids=number,
            kv_segment_ids=jnp.concatenate([held.astype(jnp.int32), number], axis=1),
            q_positions=segments.positions,
            kv_positions=jnp.concatenate([positions, segments.positions], axis=1),
            implementation=self.config.implementation,
        )
        return o, keys, values


def running_slots(position: Int[Array, "B"], slots: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """For a state at `position`: the position of each slot in the running segment, and whether it holds a token of it.

    At a boundary the running segment is the one just completed.
    """
    latest = position[:, None] - 1
    positions = latest - latest % slots + jnp.arange(slots, dtype=jnp.int32)[None, :]
    return positions, (positions <= latest) & (latest >= 0)

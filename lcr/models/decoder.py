"""The decoder: pre-norm blocks of a mixer and a SwiGLU, the repeating group of layers stacked and scanned."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.layers.mlp import SwiGLU
from lcr.layers.norms import RMSNorm
from lcr.models.config import ModelConfig, model_config
from lcr.typing import Activations, Array, Float, Int, SegmentIds, State, Tokens


class Block(nnx.Module):
    """x = x + mixer(norm(x)); x = x + mlp(norm(x)) (the second line only if the model has feed-forwards)."""

    def __init__(self, config: ModelConfig, name: str, *, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
        self.mixer = config.mixer(name).make(config.d_model, rngs=rngs)
        self.has_mlp = config.ff_width > 0
        if self.has_mlp:
            self.mlp_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
            self.mlp = SwiGLU(config.d_model, config.ff_width, dtype=jnp.dtype(config.dtype), rngs=rngs)

    def __call__(
        self, x: Activations, state: State | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, State]:
        y, state = self.mixer(self.mixer_norm(x), state, segment_ids)
        x = x + y.astype(x.dtype)
        if self.has_mlp:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state


class Group(nnx.Module):
    """One repetition of the pattern of layers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, name, rngs=rngs) for name in config.pattern])

    def __call__(
        self, x: Activations, states: State | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, State]:
        new_states = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i], segment_ids)
            new_states.append(state)
        return x, tuple(new_states)


class Decoder(nnx.Module):
    """A language model over `config.mixers`.

    The layers of one repeating group (`config.pattern`) are stacked along a new first axis of every parameter and
    scanned over, so compile time and program size do not grow with depth. States are a tuple over the pattern,
    each with leaves [repetitions, B, ...].
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.repetitions = len(config.mixers) // len(config.pattern)
        std = config.d_model**-0.5
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)))

        @nnx.split_rngs(splits=self.repetitions)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return Group(config, rngs=rngs)

        self.groups = stacked(rngs)
        self.final_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = nnx.Param(std * jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)))

    def init_states(self, batch: int, capacity: int, dtype: Any = None) -> State:
        """Empty states for every layer. capacity: tokens that a growing cache must hold (see `Mixer.init_state`)."""
        graph, parameters = nnx.split(self.groups)
        one = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], parameters))
        states = tuple(block.mixer.init_state(batch, capacity, dtype=dtype) for block in one.blocks)
        return jax.tree.map(lambda leaf: jnp.tile(leaf[None], (self.repetitions,) + (1,) * leaf.ndim), states)

    def __call__(
        self,
        tokens: Tokens,
        states: State | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        logits_at: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B P vocab"], State]:
        """Logits for the token after each of `tokens`, and the states after them.

        states: from `init_states` or an earlier call; None starts fresh with capacity T.
        segment_ids: as for every mixer: 0 is padding, a change is a document boundary, None is one document.
        logits_at: positions of this call at which logits are wanted, so that the [B, T, vocab] of a long prefill
            need never exist; None for all T. P may be 0.
        """
        dtype = jnp.dtype(self.config.dtype)
        x = self.embedding[...].astype(dtype)[tokens]
        graph, parameters = nnx.split(self.groups)

        def group(x, layer):
            parameters, states = layer
            return nnx.merge(graph, parameters)(x, states, segment_ids)

        x, states = jax.lax.scan(_remat(group, self.config.remat), x, (parameters, states))
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        x = self.final_norm(x)
        output = self.embedding if self.config.tie_embeddings else self.head
        logits = jnp.einsum("bpd,vd->bpv", x, output[...].astype(dtype), preferred_element_type=jnp.float32)
        return logits, states


def _remat(body, policy: str):
    if policy == "none":
        return body
    if policy == "full":
        return jax.checkpoint(body, prevent_cse=False)
    return jax.checkpoint(
        body, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    )


def make_model(config: ModelConfig | Mapping[str, Any], *, rngs: nnx.Rngs) -> Decoder:
    """Builds a decoder from a `ModelConfig`, or a mapping of its fields.

    Raises: ValueError for unknown fields, mixers and options (naming the nearest) and for bad values.
    """
    return Decoder(model_config(config), rngs=rngs)

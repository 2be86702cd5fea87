"""The decoder: pre-norm blocks of a mixer and a feed-forward, the repeating group of layers stacked and scanned."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from lcr.checks import check_segment_ids, check_state
from lcr.layers.feed_forward import feed_forward_config, make_feed_forward
from lcr.layers.moe import Routing
from lcr.mixers.interface import Mixer
from lcr.models.config import ModelConfig, model_config
from lcr.typing import Activations, Array, Bool, Float, Int, SegmentIds, State, Tokens


class Block(nnx.Module):
    """x = x + mixer(norm(x)); x = x + feed_forward(norm(x)) (the second line only if the layer has a feed-forward).
    With `post_norms`, what is added to x is normed as well.

    Its state is the mixer's, or (the mixer's, the feed-forward's) where that has one too.
    """

    def __init__(self, config: ModelConfig, mixer: str, feed_forward: str, *, rngs: nnx.Rngs):
        self.mixer_norm = config.make_norm()
        self.mixer_post_norm = config.make_norm() if config.post_norms else None
        self.mixer = config.mixer(mixer).make(config.d_model, rngs=rngs)
        self.feed_forward = feed_forward
        if feed_forward != "none":
            self.mlp_norm = config.make_norm()
            self.mlp_post_norm = config.make_norm() if config.post_norms else None
            options = feed_forward_config(feed_forward, **config.feed_forward_options.get(feed_forward, {}))
            dtype = jnp.dtype(config.dtype)
            self.mlp = make_feed_forward(options, config.d_model, config.d_ff, dtype=dtype, rngs=rngs)

    def init_state(self, batch: int, capacity: int, dtype: Any) -> State:
        state = self.mixer.init_state(batch, capacity, dtype=dtype)
        return (state, self.mlp.init_state(batch, capacity, dtype=dtype)) if self.has_state else state

    @property
    def has_state(self) -> bool:
        """Whether the feed-forward has a state of its own."""
        return self.feed_forward == "channel_mixing"

    def values(self, x: Activations, state: State | None, segment_ids: SegmentIds | None) -> Activations:
        """What this layer hands on to later ones (see `Decoder`)."""
        if self.has_state and state is not None:
            state = state[0]
        return self.mixer.values(self.mixer_norm(x), state, segment_ids)

    def __call__(
        self, x: Activations, state: State | None, segment_ids: SegmentIds | None, first_values: Activations | None
    ) -> tuple[Activations, State, Routing | None]:
        state, mlp_state = (state, None) if not self.has_state or state is None else state
        handed = {"first_values": first_values} if hands_on(self.mixer) else {}
        y, state = self.mixer(self.mixer_norm(x), state, segment_ids, **handed)
        if self.mixer_post_norm is not None:
            y = self.mixer_post_norm(y)
        x, routing = x + y.astype(x.dtype), None
        match self.feed_forward:
            case "none":
                return x, state, None
            case "moe":
                y, routing = self.mlp(self.mlp_norm(x), segment_ids)
            case "channel_mixing":
                y, mlp_state = self.mlp(self.mlp_norm(x), mlp_state, segment_ids)
                state = state, mlp_state
            case _:
                y = self.mlp(self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            y = self.mlp_post_norm(y)
        return x + y.astype(x.dtype), state, routing


def hands_on(mixer: Mixer) -> bool:
    """Whether the mixer declares the value residual: a keyword `first_values`, and with it a method `values`."""
    return "first_values" in inspect.signature(type(mixer).__call__).parameters


class Group(nnx.Module):
    """One repetition of the pattern of layers."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(config, *names, rngs=rngs) for names in config.pattern])

    @property
    def first_to_hand_on(self) -> int | None:
        """Which block is the first whose mixer hands on its values."""
        return next((i for i, block in enumerate(self.blocks) if hands_on(block.mixer)), None)

    def __call__(
        self,
        x: Activations,
        states: State | None,
        segment_ids: SegmentIds | None,
        first_values: Activations | None,
        is_first: Bool[Array, ""],
    ) -> tuple[Activations, State, tuple[Routing, ...], Activations | None]:
        new_states, routings = [], []
        for i, block in enumerate(self.blocks):
            state = None if states is None else states[i]
            if i == self.first_to_hand_on:
                first_values = jnp.where(is_first, block.values(x, state, segment_ids), first_values)
            x, state, routing = block(x, state, segment_ids, first_values)
            new_states.append(state)
            routings += [] if routing is None else [routing]
        return x, tuple(new_states), tuple(routings), first_values


class Decoder(nnx.Module):
    """A language model over `config.mixers`.

    The layers of one repeating group (`config.pattern`) are stacked along a new first axis of every parameter and
    scanned over, so compile time and program size do not grow with depth. States are a tuple over the pattern,
    each with leaves [repetitions, B, ...].

    One thing may cross layers: the values of the first layer whose mixer declares it (the value residual of RWKV-7,
    arXiv 2503.14456) are handed to every such layer, that one included, as `first_values`.
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
        self.embedding_norm = config.make_norm() if config.embedding_norm else None
        self.final_norm = config.make_norm(config.final_norm_epsilon)
        if not config.tie_embeddings:
            self.head = nnx.Param(std * jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)))

    def group(self, repetition: int, parameters: State | None = None) -> Group:
        """One repetition of the pattern, taken out of the stack; or made of `parameters`, which were before."""
        graph, stacked = nnx.split(self.groups)
        if parameters is None:
            parameters = jax.tree.map(lambda leaf: leaf[repetition], stacked)
        return nnx.merge(graph, parameters)

    def init_states(self, batch: int, capacity: int, dtype: Any = None) -> State:
        """Empty states for every layer. capacity: tokens that a growing cache must hold (see `Mixer.init_state`)."""
        states = tuple(block.init_state(batch, capacity, dtype) for block in self.group(0).blocks)
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
        logits, states, _ = self.with_routing(tokens, states, segment_ids, logits_at=logits_at)
        return logits, states

    def with_routing(
        self,
        tokens: Tokens,
        states: State | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        logits_at: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B P vocab"], State, tuple[Routing, ...]]:
        """`__call__`, and what the routers did: a `Routing` for each mixture of experts of the pattern, its leaves
        with the repetitions in front. Training adds their losses to its own."""
        check_segment_ids(segment_ids, tokens, "tokens")
        if states is not None:
            self._check_states(states, tokens.shape[0])
        x = self.embed(tokens)
        graph, parameters = nnx.split(self.groups)

        def group(carry, layer):
            (x, first_values), (parameters, states, is_first) = carry, layer
            one = nnx.merge(graph, parameters)
            x, states, routings, first_values = one(x, states, segment_ids, first_values, is_first)
            return (x, first_values), (states, routings)

        carry = (x, self.no_values(x))
        layers = (parameters, states, jnp.arange(self.repetitions) == 0)
        (x, _), (states, routings) = jax.lax.scan(_remat(group, self.config.remat), carry, layers)
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        return self.logits(x), states, routings

    def embed(self, tokens: Tokens) -> Activations:
        """What the first layer is given."""
        dtype = jnp.dtype(self.config.dtype)
        x = self.embedding[...].astype(dtype)[tokens]
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, dtype)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def logits(self, x: Activations) -> Float[Array, "B P vocab"]:
        """What is made of the last layer's output."""
        x = self.final_norm(x)
        output = (self.embedding if self.config.tie_embeddings else self.head)[...].astype(x.dtype)
        logits = jnp.einsum("bpd,vd->bpv", x, output, preferred_element_type=jnp.float32)
        if self.config.logit_soft_cap is not None:
            logits = self.config.logit_soft_cap * jnp.tanh(logits / self.config.logit_soft_cap)
        return logits

    def no_values(self, x: Activations) -> Activations | None:
        """Zeros where the values to be handed on will stand; None if no mixer hands any on."""
        one = self.group(0)
        if one.first_to_hand_on is None:
            return None
        like = jax.eval_shape(lambda x: one.blocks[one.first_to_hand_on].values(x, None, None), x)
        return jnp.zeros(like.shape, like.dtype)

    def _check_states(self, states: State, batch: int) -> None:
        if any(leaf.shape[:1] != (self.repetitions,) for leaf in jax.tree.leaves(states)):
            depths = sorted({leaf.shape[:1] for leaf in jax.tree.leaves(states)})
            raise ValueError(
                f"states: leaves of a first axis {depths}, expected {(self.repetitions,)}: the states of this model, "
                f"which repeats its pattern {self.repetitions} times"
            )
        check_state("states", states, functools.partial(self.init_states, batch), f"tokens have {batch} rows", 1)


def _remat(body, policy: str):
    if policy == "none":
        return body
    if policy == "full":
        return jax.checkpoint(body, prevent_cse=False)
    return jax.checkpoint(
        body, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    )


def make_model(config: ModelConfig | Mapping[str, Any] | ConfigDict, *, rngs: nnx.Rngs) -> Decoder:
    """Builds a decoder from a `ModelConfig`, or a mapping of its fields.

    Raises: ValueError for unknown fields, mixers and options (naming the nearest) and for bad values.
    """
    return Decoder(model_config(config), rngs=rngs)

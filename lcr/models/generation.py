"""Greedy and sampled decoding from a state."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lcr.checks import check_whole, is_number
from lcr.models.decoder import Decoder
from lcr.models.token_loop import layers_in_place, write
from lcr.typing import Array, Int, SegmentIds, State, Tokens


def generate(
    model: Decoder,
    prompt_tokens: Tokens,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: Array | None = None,
    states: State | None = None,
    segment_ids: SegmentIds | None = None,
) -> tuple[Int[Array, "B new"], State]:
    """Continues every row by `max_new_tokens` tokens; returns `(tokens, states)`, both after the last new token.

    temperature: 0 takes the likeliest token; above 0 samples from softmax(logits / temperature) and needs `key`
        (`jax.random.key(seed)`).
    states: goes on from there (a growing cache must have room for prompt and new tokens, or it drops the oldest);
        None starts fresh with room for all.
    segment_ids: of the prompt. Rows of unequal length are padded with 0, anywhere: each goes on from its own last
        real token.
    Raises: ValueError for a temperature below 0 or without a key, and for an empty prompt or max_new_tokens < 1.
    """
    batch, length = prompt_tokens.shape
    if length == 0:
        raise ValueError("prompt_tokens: expected at least one token per row")
    check_whole(max_new_tokens=max_new_tokens)
    if not is_number(temperature) or temperature < 0:
        raise ValueError(f"temperature={temperature!r}: expected 0 (greedy) or a number above")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature}: sampling needs key=jax.random.key(seed)")
    if segment_ids is not None and not bool((segment_ids != 0).any(axis=1).all()):
        raise ValueError("segment_ids: every row needs at least one token that is not padding (0)")
    if states is None:
        states = model.init_states(batch, length + max_new_tokens)
    if key is None:
        key = jax.random.key(0)  # greedy decoding draws nothing from it
    graph, parameters = nnx.split(model)
    layers = layers_in_place(model)
    return _generate(graph, parameters, layers, prompt_tokens, key, states, segment_ids, max_new_tokens, temperature)


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "temperature"))
def _generate(graph, parameters, layers, prompt, key, states, segment_ids, max_new_tokens, temperature):
    model = nnx.merge(graph, parameters)
    length = prompt.shape[1]
    if segment_ids is None:
        last = jnp.full((prompt.shape[0], 1), length - 1, jnp.int32)
    else:
        last = (length - 1 - jnp.argmax((segment_ids != 0)[:, ::-1], axis=1)[:, None]).astype(jnp.int32)

    def choose(logits, key):
        if temperature == 0:
            return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits[:, 0] / temperature).astype(jnp.int32)

    logits, states = model(prompt, states, segment_ids, logits_at=last)

    keys = jax.random.split(key, max_new_tokens + 1)
    tokens, states = write(model, choose(logits, keys[0]), states, choose, keys[1:], layers)
    return tokens[:, :-1], states

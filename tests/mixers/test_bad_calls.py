"""Calls that no mixer takes: a state of another mixer, of another batch or of other sizes, ids of another shape."""

import inspect

import jax
import jax.numpy as jnp
import lcr
import pytest
from flax import nnx
from lcr.models.decoder import Decoder

WIDTH, ROWS, LENGTH = 16, 3, 4


def refused(mixer, message, *args):
    call = inspect.unwrap(type(mixer).__call__)  # without the type checker of the tests
    with pytest.raises(ValueError, match=message):
        call(mixer, jnp.zeros((ROWS, LENGTH, WIDTH)), *args)


def make(name):
    """Shapes do: a call is refused before anything is computed."""
    return nnx.eval_shape(lambda: lcr.make_mixer(name, WIDTH, rngs=nnx.Rngs(0)))


def empty(mixer, rows):
    return jax.eval_shape(lambda: mixer.init_state(rows, LENGTH))


def widen(leaf):
    return jax.ShapeDtypeStruct((*leaf.shape[:-1], 2 * leaf.shape[-1]), leaf.dtype) if leaf.ndim > 1 else leaf


@pytest.mark.parametrize("name", lcr.MIXERS)
def test_every_mixer_names_what_is_wrong(name):
    mixer = make(name)
    own, other = empty(mixer, ROWS), empty(make("mamba" if name == "retnet" else "retnet"), ROWS)
    refused(mixer, f"state: a {type(other).__name__}, expected a {type(own).__name__}", other)
    refused(mixer, rf"state: \(a .*\), expected a {type(own).__name__}", (own, own))
    refused(mixer, "state: of a batch of 2 rows, x has 3 rows", empty(mixer, 2))
    wider = jax.tree.map(widen, own)
    refused(mixer, r"state\.[\w.]+: of shape \(3, .*expected \(3, .*other sizes or options", wider)
    ids = jnp.ones((ROWS, LENGTH + 1), jnp.int32)
    refused(mixer, r"segment_ids: of shape \(3, 5\), expected \(3, 4\)", None, ids)
    refused(mixer, r"segment_ids: of shape \(3, 5\), expected \(3, 4\)", own, ids)
    refused(mixer, "segment_ids: of dtype float32, expected int32", own, jnp.ones((ROWS, LENGTH)))
    halved = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), own)
    refused(mixer, r"state\.[\w.]+: of dtype bfloat16, expected (int|float)32: counters and sums keep theirs", halved)
    for x in (jnp.zeros((ROWS, WIDTH)), jnp.zeros((ROWS, 0, WIDTH)), jnp.zeros((ROWS, LENGTH, WIDTH), jnp.int32)):
        with pytest.raises(ValueError, match=r"x: .*expected floats of shape \[B, T, D\] with nothing empty"):
            inspect.unwrap(type(mixer).__call__)(mixer, x)


def build(*mixers, d_model=WIDTH, feed_forward="none"):
    config = {"vocab_size": 9, "d_model": d_model, "mixers": mixers, "feed_forward": feed_forward}
    return lcr.make_model(config, rngs=nnx.Rngs(0))


def test_a_decoder_names_what_is_wrong_with_its_states():
    model = build("mamba", "gqa")
    call = inspect.unwrap(Decoder.with_routing)
    tokens = jnp.ones((ROWS, LENGTH), jnp.int32)
    own = model.init_states(ROWS, LENGTH)
    for states, message in (
        (own[::-1], r"states: \(a KVCache, a MambaState\), expected \(a MambaState, a KVCache\)"),
        (own[:1], r"states: \(a MambaState\), expected \(a MambaState, a KVCache\)"),
        (own[0], r"states: a MambaState, expected \(a MambaState, a KVCache\)"),
        (build("mamba", "gqa", "mamba", "gqa").init_states(ROWS, LENGTH), r"first axis \[\(2,\)\], expected \(1,\)"),
        (model.init_states(2, LENGTH), "states: of a batch of 2 rows, tokens have 3 rows"),
        (build("mamba", "gqa", d_model=32).init_states(ROWS, LENGTH), r"states\[0\]\.conv: of shape \(1, 3, 3, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call(model, tokens, states)
    with pytest.raises(ValueError, match=r"segment_ids: of shape \(3, 5\), expected \(3, 4\)"):
        call(model, tokens, own, jnp.ones((ROWS, LENGTH + 1), jnp.int32))


def test_channel_mixing_has_a_state_to_check_too():
    model = build("retnet", feed_forward="channel_mixing")
    mixer = model.groups.blocks[0]
    assert mixer.has_state
    states = build("retnet").init_states(ROWS, LENGTH)
    with pytest.raises(ValueError, match=r"states: \(a RetentionState\), expected \(\(a Ret"):
        inspect.unwrap(Decoder.with_routing)(model, jnp.ones((ROWS, LENGTH), jnp.int32), states)

"""Greedy and sampled decoding."""

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.models.token_loop import layers_in_place
from pallas_kernels.tolerances import assert_close


@pytest.fixture(scope="module")
def model():
    config = {"vocab_size": 31, "d_model": 16, "mixers": ("mamba", "gqa")}
    return lcr.make_model(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def prompt():
    return jnp.asarray(np.random.default_rng(0).integers(1, 31, (2, 9), np.int32))


@nnx.jit
def run(model, *args):
    return model(*args)


def by_hand(model, prompt, count):
    """Greedy decoding that computes the whole sequence again for every token: the places not yet filled are later."""
    length = prompt.shape[1]
    tokens = np.pad(np.asarray(prompt), ((0, 0), (0, count)))
    for end in range(length, length + count):
        logits = np.asarray(run(model, tokens)[0])
        tokens[:, end] = np.argmax(logits[:, end - 1], -1)
    return tokens[:, length:]


def test_greedy_equals_decoding_without_a_state(model, prompt):
    generated, _ = lcr.generate(model, prompt, max_new_tokens=4)
    assert generated.dtype == jnp.int32
    np.testing.assert_array_equal(generated, by_hand(model, prompt, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"mixers": ("rwkv7",) * 3, "mixer_options": {"rwkv7": {"num_heads": 2}}, "embedding_norm": True},
        {"mixers": ("mamba", "gqa") * 2, "feed_forward": ("none", "moe") * 2, "logit_soft_cap": 3.0,
         "feed_forward_options": {"moe": {"num_experts": 4}}, "embedding_scale": 2.0},
    ],
    ids=["values of the first layer", "repeated pattern"],
)  # fmt: skip
def test_layer_by_layer_equals_the_scan_over_layers(options, prompt):
    model = lcr.make_model({"vocab_size": 31, "d_model": 16, **options}, rngs=nnx.Rngs(0))
    tokens, states = lcr.generate(model, prompt, max_new_tokens=3)
    logits, expected = run(model, prompt, model.init_states(2, 12))
    for i in range(3):
        np.testing.assert_array_equal(tokens[:, i], np.argmax(logits[:, -1], -1))
        logits, expected = run(model, tokens[:, i : i + 1], expected)
    assert_close(states, expected, "float32")


def test_goes_on_from_a_state(model, prompt):
    whole, _ = lcr.generate(model, prompt, max_new_tokens=4)
    _, states = run(model, prompt[:, :5], model.init_states(2, 16))
    first, states = lcr.generate(model, prompt[:, 5:], max_new_tokens=1, states=states)
    np.testing.assert_array_equal(first, whole[:, :1])
    # The states have read the new token too: the next call begins with the one after it.
    assert int(states[0].position[0, 0]) == 10
    rest, _ = lcr.generate(model, whole[:, 1:2], max_new_tokens=2, states=states)
    np.testing.assert_array_equal(rest, whole[:, 2:])


def test_rows_of_unequal_length_are_padded_anywhere(model, prompt):
    generated, _ = lcr.generate(model, prompt[:, :6], max_new_tokens=4)
    expected = by_hand(model, prompt, 4)
    for at in (slice(0, 6), slice(3, 9)):
        padded, segment_ids = np.array(prompt), np.ones((2, 9), np.int32)
        padded[0], segment_ids[0] = 7, 0
        padded[0, at], segment_ids[0, at] = prompt[0, :6], 1
        mixed, _ = lcr.generate(model, jnp.asarray(padded), max_new_tokens=4, segment_ids=jnp.asarray(segment_ids))
        np.testing.assert_array_equal(mixed[0], generated[0])
        np.testing.assert_array_equal(mixed[1], expected[1])


def test_sampling_follows_its_key_and_temperature(model, prompt):
    def sample(seed, temperature):
        return lcr.generate(model, prompt, max_new_tokens=4, temperature=temperature, key=jax.random.key(seed))[0]

    np.testing.assert_array_equal(sample(1, 1.0), sample(1, 1.0))
    assert (np.asarray(sample(1, 1.0)) != np.asarray(sample(2, 1.0))).any()
    np.testing.assert_array_equal(sample(1, 1e-6), lcr.generate(model, prompt, max_new_tokens=4)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: expected 0"),
        ({"temperature": 0.5}, r"sampling needs key=jax.random.key\(seed\)"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a whole number above 0"),
        ({"segment_ids": jnp.zeros((2, 9), jnp.int32)}, "every row needs at least one token"),
    ],
)
def test_errors(model, prompt, changes, message):
    with pytest.raises(ValueError, match=message):
        lcr.generate(model, prompt, **{"max_new_tokens": 2, **changes})


def test_layers_are_taken_apart_without_a_copy():
    model = lcr.make_model({"vocab_size": 31, "d_model": 64, "mixers": ("gqa",) * 2, "d_ff": 64}, rngs=nnx.Rngs(0))
    stacked = nnx.state(model.groups)
    layers = layers_in_place(model)
    assert [jax.tree.structure(layer) for layer in layers] == [jax.tree.structure(stacked)] * 2
    for i, layer in enumerate(layers):
        for whole, part in zip(jax.tree.leaves(stacked), jax.tree.leaves(layer), strict=True):
            assert part.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + i * part.nbytes
            np.testing.assert_array_equal(part, whole[i])


def test_layers_of_a_traced_model_are_taken_apart_in_its_program(model, prompt):
    def two(model):
        assert layers_in_place(model) is None
        return lcr.generate(model, prompt, max_new_tokens=2)[0]

    np.testing.assert_array_equal(nnx.jit(two)(model), lcr.generate(model, prompt, max_new_tokens=2)[0])

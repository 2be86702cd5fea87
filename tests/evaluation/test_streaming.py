import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stand_ins import Hashing, hashed_answer

import lcr
from lcr.evaluation.streaming import NOT_FINITE, Streamer, greedy


def make_prompts(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng([batch, length]).integers(1, 16, (batch, length)).astype(np.uint8)


@pytest.mark.parametrize("piece", [1, 3, 8, 64])
def test_pieces_of_any_size_read_every_token_once_and_in_order(piece):
    streamer = Streamer(Hashing(), piece)
    for length in (1, 8, 37, 64):
        prompts = make_prompts(2, length)
        reply = streamer.answer(prompts, 5)
        assert reply.tokens.tolist() == [hashed_answer(prompt, 5) for prompt in prompts]
        assert reply.seconds > 0


def test_three_programs_serve_every_length():
    streamer = Streamer(Hashing(), 8)
    for length in (5, 8, 21, 64, 100):
        streamer.answer(make_prompts(2, length), 5)
    assert len(streamer._programs) == 3


def test_pieces_reported_add_up_to_the_prompt():
    read = []
    Streamer(Hashing(), 8).answer(make_prompts(2, 37), 5, read.append)
    assert sum(read) == 37
    assert read == [5, 8, 8, 8, 8]


def test_streaming_answers_as_generate_does():
    config = lcr.ModelConfig(vocab_size=16, d_model=16, mixers=("gqa",), d_ff=0)
    graph, parameters = nnx.split(nnx.eval_shape(lambda: lcr.make_model(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)  # drawing them on the device would compile for seconds
    model = nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), parameters))
    prompts = make_prompts(3, 37)
    expected, states = lcr.generate(model, jnp.asarray(prompts, jnp.int32), max_new_tokens=4)
    streamer = Streamer(model, 16)
    answer = streamer.answer(prompts, 4).tokens.tolist()
    assert answer == np.asarray(expected).tolist() and len({tuple(row) for row in answer}) > 1
    assert streamer.state_bytes(41) == lcr.state_bytes(states) // 3
    assert streamer.state_bytes(1041) > 10 * streamer.state_bytes(41), "a cache grows with its capacity"


def test_logits_that_are_not_finite_are_never_a_right_answer():
    logits = jnp.zeros((3, 2, 4)).at[0, 1, 2].set(5.0).at[1, 1, 0].set(jnp.nan).at[2, 1, 3].set(jnp.inf)
    assert greedy(logits).tolist() == [2, NOT_FINITE, NOT_FINITE]
    assert NOT_FINITE < 0


def test_the_state_is_donated():
    streamer = Streamer(Hashing(), 8)
    first, _, _ = streamer.programs(2, 8, 5)
    states = Hashing().init_states(2, 13)
    tokens = np.ones((2, 8), np.int32)
    jax.block_until_ready(first(streamer._parameters, states, tokens, tokens))
    assert states["hash"].is_deleted()


@pytest.mark.parametrize(
    "piece, length, answer_length, named", [(0, 8, 5, "piece=0"), (8, 0, 5, "length=0"), (8, 8, 0, "answer_length=0")]
)
def test_nothing_to_read_or_answer_is_refused(piece, length, answer_length, named):
    with pytest.raises(ValueError, match=named):
        Streamer(Hashing(), piece).answer(make_prompts(1, length), answer_length)

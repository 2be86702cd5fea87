"""A mixer of one's own takes one class and one entry in `MIXERS`; all else knows it then. (With parameters: a class for
its options and a module.)"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx, struct
from lcr.checks import check_call
from lcr.layers.segments import forget, read_segments
from lcr.training.metrics import read_rows
from lcr.training.trainer import train
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.tolerances import assert_close

from tests.training.toy import toy_config


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    """decay: of the average, a step."""

    decay: float = 0.9
    dtype: Any = jnp.float32

    def make(self, d_model, *, rngs):
        return Average(self, d_model, rngs=rngs)


@struct.dataclass
class AverageState:
    average: Any  # float32[B, D]
    segment_id: Any  # int32[B]
    position: Any  # int32[B]


class Average(nnx.Module):
    """y_t = m_t W, with the moving average m_t = decay m_{t-1} + (1 - decay) x_t."""

    def __init__(self, config, d_model, *, rngs):
        self.config, self.d_model = config, d_model
        self.out = nnx.Linear(d_model, d_model, use_bias=False, dtype=config.dtype, rngs=rngs)

    def init_state(self, batch, capacity=0, dtype=None):
        zero = jnp.zeros((batch,), jnp.int32)
        return AverageState(average=jnp.zeros((batch, self.d_model)), segment_id=zero, position=zero)

    def __call__(self, x, state=None, segment_ids=None):
        check_call(self, x, state, segment_ids)
        state = self.init_state(x.shape[0]) if state is None else state
        segments = read_segments(segment_ids, state.segment_id, state.position, x.shape[1])
        rate = -float(np.log(self.config.decay))
        one = jnp.ones((*x.shape[:2], 1))
        m, average = selective_scan(
            x * (1 - self.config.decay) / rate, jnp.full(x.shape, rate), -jnp.ones((self.d_model, 1)), one, one,
            initial_state=forget(state.average, segments.continues)[..., None], segment_ids=segments.ids,
        )  # fmt: skip
        return self.out(m), AverageState(average[..., 0], segments.segment_id, segments.position)


@pytest.fixture(autouse=True)
def average(monkeypatch):
    monkeypatch.setitem(lcr.MIXERS, "average", AverageConfig)


def test_it_is_made_by_name_and_its_options_are_checked():
    mixer = lcr.make_mixer("average", 8, rngs=nnx.Rngs(0), decay=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    m, expected = np.zeros((2, 8)), []
    for t in range(6):
        m = 0.5 * m + 0.5 * np.asarray(x[:, t])
        expected.append(m @ np.asarray(mixer.out.kernel[...]))
    assert_close(mixer(x)[0], np.stack(expected, axis=1), "float32")
    with pytest.raises(ValueError, match="unknown option of mixer 'average': 'decai'. Did you mean 'decay'"):
        lcr.make_mixer("average", 8, rngs=nnx.Rngs(0), decai=0.5)


def test_a_decoder_of_it_decodes_what_it_would_read():
    config = {"vocab_size": 17, "d_model": 8, "mixers": ("average",) * 2, "mixer_options": {"average": {"decay": 0.7}}}
    model = lcr.make_model(config, rngs=nnx.Rngs(0))
    prompt = jnp.array([[3, 1, 4, 1, 5]], jnp.int32)
    new, _ = lcr.generate(model, prompt, max_new_tokens=3)
    whole = jnp.concatenate([prompt, new], axis=1)
    likeliest = jnp.argmax(jax.jit(lambda tokens: model(tokens)[0])(whole), axis=-1)
    np.testing.assert_array_equal(new[0], likeliest[0, 4:-1])


def test_the_trainer_trains_it(tmp_path):
    config = toy_config(**{"model.mixers": ("average",), "training.steps": 3, "training.log_every": 1})
    train(config, tmp_path, progress=False)
    losses = [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row]
    assert len(losses) >= 3 and np.isfinite(losses).all()


@dataclasses.dataclass(frozen=True)
class Shift:
    """y_t = x_{t-1}: no parameters, so options and mixer are one class."""

    dtype: Any = jnp.float32
    d_model: int | None = None

    def make(self, d_model, *, rngs):
        return dataclasses.replace(self, d_model=d_model)

    def init_state(self, batch, capacity=0, dtype=None):
        zero = jnp.zeros((batch,), jnp.int32)
        return {"last": jnp.zeros((batch, self.d_model)), "segment_id": zero, "position": zero}

    def __call__(self, x, state=None, segment_ids=None):
        check_call(self, x, state, segment_ids)
        state = self.init_state(x.shape[0]) if state is None else state
        segments = read_segments(segment_ids, state["segment_id"], state["position"], x.shape[1])
        y, last = shift(x, state["last"], segments)
        return y, {"last": last, "segment_id": segments.segment_id, "position": segments.position}


def shift(x, last, segments):
    y = jnp.concatenate([last[:, None], x[:, :-1]], axis=1)
    return jnp.where((segments.positions == 0)[..., None], 0.0, y), x[:, -1]


def test_one_class_and_one_entry(monkeypatch):
    monkeypatch.setitem(lcr.MIXERS, "shift", Shift)
    config = {"vocab_size": 17, "d_model": 16, "mixers": ("shift", "gqa", "shift", "gqa")}
    model = lcr.make_model(config, rngs=nnx.Rngs(0))
    tokens = jnp.array([[3, 1, 4, 1, 5, 9]], jnp.int32)
    whole, _ = model(tokens)
    states = model.init_states(1, 6)
    first, states = model(tokens[:, :4], states)
    second, _ = model(tokens[:, 4:], states)
    assert_close(jnp.concatenate([first, second], axis=1), whole, "float32")
    with pytest.raises(ValueError, match="state"):
        lcr.make_mixer("shift", 8, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 8)), {"last": jnp.ones((1, 8))})

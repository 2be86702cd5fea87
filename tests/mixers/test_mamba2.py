"""Mamba-2: its recurrence equal to a float64 one; its sizes and its errors. (Equal to a whole model of transformers:
tests/pretrained.)"""

import math
import pathlib

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.mixers.mamba2 import Mamba2Config, state_space
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(("case", "dtype"), [("full", "float32"), ("init_limit", "float32"), ("init_limit", "float64")])
def test_recurrence(case, dtype):
    """Three heads a group, once with step sizes held within limits and an initial state: outputs, state, every
    gradient."""
    with jax.enable_x64(dtype == "float64"):
        golden = {name.split("/")[1]: x for name, x in np.load(GOLDEN / "ssd.npz").items() if name.startswith(case)}
        names = ("x", "dt", "dt_bias", "A", "B", "C", "D", *(["h0"] if case == "init_limit" else []))
        arguments = [jnp.asarray(golden[name], dtype) for name in names]
        limit = (0.1, 0.6) if case == "init_limit" else (0.0, np.inf)

        def run(*arguments):
            inputs, state = arguments[:7], None if case == "full" else jnp.swapaxes(arguments[7], 2, 3)
            y, after = state_space(*inputs, dt_limit=limit, initial_state=state, implementation="chunked")
            return y, jnp.swapaxes(after, 2, 3)

        @jax.jit
        def with_gradients(arguments, cotangents):
            outputs, pullback = jax.vjp(run, *arguments)
            return outputs, pullback(cotangents)

        cotangents = tuple(jnp.asarray(golden[name], dtype) for name in ("ct_y", "ct_last_state"))
        outputs, gradients = with_gradients(arguments, cotangents)
        kind = {"float32": "float32 oracle", "float64": "float64"}[dtype]
        assert_close(outputs, (golden["y"], golden["last_state"]), kind)
        assert_close(dict(zip(names, gradients, strict=True)), {name: golden[f"d_{name}"] for name in names}, kind)


def test_the_norm_before_the_gate():
    """A gate of one value only scales what the norm gives; after the norm it does, before it drops out."""
    x = np.random.default_rng(1).standard_normal((1, 5, 32), np.float32)
    x[..., 0] = 1
    run = nnx.jit(lambda mixer, x: mixer(x)[0])
    outputs = {}
    for before in (False, True):
        mixer = lcr.make_mixer("mamba2", 32, rngs=nnx.Rngs(0), norm_before_gate=before, norm_eps=1e-12)
        inner = mixer.inner
        outputs[before] = []
        for size in (1.0, 2.0):  # z = size for all channels, from a constant first channel of x
            kernel = np.array(mixer.in_proj.kernel[...])
            kernel[:, :inner], kernel[0, :inner], kernel[0, inner:] = 0, size, 0
            mixer.in_proj.kernel.set_value(jnp.asarray(kernel))
            outputs[before].append(np.asarray(run(mixer, x)))
    gates = [size / (1 + math.exp(-size)) for size in (1.0, 2.0)]
    assert_close(outputs[False][1], outputs[False][0], "float32")
    assert_close(outputs[True][1] / gates[1], outputs[True][0] / gates[0], "float32")
    assert_close(outputs[True][0] / gates[0], outputs[False][0], "float32")


@pytest.mark.parametrize(
    ("d_model", "width"), [(16, 16), (32, 16), (48, 16), (64, 32), (80, 32), (128, 64), (1040, 32)]
)
def test_default_heads_suit_any_width(d_model, width):
    mixer = nnx.eval_shape(lambda: Mamba2Config().make(d_model, rngs=nnx.Rngs(0)))
    assert mixer.num_heads * width == 2 * d_model


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_state_bytes(dtype, itemsize):
    """(inner + 2 G N) (conv_width - 1) itemsize + 4 inner N + 8 for each sequence, whatever the capacity."""
    mixer = lcr.make_mixer("mamba2", 32, rngs=nnx.Rngs(0), state_size=5, num_groups=2, expand=3, dtype=dtype)
    inner = 3 * 32
    expected = 2 * ((inner + 2 * 2 * 5) * 3 * itemsize + 4 * inner * 5 + 8)
    assert lcr.state_bytes(mixer.init_state(2, 10)) == lcr.state_bytes(mixer.init_state(2, 10**6)) == expected


def test_first_steps_and_decays_are_those_asked_for():
    options = {"head_width": 2, "dt_min": 1e-3, "dt_max": 1e-2, "decay_range": (2.0, 3.0)}
    mixer = lcr.make_mixer("mamba2", 64, rngs=nnx.Rngs(0), **options)
    steps, decays = np.asarray(jax.nn.softplus(mixer.dt_bias[...])), np.exp(mixer.A_log[...])
    assert 0.99e-3 <= steps.min() < 2e-3 and 7e-3 < steps.max() <= 1.01e-2
    assert 2 <= decays.min() < 2.2 and 2.8 < decays.max() <= 3


def test_step_sizes_are_held_within_their_limits():
    """Where the limits leave them no room, it does not matter what the step sizes would have been."""
    mixer = lcr.make_mixer("mamba2", 16, rngs=nnx.Rngs(0), state_size=4, dt_limit=[0.3, 0.3000001])
    graph, parameters = nnx.split(mixer)
    run = jax.jit(lambda parameters, x: nnx.merge(graph, parameters)(x)[0])
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    y = run(parameters, x)
    mixer.dt_bias[...] = mixer.dt_bias[...] + 5.0
    assert_close(run(nnx.split(mixer)[1], x), y, "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_range": (1.0, float("inf"))}, r"decay_range=\(1\.0, inf\): expected two numbers .* both finite"),
        ({"dt_min": 1e-6}, r"dt_floor=0\.0001: expected at most dt_min=1e-06, which it would override"),
        ({"head_width": 24}, r"head_width=24 with an inner width of 64 .*: expected a divisor"),
        ({"num_groups": 3}, r"num_groups=3: expected a divisor of the number of heads, 4"),
        ({"state_size": 0}, "state_size=0: expected a whole number above 0"),
        ({"dt_limit": (0.5, 0.1)}, r"dt_limit=\(0\.5, 0\.1\): expected two numbers"),
        ({"decay_range": (0.0, 1.0)}, r"decay_range=\(0\.0, 1\.0\): expected two numbers"),
        ({"dt_min": 0.1, "dt_max": 0.01}, r"dt_min=0\.1: expected at most dt_max=0\.01"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("mamba2", 32, rngs=nnx.Rngs(0), **options)

"""The RG-LRU against a float64 recurrence, with gates at both extremes, and what is the mixer's own."""

import pathlib

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.mixers.rglru import rg_lru
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "rglru.npz"


def test_equals_the_float64_recurrence_with_gradients():
    golden = dict(np.load(GOLDEN))
    names = ("x", "a_param", "wi", "bi", "wa", "ba")

    def run(x, a_param, wi, bi, wa, ba):
        def gate(weight, bias):
            blocks = x.reshape(*x.shape[:2], *bias.shape)
            y = jnp.einsum("bthi,hij->bthj", blocks, weight, precision="highest") + bias[None, None]
            return jax.nn.sigmoid(y.reshape(x.shape))

        first = jnp.zeros(x.shape[:2], bool).at[:, 0].set(True)
        return rg_lru(x, gate(wa, ba), gate(wi, bi), a_param, first)

    @jax.jit
    def pull(inputs, cotangents):
        outputs, pull = jax.vjp(run, *inputs)
        return outputs, pull(cotangents)

    inputs = [jnp.asarray(golden[name]) for name in names]
    cotangents = tuple(jnp.asarray(golden[f"ct_{name}"]) for name in ("y", "last_state"))
    outputs, gradients = pull(inputs, cotangents)
    assert_close(outputs, tuple(golden[name] for name in ("y", "last_state")), "float32 oracle")
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(gradient, golden[f"d_{name}"], "float32 oracle", name)


LENGTH = 40
LAMBDA = np.array([-100.0, -40.0, -20.0, -5.0, 0.0, 5.0, 40.0, 100.0], np.float32)


def plain(u, recurrence, input_gate, Lambda, h, first):
    """The recurrence as it is written, without a quotient; gates as logits."""
    log_a = -8 * jax.nn.softplus(Lambda)[None, None] * jax.nn.sigmoid(recurrence)
    written = jnp.where(first[..., None], 1, jnp.sqrt(-jnp.expm1(2 * log_a)))
    inputs = (jnp.exp(log_a), written * jax.nn.sigmoid(input_gate) * u)
    h, y = jax.lax.scan(
        lambda h, token: (token[0] * h + token[1],) * 2, h, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), inputs)
    )
    return y.swapaxes(0, 1), h


def through_the_scan(u, recurrence, input_gate, Lambda, h, first):
    gates = jax.nn.sigmoid(recurrence), jax.nn.sigmoid(input_gate)
    return rg_lru(u, *gates, Lambda, first, initial_state=h)


def test_gates_at_both_extremes_cost_no_accuracy():
    """Decays from 1 (to the last bit of a float64) down to 0, row by row: shut gates, open ones, all mixed."""
    rng = np.random.default_rng(0)
    shape = (4, LENGTH, len(LAMBDA))
    recurrence = np.stack([np.full(shape[1:], -80), np.full(shape[1:], 80), rng.uniform(-80, 80, shape[1:]),
                           rng.uniform(-8, 2, shape[1:])])  # fmt: skip
    arguments = [rng.standard_normal(shape), recurrence, 5 * rng.standard_normal(shape), LAMBDA]
    first = np.zeros(shape[:2], bool)
    first[2, 0] = True
    start = rng.standard_normal((4, len(LAMBDA)))
    cotangents = rng.standard_normal(shape), rng.standard_normal(start.shape)

    def run(form, dtype):
        def forgetting(u, recurrence, input_gate, Lambda, h):
            h = jnp.where(jnp.asarray(first)[:, :1], 0, h)
            return form(u, recurrence, input_gate, Lambda, h, jnp.asarray(first))

        @jax.jit
        def pull(arguments, cotangents):
            outputs, pull = jax.vjp(forgetting, *arguments)
            return outputs, pull(cotangents)

        given = [*arguments, start], cotangents
        return jax.device_get(pull(*jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(np.float32), dtype), given)))

    with jax.enable_x64(True):
        expected, expected_gradients = run(plain, jnp.float64)
    outputs, gradients = run(through_the_scan, jnp.float32)
    assert_close(outputs, expected, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


def build(**options):
    return lcr.make_mixer("rglru", 32, rngs=nnx.Rngs(0), **options)


def test_state_bytes():
    state = build(width=48, dtype=jnp.bfloat16).init_state(2, 10)
    assert lcr.state_bytes(state) == 2 * (48 * 3 * 2 + 4 * 48 + 8)


def test_first_decays_are_those_asked_for():
    decay = np.exp(-8 * np.asarray(jax.nn.softplus(build(decay_min=0.5, decay_max=0.9).Lambda[...])))
    assert 0.5 <= decay.min() < 0.6 and 0.8 < decay.max() <= 0.9 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide the width 32"),
        ({"width": -1}, "width=-1: expected a whole number above 0"),
        ({"decay_max": 1.0}, r"decay_max=1\.0: expected decay_min <= decay_max < 1"),
        ({"implementation": "chunkd"}, "Did you mean 'chunked'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)

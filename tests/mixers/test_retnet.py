import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lcr.layers.rope import rotate
from lcr.mixers.interface import state_bytes
from lcr.mixers.retnet import RetNetConfig, log_decays, retention_frequencies
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WIDTH = 24


@functools.cache
def build(implementation=None, **options):
    config = RetNetConfig(**({"num_heads": 3, "value_factor": 1.5} | options), implementation=implementation)
    with jax.ensure_compile_time_eval():  # may be called first while a form is being traced
        return nnx.split(config.make(WIDTH, rngs=nnx.Rngs(0)))


def call(implementation, parameters, x, state=None, ids=None):
    return nnx.merge(build(implementation)[0], parameters)(x, state, ids)


def activations(length, batch=2):
    return jnp.asarray(np.random.default_rng(1).standard_normal((batch, length, WIDTH), np.float32))


def with_gradients(function):
    """Outputs and gradients (parameters, x, retention before) of a form `(parameters, x, retention) -> outputs`."""

    def run(*arguments):
        outputs, pullback = jax.vjp(function, *arguments)
        weights = jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape), outputs)
        return outputs, pullback(weights)

    return jax.jit(run)


def parallel_retention(parameters, x, retention):
    """The parallel form (equation 5) with the row factors of the authors' code, and the state after the last token."""
    p, (batch, length, _), heads = parameters, x.shape, 3
    log_decay = jnp.asarray(log_decays(heads), jnp.float32)[:, None, None]
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1))

    def split(name):
        return (x @ p[name]["kernel"][...]).reshape(batch, length, heads, -1)

    frequencies = retention_frequencies(WIDTH // heads)
    q, k = (rotate(split(n), positions, frequencies, interleaved=True) for n in ("q_proj", "k_proj"))
    v, gate = split("v_proj"), split("gate_proj")
    steps = jnp.arange(length, dtype=jnp.float32)
    mask = jnp.tril(jnp.exp(log_decay * jnp.maximum(steps[:, None] - steps[None], 0.0)[None]))
    scale = jnp.sqrt(mask.sum(-1, keepdims=True))
    scores = jnp.einsum("bihk,bjhk->bhij", q, k) * (WIDTH // heads) ** -0.5 * (mask / scale)[None]
    rows = jax.lax.stop_gradient(jnp.maximum(jnp.abs(scores.sum(-1, keepdims=True)), 1.0))
    before = jnp.einsum("bihk,bhkv->bhiv", q, retention) * (WIDTH // heads) ** -0.5
    before = before * (jnp.exp(log_decay * (1 + steps)[None, :, None]) / scale)[None]
    o = (jnp.einsum("bhij,bjhv->bhiv", scores, v) + before) / rows
    # The row factors drop out in the norm, but for what they make of its epsilon.
    o = o * jax.lax.rsqrt(jnp.mean(o**2, -1, keepdims=True) + 1e-6 / (scale[None] * rows) ** 2)
    y = (jnp.moveaxis(o, 1, 2) * nnx.silu(gate)).reshape(batch, length, -1) @ p["out_proj"]["kernel"][...]
    state = jnp.exp(log_decay * length)[None] * retention + jnp.einsum("hj,bjhk,bjhv->bhkv", mask[:, -1], k, v)
    return y, state


def form(implementation):
    def run(parameters, x, retention):
        mixer = nnx.merge(build(implementation)[0], parameters)
        y, state = mixer(x, mixer.init_state(x.shape[0]).replace(retention=retention))
        return y, state.retention

    return run


def token_by_token(parameters, x, retention):
    """The recurrent form: one call for each token, as in decoding."""
    state = nnx.merge(build()[0], parameters).init_state(x.shape[0]).replace(retention=retention)

    def one(state, token):
        y, state = call(None, parameters, token[:, None], state)
        return state, y[:, 0]

    state, y = jax.lax.scan(one, state, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y, 0, 1), state.retention


@pytest.mark.parametrize("other", [form("chunked"), token_by_token], ids=["chunkwise", "recurrent"])
def test_forms_agree(other):
    """Outputs, states and gradients, those through the state before and after included; chunks of 64 + 64 + 2."""
    arguments = (build()[1], activations(130), jax.random.normal(jax.random.key(2), (2, 3, 8, 12)))
    expected, expected_gradients = with_gradients(parallel_retention)(*arguments)
    outputs, gradients = with_gradients(other)(*arguments)
    assert_close(outputs, expected, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


def test_positions_far_out():
    """Retention sees distances only: a document at position 1,000,000 gives what it gives at 0."""
    mixer = nnx.merge(*build())
    run = jax.jit(lambda state: mixer(activations(20), state))
    near = mixer.init_state(2)
    y, state = run(near.replace(position=jnp.full((2,), 1_000_000, jnp.int32)))
    assert_close(y, run(near)[0], "float32")
    assert state.position.tolist() == [1_000_020] * 2


def test_torchscale():
    """The authors' code: its parallel, chunkwise and recurrent outputs, its last state, and its gradients."""
    golden = {key: jnp.asarray(value) for key, value in np.load(GOLDEN / "retnet_torchscale.npz").items()}
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": "g", "out_proj": "out"}
    graph, parameters = build("chunked")
    parameters = jax.tree.map(lambda x: x, parameters)
    for ours, theirs in names.items():
        parameters[ours]["kernel"].set_value(golden[f"w_{theirs}_proj.weight"].T)

    def run(parameters, x):
        y, state = nnx.merge(graph, parameters)(x)
        return y, state.retention

    @jax.jit
    def with_gradients(parameters, x, cotangent):
        (y, retention), pullback = jax.vjp(run, parameters, x)
        return y, retention, pullback((cotangent, jnp.zeros_like(retention)))

    y, retention, (gradients, dx) = with_gradients(parameters, golden["x"], golden["ct"])
    for form in ("parallel", "chunkwise", "recurrent"):
        assert_close(y, golden[f"y_{form}"], "float32 oracle")
    # Its state holds K^-0.5 S / sqrt(1 + gamma + gamma^2 + ...), transposed.
    scaled = retention * 8**-0.5 * (golden["rec_scale"] ** -0.5)[None, :, None, None]
    assert_close(jnp.swapaxes(scaled, 2, 3), golden["rec_prev_key_value"], "float32 oracle")
    assert_close(dx, golden["d_x"], "float32 oracle")
    for ours, theirs in names.items():
        assert_close(gradients[ours]["kernel"][...], golden[f"d_{theirs}_proj.weight"].T, "float32 oracle")


@pytest.mark.parametrize(
    ("d_model", "heads"), [(16, 1), (32, 2), (48, 3), (64, 4), (80, 5), (128, 4), (256, 4), (512, 8), (1040, 65)]
)
def test_default_heads_suit_any_width(d_model, heads):
    mixer = nnx.eval_shape(lambda: RetNetConfig().make(d_model, rngs=nnx.Rngs(0)))
    assert (mixer.num_heads, mixer.key_width, mixer.value_width) == (heads, d_model // heads, 2 * d_model // heads)


def test_state_bytes():
    """4 value_factor d_model^2 / H + 8 for each sequence, whatever the capacity."""
    mixer = RetNetConfig(num_heads=4).make(64, rngs=nnx.Rngs(0))
    expected = 3 * (4 * 2 * 64**2 // 4 + 8)
    assert state_bytes(mixer.init_state(3, 10)) == state_bytes(mixer.init_state(3, 10**6)) == expected


def test_decays():
    assert_close(np.exp(log_decays(3)), np.array([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]), "float64")
    assert_close(log_decays(1, (60.0,)), np.array([-(2.0**-60)]), "exact")  # 1 - 2^-60 itself rounds to 1
    assert (log_decays(65) < 0).all()
    assert_close(np.exp(log_decays(2, (3.0, 10.0))), np.array([1 - 1 / 8, 1 - 1 / 1024]), "float64")
    mixer = RetNetConfig(num_heads=2, decay_exponents=(1.0, 2.0)).make(16, rngs=nnx.Rngs(0))
    run = jax.jit(lambda x, state: mixer(x, state)[1])
    first = run(jnp.ones((1, 1, 16)), mixer.init_state(1))
    second = run(jnp.zeros((1, 1, 16)), first)  # writes nothing
    assert_close(second.retention, first.retention * jnp.asarray([0.5, 0.75])[None, :, None, None], "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, r"num_heads=5 with d_model=24: .* can be 1, 2, 3, 4, 6, 12"),
        ({"num_heads": 8}, r"num_heads=8 with d_model=24: expected heads of an even width"),
        ({"num_heads": 3, "value_factor": 1.75, "d_model": 16 * 3 + 4}, "num_heads=3 with d_model=52"),
        ({"num_heads": 4, "value_factor": 1.25}, r"value_factor=1.25 with d_model=24: the values' width 30.0"),
        ({"num_heads": 3, "decay_exponents": (5.0,)}, "expected one for each of num_heads=3 heads"),
        ({"decay_exponents": (5.0, -1.0)}, "decay_exponents=-1.0"),
        ({"num_heads": 0}, "num_heads=0: expected a whole number above 0"),
        ({"norm_eps": -1e-6}, "norm_eps"),
    ],
)
def test_bad_options(options, message):
    d_model = options.pop("d_model", WIDTH)
    with pytest.raises(ValueError, match=message):
        RetNetConfig(**options).make(d_model, rngs=nnx.Rngs(0))


def test_initial_scale():
    """Xavier uniform with the gains of the authors: 2^-2.5 for q, k, v and the gate, 2^-1 for the output."""
    mixer = RetNetConfig(num_heads=4).make(64, rngs=nnx.Rngs(0))
    for linear, gain in ((mixer.q_proj, 2**-2.5), (mixer.gate_proj, 2**-2.5), (mixer.out_proj, 0.5)):
        inputs, outputs = linear.kernel.shape
        bound = gain * math.sqrt(6 / (inputs + outputs))
        largest = float(jnp.abs(linear.kernel[...]).max())
        assert 0.98 * bound < largest <= bound

"""RWKV-7: equal to its author's package, states included; the value residual. (Equal to flash-linear-attention:
tests/pretrained.)"""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.mixers.rwkv7 import RWKV7, RWKV7Config
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WIDTH, LENGTH, BATCH = 32, 24, 2
# Two documents and padding in row 0.
IDS = jnp.array([[0, 0, 3, 3, 3, 3, 0, 3, 3, 3, 3, 5, 5, 5, 5, 5, 5, 0, 5, 5, 5, 5, 0, 0], [4] * LENGTH], jnp.int32)
SHIFTS = "rwkvag"
PROJECTIONS = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
NETS = {"decay": "w", "rate": "a", "value": "v", "gate": "g"}


def set_all(mixer, weights):
    for path, value in weights.items():
        *modules, name = path.split(".")
        leaf = getattr(functools.reduce(getattr, modules, mixer), name)
        assert leaf.shape == value.shape, path
        leaf.set_value(jnp.asarray(value))


def author_layer(golden, layer):
    """A mixer with the weights of one layer of the package's model, in which only Linear's are `[out, in]`.

    The first layer has no value residual."""
    own = {key.removeprefix(f"blocks.{layer}.att."): value for key, value in golden.items()}
    weights = {f"{ours}.kernel": own[theirs].T for ours, theirs in PROJECTIONS.items()}
    weights["mix"] = np.concatenate([own[f"x_{c}"][0] for c in SHIFTS])
    for net, c in NETS.items():
        if f"{c}1" in own:
            weights |= {f"{net}.down": own[f"{c}1"], f"{net}.up": own[f"{c}2"]}
            if net != "gate":
                weights[f"{net}.bias"] = own[f"{c}0"][0, 0]
    for name in ("k_k", "k_a", "r_k"):
        weights[name] = own[name].reshape(-1)
    weights |= {"scale": own["ln_x"], "bias": own["ln_x.bias"]}
    mixer = RWKV7Config(num_heads=4, decay_rank=10, rate_rank=8, value_rank=6, gate_rank=14).make(64, rngs=nnx.Rngs(0))
    set_all(mixer, weights)
    return mixer


def test_the_authors_model():
    """Logits of a two-layer model and its states, each time mixing in pieces through its state."""
    golden = dict(np.load(GOLDEN / "rwkv7_model.npz"))

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        normed = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + np.float32(1e-5))
        return normed * golden[name] + golden[f"{name}.bias"]

    def channel_mixing(x, prefix):
        previous = np.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        k = x + (previous - x) * golden[f"{prefix}.x_k"].reshape(1, 1, -1)
        return np.square(np.maximum(k @ golden[f"{prefix}.key"].T, 0)) @ golden[f"{prefix}.value"].T

    layers = [author_layer(golden, i) for i in range(2)]
    run = jax.jit(lambda parameters, *call: nnx.merge(nnx.graphdef(layers[0]), parameters)(*call))
    x = norm(golden["embedded"][None], "blocks.0.ln0")
    first_values = None
    for i, layer in enumerate(layers):
        h = norm(x, f"blocks.{i}.ln1")
        first_values = np.asarray(layer.values(jnp.asarray(h))) if i == 0 else first_values
        state, outputs = layer.init_state(1), []
        for part, values in zip(*(np.split(array, [3, 35], axis=1) for array in (h, first_values)), strict=True):
            y, state = run(nnx.state(layer), part, state, None, values)
            outputs.append(y)
        x = x + np.concatenate(outputs, axis=1)
        assert_close(state.shift[0], golden[f"state_row0/{3 * i}"], "float32 oracle")
        assert_close(state.memory[0].swapaxes(1, 2), golden[f"state_row0/{3 * i + 1}"], "float32 oracle")
        x = x + channel_mixing(norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.ffn")
    logits = norm(x, "ln_out") @ golden["head"].T
    assert_close(logits[0], golden["logits"], "float32 oracle")


def test_a_later_layer_learns_from_the_values_of_the_first():
    """Of a value in the second layer's output comes a gradient for the first layer's value projection alone; and the
    first layer without `first_values` gives exactly what it gives when handed its own."""
    mixer = lcr.make_mixer("rwkv7", WIDTH, rngs=nnx.Rngs(0), implementation="reference")
    graph, parameters = nnx.split(mixer)
    x, other = jnp.asarray(np.random.default_rng(2).standard_normal((2, BATCH, LENGTH, WIDTH), np.float32))

    @jax.jit
    def run(parameters):
        first = nnx.merge(graph, parameters)
        values = first.values(x, None, IDS)
        given, own = first(x, None, IDS, values)[0], first(x, None, IDS)[0]
        _, pull_back = jax.vjp(lambda p: nnx.merge(graph, p)(x, None, IDS)[0], parameters)

        def through_the_second(p):
            y, _ = mixer(other, None, IDS, nnx.merge(graph, p).values(x, None, IDS))
            return y

        return given, own, pull_back(own)[0], jax.vjp(through_the_second, parameters)[1](other)[0]

    given, own, of_own, of_second = jax.device_get(run(parameters))
    assert_close(given, own, "exact")
    assert not np.abs(of_own["value"]["up"][...]).max() > 1e-4  # v_first is this layer's own v': nothing to mix
    leaves = jax.tree_util.tree_leaves_with_path(of_second)
    reached = {jax.tree_util.keystr(path) for path, leaf in leaves if leaf.any()}
    assert reached == {"['mix'].value", "['v_proj']['kernel'].value"}, reached


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_state_bytes(dtype, itemsize):
    """4 d_model^2 / H + d_model itemsize + 8 for each sequence."""
    mixer = lcr.make_mixer("rwkv7", 32, rngs=nnx.Rngs(0), num_heads=4, dtype=dtype)
    assert lcr.state_bytes(mixer.init_state(3, 10)) == 3 * (4 * 32**2 // 4 + 32 * itemsize + 8)


@pytest.mark.parametrize(("d_model", "heads"), [(16, 1), (48, 3), (80, 5), (256, 4), (1040, 65)])
def test_default_sizes_suit_any_width(d_model, heads):
    assert RWKV7Config().head_sizes(d_model) == (heads, d_model // heads)


def test_default_ranks_are_the_authors():
    assert list(RWKV7Config().ranks(768).values()) == [64, 64, 32, 128]
    assert list(RWKV7Config(decay_rank=5).ranks(64).values()) == [5, 32, 32, 32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide d_model=32"),
        ({"gate_rank": 0}, "gate_rank=0: expected a whole number above 0"),
        ({"norm_eps": -1.0}, r"norm_eps=-1\.0: expected a number above 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("rwkv7", 32, rngs=nnx.Rngs(0), **options)


def test_first_values_of_other_tokens_are_refused():
    mixer = lcr.make_mixer("rwkv7", 32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"first_values of shape \(2, 3, 32\) with x of shape \(2, 4, 32\)"):
        call = inspect.unwrap(RWKV7.__call__)  # without the type checker of the tests
        call(mixer, jnp.ones((2, 4, 32)), first_values=jnp.ones((2, 3, 32)))

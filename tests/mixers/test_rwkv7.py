"""RWKV-7: equal to its author's package and to flash-linear-attention; the value residual keeps the laws."""

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
from tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WIDTH, LENGTH, BATCH = 32, 24, 2
# Two documents and padding in row 0; row 1 goes on with document 4.
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


def fla_layer(golden, layer):
    """A mixer with the weights of one layer of fla's model, `[out, in]`; its first layer has no value residual."""
    own = {key.removeprefix(f"layers.{layer}.attn."): value for key, value in golden.items()}
    weights = {f"{ours}.kernel": own[f"{ours.replace('out', 'o')}"].T for ours in PROJECTIONS}
    weights["mix"] = np.concatenate([own[f"x_{c}"][0] for c in SHIFTS])
    for net, c in NETS.items():
        if f"{c}_lora.lora.0" in own:
            weights |= {f"{net}.down": own[f"{c}_lora.lora.0"].T, f"{net}.up": own[f"{c}_lora.lora.2"].T}
            if net != "gate":
                weights[f"{net}.bias"] = own[f"{c}_lora.lora.2.bias"]
    for name in ("k_k", "k_a", "r_k"):
        weights[name] = own[name].reshape(-1)
    weights |= {"scale": own["g_norm"], "bias": own["g_norm.bias"]}
    options = {"decay_rank": 8, "rate_rank": 8, "value_rank": 6, "gate_rank": 12, "norm_eps": 16e-5}
    mixer = RWKV7Config(num_heads=4, **options).make(64, rngs=nnx.Rngs(0))
    set_all(mixer, weights)
    return mixer


AUTHOR = {
    "file": "rwkv7_model", "layer": author_layer, "first_norm": "blocks.0.ln0",
    "norms": ("blocks.{}.ln1", "blocks.{}.ln2"), "ffn": "blocks.{}.ffn", "last_norm": "ln_out",
}  # fmt: skip
FLA = {
    "file": "rwkv7_model_fla", "layer": fla_layer, "first_norm": "layers.0.pre_norm",
    "norms": ("layers.{}.attn_norm", "layers.{}.ffn_norm"), "ffn": "layers.{}.ffn", "last_norm": "norm",
}  # fmt: skip


@pytest.mark.parametrize("model", [AUTHOR, FLA], ids=["author", "flash_linear_attention"])
def test_whole_model(model):
    """Logits of a two-layer model, each time mixing in two pieces through its state; the author's states too."""
    golden = dict(np.load(GOLDEN / f"{model['file']}.npz"))

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
        return normed * golden[name][None, None] + golden[f"{name}.bias"][None, None]

    def channel_mixing(x, prefix):
        previous = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        k = x + (previous - x) * golden[f"{prefix}.x_k"].reshape(1, 1, -1)
        return jnp.square(jax.nn.relu(k @ golden[f"{prefix}.key"].T)) @ golden[f"{prefix}.value"].T

    x = norm(jnp.asarray(golden["embedded"])[None], model["first_norm"])
    first_values = None
    for layer in range(2):
        mixer = model["layer"](golden, layer)
        h = norm(x, model["norms"][0].format(layer))
        values = first_values
        if layer == 0:
            first_values = mixer.values(h)
        run = jax.jit(mixer.__call__)
        head, tail = (None, None) if values is None else (values[:, :33], values[:, 33:])
        first, state = run(h[:, :33], None, None, head)
        second, state = run(h[:, 33:], state, None, tail)
        x = x + jnp.concatenate([first, second], axis=1)
        if model is AUTHOR:
            assert_close(state.shift[0], golden[f"state_row0/{3 * layer}"], "float32 oracle")
            assert_close(state.memory[0].swapaxes(1, 2), golden[f"state_row0/{3 * layer + 1}"], "float32 oracle")
        x = x + channel_mixing(norm(x, model["norms"][1].format(layer)), model["ffn"].format(layer))
    logits = norm(x, model["last_norm"]) @ golden["head"].T
    assert_close(logits[0], golden["logits"], "float32 oracle")


@functools.cache
def layers():
    """Two layers away from their initial values, as a function of both layers' parameters."""
    with jax.ensure_compile_time_eval():
        built = [nnx.split(lcr.make_mixer("rwkv7", WIDTH, rngs=nnx.Rngs(i))) for i in range(2)]
        leaves, tree = jax.tree.flatten([parameters for _, parameters in built])
        keys = jax.random.split(jax.random.key(1), len(leaves))
        leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return built[0][0], jax.tree.unflatten(tree, leaves)


def two_layers(parameters, x, states, ids):
    """As a decoder does it: the first layer's values go to both; residual sums between them."""
    mixers = [nnx.merge(layers()[0], p) for p in parameters]
    first_values = mixers[0].values(x, states[0], ids)
    after = []
    for mixer, state in zip(mixers, states, strict=True):
        y, state = mixer(x, state, ids, first_values)
        x = x + y
        after.append(state)
    return x, after


run_two_layers = jax.jit(two_layers)


@jax.jit
def pull_back(parameters, x, states, ids, cotangents):
    return jax.vjp(functools.partial(two_layers, ids=ids), parameters, x, states)[1](cotangents)


def activations(seed=2):
    return jax.random.normal(jax.random.key(seed), (BATCH, LENGTH, WIDTH))


def empty_states():
    mixer = nnx.merge(layers()[0], layers()[1][0])
    return [mixer.init_state(BATCH), mixer.init_state(BATCH)]


def used_states():
    ids = jnp.broadcast_to(jnp.array([[3], [4]], jnp.int32), (BATCH, 8))
    return run_two_layers(layers()[1], activations(3)[:, :8], empty_states(), ids)[1]


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def cotangents(y, states, zero=False):
    def one(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        return jnp.zeros_like(leaf) if zero else jnp.cos(leaf)

    return y, jax.tree.map(one, states)


def test_split_with_a_value_residual():
    """Outputs, states and gradients through the states, in eighths and whole; every parameter of layer 1 counts."""
    parameters, x, states, weights = layers()[1], activations(), used_states(), activations(4)
    y, after = run_two_layers(parameters, x, states, IDS)
    pieces, befores, outputs = [slice(0, 8), slice(8, 16), slice(16, 24)], [], []
    cut = [IDS[:, piece] for piece in pieces]
    state = states
    for piece, own in zip(pieces, cut, strict=True):
        befores.append(state)
        out, state = run_two_layers(parameters, x[:, piece], state, own)
        outputs.append(out)
    assert_close((jnp.concatenate(outputs, axis=1), state), (y, after), "float32")

    expected = pull_back(parameters, x, states, IDS, cotangents(weights, after))
    cotangent, totals, of_x = cotangents(weights, after)[1], [], []
    for piece, own, before in list(zip(pieces, cut, befores, strict=True))[::-1]:
        found = pull_back(parameters, x[:, piece], before, own, (weights[:, piece], cotangent))
        totals.append(found[0])
        of_x.insert(0, found[1])
        cotangent = found[2]
    total = jax.tree.map(lambda *leaves: sum(leaves), *totals)
    assert_close((total, jnp.concatenate(of_x, axis=1)), expected[:2], "float32 gradient")
    assert_close(floats(cotangent), floats(expected[2]), "float32 gradient")
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected[0][1]):
        assert np.abs(leaf).max() > 0, f"{jax.tree_util.keystr(path)}: zero everywhere"
    of_first = expected[0][0]["value"]
    assert not np.abs(of_first["up"][...]).max() > 1e-4  # v_first is this layer's own v': nothing to mix


def test_packing_and_padding_with_a_value_residual():
    """Each document alone gives what it gives packed, outputs and gradients; padding gives zeros and counts nowhere."""
    parameters, x, weights = layers()[1], activations(), activations(4)
    y, after = run_two_layers(parameters, x, empty_states(), IDS)
    weights = jnp.where(IDS[..., None] != 0, weights, 0)
    only = weights.at[1].set(0)
    packed = pull_back(parameters, x, empty_states(), IDS, cotangents(only, after, zero=True))
    total, of_x = None, jnp.zeros_like(x)
    for document in (3, 5):
        at = jnp.flatnonzero(IDS[0] == document)
        end = len(at)
        own_x = activations(10).at[0, :end].set(x[0, at])
        own_ids = jnp.zeros_like(IDS).at[0, :end].set(1)
        assert_close(run_two_layers(parameters, own_x, empty_states(), own_ids)[0][0, :end], y[0, at], "float32")
        own_weights = jnp.zeros_like(x).at[0, :end].set(weights[0, at])
        found = pull_back(parameters, own_x, empty_states(), own_ids, cotangents(own_weights, after, zero=True))
        total = found[0] if total is None else jax.tree.map(jnp.add, total, found[0])
        of_x = of_x.at[0, at].set(found[1][0, :end])
    assert_close((total, of_x), packed[:2], "float32 gradient")
    padding = np.asarray(IDS) == 0
    garbage = run_two_layers(parameters, jnp.where(padding[..., None], 1e3, x), empty_states(), IDS)
    assert_close(garbage[0][~padding], y[~padding], "float32")
    assert_close(garbage[1], after, "float32")
    assert (np.asarray(garbage[0])[padding] == 1e3).all()  # the residual sum alone: both layers gave 0


def test_causality_with_a_value_residual():
    parameters, x, states, end = layers()[1], activations(), used_states(), 13
    early = jnp.arange(LENGTH)[None, :, None] < end
    y, after = run_two_layers(parameters, x, states, IDS)
    changed, _ = run_two_layers(parameters, jnp.where(early, x, 100 * activations(5)), states, IDS)
    assert_close(changed[:, :end], y[:, :end], "float32")
    weights = jnp.where(early, activations(4), 0)
    of_x = np.asarray(pull_back(parameters, x, states, IDS, cotangents(weights, after, zero=True))[1])
    assert of_x[:, :end].any() and not of_x[:, end:].any()


def test_the_first_layer_uses_its_own_values():
    """Without first_values it gives exactly what it gives when handed its own."""
    mixer = nnx.merge(layers()[0], layers()[1][0])
    x, state = activations(), used_states()[0]
    given = mixer(x, state, IDS, mixer.values(x, state, IDS))
    assert_close(mixer(x, state, IDS), given, "exact")


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

"""The decoder: states in and out, stacking, and what it refuses. (Equal to models of others: tests/pretrained.)"""

import functools

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.models.config import model_config
from lcr.models.decoder import hands_on
from ml_collections import ConfigDict
from pallas_kernels.tolerances import assert_close

SMALL = {"vocab_size": 31, "d_model": 16, "mixers": ("mamba", "mamba")}


def build(**changes):
    return lcr.make_model({**SMALL, **changes}, rngs=nnx.Rngs(0))


def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(1, SMALL["vocab_size"], (2, 12), np.int32))


@nnx.jit
def run(model, *args, **options):
    return model(*args, **options)


def test_logits_at_chosen_positions():
    model = build()
    ids = tokens()
    logits, states = run(model, ids)
    at = np.array([[0, 11], [5, 5]], np.int32)
    chosen, chosen_states = run(model, ids, logits_at=at)
    assert chosen.shape == (2, 2, 31)
    assert_close(chosen, np.take_along_axis(np.asarray(logits), at[..., None], axis=1), "float32")
    assert_close(chosen_states, states, "float32")
    nowhere = jnp.asarray(at[:, :0])
    assert jax.eval_shape(functools.partial(model, logits_at=nowhere), ids)[0].shape == (2, 0, 31)
    assert logits.dtype == jax.eval_shape(build(dtype="bfloat16"), ids)[0].dtype == jnp.float32


@pytest.mark.parametrize("mixers", [("mamba", "retnet") * 2, ("gqa", "mamba", "mamba")])
def test_pieces_through_the_states_equal_the_whole(mixers):
    model = build(mixers=mixers, tie_embeddings=False)
    ids = tokens()
    segment_ids = np.array([[1] * 5 + [0] * 2 + [2] * 5, [3] * 12], np.int32)
    states = model.init_states(2, 12)
    whole = run(model, ids, states, segment_ids)
    first, states = run(model, ids[:, :6], states, segment_ids[:, :6])
    second, states = run(model, ids[:, 6:], states, segment_ids[:, 6:])
    assert_close((np.concatenate([first, second], axis=1), states), whole, "float32")


def test_a_hybrid_is_a_mixed_tuple_stacked_by_its_repeating_group():
    model = build(mixers=("mamba", "mamba", "gqa") * 2)
    assert [mixer for mixer, _ in model.config.pattern] == ["mamba", "mamba", "gqa"]
    assert len(build(mixers=("mamba", "gqa", "mamba")).config.pattern) == 3
    states = model.init_states(4, 100)
    assert len(states) == 3
    assert all(leaf.shape[:2] == (2, 4) for leaf in jax.tree.leaves(states))
    kernels = nnx.state(model.groups.blocks[0].mixer.in_proj)["kernel"]
    assert not np.allclose(kernels[0], kernels[1]), "layers of one group start alike"


def test_rwkv7_hands_on_the_values_of_its_first_layer():
    """With channel mixing, whose state is a part of the layer's; layer by layer, by hand, and in pieces."""
    model = build(
        mixers=("rglru", "rwkv7") * 2, mixer_options={"rwkv7": {"implementation": "reference"}}, feed_forward="channel_mixing",
        feed_forward_options={"channel_mixing": {"receptance": False}},
    )  # fmt: skip
    ids = tokens()
    whole, states = run(model, ids)
    graph, parameters = nnx.split(model.groups)

    @jax.jit
    def by_hand(ids):
        x, first = model.embedding[...][ids], None
        for repetition in range(2):
            one = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[repetition], parameters))
            for block in one.blocks:
                h = block.mixer_norm(x)
                handed = {}
                if hasattr(block.mixer, "values"):
                    first = block.mixer.values(h, None, None) if first is None else first
                    handed = {"first_values": first}
                x = x + block.mixer(h, None, None, **handed)[0]
                x = x + block.mlp(block.mlp_norm(x))[0]
        return model.final_norm(x) @ model.embedding[...].T

    assert_close(by_hand(ids), whole, "float32")
    outputs, after = [], model.init_states(2, 12)
    for start, end in ((0, 6), (6, 12)):
        y, after = run(model, ids[:, start:end], after)
        outputs.append(y)
    assert_close(np.concatenate(outputs, axis=1), whole, "float32")
    assert_close(after, states, "float32")


def test_the_program_does_not_grow_with_depth():
    def program(depth):
        model = build(mixers=("mamba",) * depth)
        graph, parameters = nnx.split(model)
        return str(jax.make_jaxpr(lambda p: nnx.merge(graph, p)(tokens())[0])(parameters)).count("\n")

    assert program(12) == program(2)


def test_rematerialisation_changes_no_gradient():
    def gradient(remat):
        graph, parameters = nnx.split(build(mixers=("rglru", "rglru"), d_ff=0, remat=remat))
        return jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(tokens())[0] ** 2).sum()))(parameters)

    expected = gradient("none")
    for remat in ("full", "dots"):
        assert_close(gradient(remat), expected, "float32 gradient", remat)


def test_compute_dtype_leaves_parameters_in_float32():
    model = build(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert model.init_states(1, 8)[0].conv.dtype == jnp.bfloat16
    assert_close(run(model, tokens())[0], run(build(), tokens())[0], "bfloat16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": ("mamba", "mambo")}, "unknown mixer 'mambo'. Did you mean 'mamba'"),
        ({"mixers": "mamba"}, r"expected a tuple of names, like \('mamba',\)"),
        ({"mixers": ()}, "at least one"),
        ({"d_modle": 16}, "unknown model option 'd_modle'. Did you mean 'd_model'"),
        ({"mixer_options": {"mamba": {"state_sise": 4}}}, "'state_sise'. Did you mean 'state_size'"),
        ({"mixer_options": {"gqa": {}}}, "mixer_options: unknown mixer of this model 'gqa'"),
        ({"mixer_options": {"mamba": {"dt_min": 0.5}}}, "dt_min=0.5: expected at most dt_max=0.1"),
        ({"mixer_options": {"mamba": {"state_size": -1}}}, "state_size=-1: expected a whole number above 0"),
        ({"mixer_options": {"mamba": {"implementation": "chunkd"}}}, "implementation: .* Did you mean 'chunked'"),
        ({"mixer_options": {"mamba": {"dtype": "float17"}}}, "dtype='float17': expected a float type"),
        ({"mixer_options": {"mamba": 3}}, "mamba=3: expected its options"),
        ({"norm_epsilon": float("inf")}, "norm_epsilon=inf: expected a number above 0"),
        ({"dtype": "float16"}, "dtype: unknown value 'float16'. .*bfloat16, float32"),
        ({"remat": "all"}, "remat: unknown value 'all'"),
        ({"d_model": 0}, "d_model=0: expected a whole number above 0"),
        ({"mixers": ("mha",), "mixer_options": {"mha": {"num_heads": 3}}}, "num_heads"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_mixer_may_have_a_part_called_values():
    """What hands values on is a mixer that takes `first_values`."""
    mixer = nnx.eval_shape(lambda: lcr.make_mixer("mha", 16, rngs=nnx.Rngs(0)))
    mixer.values = mixer.value
    assert not hands_on(mixer) and hands_on(nnx.eval_shape(lambda: lcr.make_mixer("rwkv7", 16, rngs=nnx.Rngs(0))))


def test_options_in_a_config_dict():
    options = {"mha": {"num_heads": 2}}
    config = ConfigDict({"vocab_size": 9, "d_model": 16, "mixers": ("mha",), "mixer_options": options})
    assert dict(model_config(config).mixer_options["mha"]) == options["mha"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward": "moe", "d_ff": 0}, "d_ff=0, no feed-forward, beside feed_forward='moe'"),
        (
            {"feed_forward": "channel_mixing", "feed_forward_options": {"channel_mixing": {"dtype": "float32"}}},
            "unknown option of feed-forward 'channel_mixing': 'dtype'",
        ),
    ],
)
def test_feed_forwards_that_would_be_ignored_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        lcr.ModelConfig(**{"vocab_size": 9, "d_model": 16, "mixers": ("mha",)} | change)


def test_layers_of_one_mixer_may_differ():
    """What follows the colon names options of its own; alike layers are stacked all the same."""
    options = {"gqa:local": {"window": 2}, "gqa:far": {"rope_base": 1e6}}
    model = build(mixers=("gqa:local", "gqa:far") * 2, mixer_options=options)
    local, far = (block.mixer.config for block in model.groups.blocks)
    assert (local.window, far.window) == (2, None) and (local.rope_base, far.rope_base) == (1e4, 1e6)
    states = model.init_states(1, 9)
    assert [state.keys.shape[:3] for state in states] == [(2, 1, 2), (2, 1, 9)]
    with pytest.raises(ValueError, match="unknown mixer 'gqu'. Did you mean 'gqa'"):
        build(mixers=("gqu:local",))
    with pytest.raises(ValueError, match="mixer_options: unknown mixer of this model 'gqa'"):
        build(mixers=("gqa:local",), mixer_options={"gqa": {}})


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer", "embedding_norm": True},
        {"norm": "layer_without_bias"},
        {"norm": "rms_offset", "post_norms": True, "embedding_scale": 4.0, "logit_soft_cap": 2.0},
    ],
    ids=["layer", "without bias", "offset"],
)
def test_norms_scales_and_caps(options):
    """A block by hand: norms before and after, embeddings scaled and normed, logits capped."""
    config = {"mixers": ("mha",), "d_ff": 32, "tie_embeddings": False} | options
    model = build(**config)
    graph, parameters = nnx.split(model)
    parameters = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), parameters)
    model = nnx.merge(graph, parameters)
    block = nnx.merge(*jax.tree.map(lambda p: p[0] if hasattr(p, "ndim") else p, nnx.split(model.groups))).blocks[0]

    def norm(module, x):
        x = x - x.mean(-1, keepdims=True) if options["norm"].startswith("layer") else x
        scale = np.asarray(module.scale[...]) + np.float32(options["norm"] == "rms_offset")
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(1e-5)) * scale
        return y + np.asarray(module.bias[...]) if options["norm"] == "layer" else y

    x = np.asarray(model.embedding[...])[tokens()] * np.float32(options.get("embedding_scale", 1))
    if "embedding_norm" in options:
        x = norm(model.embedding_norm, x)
    y = np.asarray(block.mixer(jnp.asarray(norm(block.mixer_norm, x)))[0])
    x = x + (norm(block.mixer_post_norm, y) if "post_norms" in options else y)
    y = np.asarray(block.mlp(jnp.asarray(norm(block.mlp_norm, x))))
    x = x + (norm(block.mlp_post_norm, y) if "post_norms" in options else y)
    logits = np.asarray(norm(model.final_norm, x)) @ np.asarray(model.head[...]).T
    if "logit_soft_cap" in options:
        logits = 2 * np.tanh(logits / 2)
    assert_close(run(model, tokens())[0], logits, "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm: unknown value 'batch'"),
        ({"embedding_scale": 0.0}, "embedding_scale=0.0: expected a number above 0"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap=-1.0"),
    ],
)
def test_norms_scales_and_caps_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.ModelConfig(**SMALL, **options)

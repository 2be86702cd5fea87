"""What is special about the attention mixer: its ring cache, its options, and models of others rebuilt around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lcr.mixers.attention import AttentionConfig, GQAConfig, MHAConfig, MQAConfig
from lcr.mixers.interface import state_bytes
from pallas_kernels.tolerances import assert_close

D_MODEL = 32
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def make(config=AttentionConfig, d_model=D_MODEL, seed=0, **options):
    return config(**options).make(d_model, rngs=nnx.Rngs(seed))


def inputs(length, batch=2):
    return np.random.default_rng(1).standard_normal((batch, length, D_MODEL), np.float32)


@nnx.jit
def apply(mixer, x, state=None, segment_ids=None):
    return mixer(x, state, segment_ids)


@nnx.jit
def apply_by_token(mixer, x, state, segment_ids):
    """Single steps, scanned."""

    def step(state, token):
        y, state = mixer(token[0][:, None], state, token[1][:, None])
        return state, y[:, 0]

    state, y = jax.lax.scan(step, state, (x.swapaxes(0, 1), segment_ids.swapaxes(0, 1)))
    return y.swapaxes(0, 1), state


# Rows with padding at the left, in the middle and at the right, boundaries, an id that comes back.
IDS = np.array(
    [
        [0, 0, 3, 3, 3, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 5, 5, 5, 5],
        [1, 1, 1, 2, 2, 0, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0],
        [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
    ],
    np.int32,
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ring_drops_the_oldest_however_it_is_fed(dtype):
    """A cache of 5 slots: whole, in pieces and token by token; the cache's rounding is the same in each."""
    mixer, x = make(**SMALL), inputs(20, batch=3)
    empty = jax.device_get(mixer.init_state(3, 5, dtype=dtype))
    assert empty.keys.dtype == dtype
    whole, state = jax.device_get(apply(mixer, x, empty, IDS))
    fed = {"tokens": apply_by_token(mixer, x, empty, IDS)}
    if dtype == jnp.float32:
        first, middle = apply(mixer, x[:, :10], empty, IDS[:, :10])
        second, end = apply(mixer, x[:, 10:], middle, IDS[:, 10:])
        fed["pieces"] = np.concatenate([first, second], axis=1), end
    as_float32 = functools.partial(jax.tree.map, lambda a: np.asarray(a, np.float32))
    for name, (y, final) in fed.items():
        assert_close(y, whole, "float32", name)
        kind = "float32" if dtype == jnp.float32 else "bfloat16"
        assert_close(as_float32(final), as_float32(state), kind, f"state after {name}")
    assert not whole[IDS == 0].any()
    assert state.position.tolist() == [4, 3, 20]
    assert state.segment_id.tolist() == [5, 1, 4]
    assert not state.keys[1, 3:].any()  # what was in those slots belonged to an earlier document

    if dtype == jnp.float32:  # and a capacity of 5 is a window of 5
        windowed = make(**SMALL, window=5)
        assert_close(apply(windowed, x, None, IDS)[0], whole, "float32", "window")


def test_decode_after_prefill_of_a_fresh_state():
    """`state=None` makes room for the call's tokens and no more: the next token pushes out the first."""
    mixer, x = make(**SMALL), inputs(7)
    _, state = apply(mixer, x[:, :6])
    assert state.keys.shape[1] == 6
    y, _ = apply(mixer, x[:, 6:], state)
    assert_close(y, np.asarray(apply(make(**SMALL, window=6), x)[0])[:, 6:], "float32")


def test_groups_are_repeated_heads():
    grouped = make(num_heads=4, num_kv_heads=2, head_dim=8)
    full = make(MHAConfig, num_heads=4, head_dim=8)
    nnx.update(full.query, nnx.state(grouped.query))
    nnx.update(full.out, nnx.state(grouped.out))
    for name in ("key", "value"):
        kernel = np.asarray(getattr(grouped, name).kernel[...]).reshape(D_MODEL, 2, 8)
        getattr(full, name).kernel[...] = jnp.asarray(np.repeat(kernel, 2, axis=1).reshape(D_MODEL, 32))
    x = inputs(7)
    assert_close(apply(grouped, x)[0], apply(full, x)[0], "float32")


def test_bfloat16_computes_with_float32_parameters_and_caches_bfloat16():
    mixer = make(**SMALL, qk_norm=True, dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.state(mixer)))
    y, state = jax.eval_shape(mixer, jnp.asarray(inputs(9)))
    assert y.dtype == state.keys.dtype == jnp.bfloat16


@pytest.mark.parametrize(("window", "slots"), [(None, 100), (16, 16), (300, 100)])
def test_state_bytes(window, slots):
    state = make(**SMALL, window=window).init_state(3, 100, dtype=jnp.bfloat16)
    assert state_bytes(state) == 3 * (2 * slots * 2 * 8 * 2 + 8)


def test_a_donated_cache_is_written_in_place():
    mixer = make(**SMALL)
    state = mixer.init_state(1, 4_096)
    graph, params = nnx.split(mixer)

    def step(state, params, x):
        return nnx.merge(graph, params)(x, state)

    compiled = jax.jit(step, donate_argnums=0).lower(state, params, inputs(1, batch=1)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= state_bytes(state)
    assert memory.temp_size_in_bytes < state.keys.nbytes


@pytest.mark.parametrize(
    ("config", "d_model", "sizes"),
    [
        (AttentionConfig, 16, (1, 1, 16)),
        (AttentionConfig, 48, (3, 3, 16)),
        (MQAConfig, 64, (4, 1, 16)),
        (GQAConfig, 16, (1, 1, 16)),
        (GQAConfig, 48, (3, 1, 16)),
        (GQAConfig, 64, (4, 2, 16)),
        (GQAConfig, 512, (8, 2, 64)),
        (MHAConfig, 2_048, (16, 16, 128)),
    ],
)
def test_default_heads(config, d_model, sizes):
    assert config().head_sizes(d_model) == sizes


@pytest.mark.parametrize(
    ("message", "config", "options"),
    [
        ("num_heads=5 does not divide d_model=32", AttentionConfig, {"num_heads": 5}),
        ("head_dim=12 does not divide d_model=32", AttentionConfig, {"head_dim": 12}),
        ("num_kv_heads=3 does not divide num_heads=4", AttentionConfig, {"num_heads": 4, "num_kv_heads": 3}),
        ("multi-head attention", MHAConfig, {"num_heads": 4, "num_kv_heads": 2}),
        ("multi-query attention", MQAConfig, {"num_heads": 4, "num_kv_heads": 2}),
        ("head_dim=3", AttentionConfig, {"num_heads": 2, "head_dim": 3}),
        ("num_heads=0", AttentionConfig, {"num_heads": 0}),
        ("soft_cap=-1", AttentionConfig, {"soft_cap": -1.0}),
        ("Did you mean 'rope'", AttentionConfig, {"positions": "rop"}),
        ("chunked", AttentionConfig, {"implementation": "chunky"}),
    ],
)
def test_bad_options(message, config, options):
    with pytest.raises(ValueError, match=message):
        make(config, **options)


def test_attention_is_multi_head_attention_unless_told_otherwise():
    """So that the laws need not be run on both."""
    assert dataclasses.asdict(AttentionConfig()) == dataclasses.asdict(MHAConfig())
    assert AttentionConfig().head_sizes(256) == MHAConfig().head_sizes(256) == (4, 4, 64)


def test_sizes_are_whole_numbers():
    config = AttentionConfig()
    object.__setattr__(config, "window", 2.5)  # past the annotations, which only the tests check
    with pytest.raises(ValueError, match=r"window=2\.5: expected a whole number"):
        config.__post_init__()


def test_capacity_must_be_positive():
    with pytest.raises(ValueError, match="capacity=0"):
        make(**SMALL).init_state(1, 0)


def load(case):
    layers = np.load(f"tests/golden/attention_{case}_mlp.npz")
    return {name: a for file in (layers, np.load(f"tests/golden/attention_{case}.npz"))
            for name, a in file.items()}  # fmt: skip


def rebuilt_model(weights, config, epsilon):
    """The decoder of a Hugging Face model with our mixer in it: `(x, states, ids) -> logits, states`."""
    width = weights["embedding"].shape[1]
    mixers = []
    for i in range(sum(name.endswith(".input_layernorm") for name in weights)):
        mixer = config.make(width, rngs=nnx.Rngs(0))
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            getattr(mixer, ours).kernel[...] = jnp.asarray(weights[f"{i}.self_attn.{theirs}"].T)
        if config.qk_norm:
            mixer.query_norm.scale[...] = jnp.asarray(weights[f"{i}.self_attn.q_norm"])
            mixer.key_norm.scale[...] = jnp.asarray(weights[f"{i}.self_attn.k_norm"])
        mixers.append(mixer)

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale[None, None]

    def project(x, weight):
        return jnp.einsum("btd,fd->btf", x, weight, precision="highest")

    @jax.jit
    def run(x, states, ids):
        new_states = []
        for i, mixer in enumerate(mixers):
            y, state = mixer(norm(x, weights[f"{i}.input_layernorm"]), states[i], ids)
            new_states.append(state)
            x = x + y
            y = norm(x, weights[f"{i}.post_attention_layernorm"])
            gated = jax.nn.silu(project(y, weights[f"{i}.mlp.gate"])) * project(y, weights[f"{i}.mlp.up"])
            x = x + project(gated, weights[f"{i}.mlp.down"])
        return project(norm(x, weights["final_norm"]), weights["head"]), new_states

    return run, mixers


def test_qwen3():
    """Grouped heads with query and key norms, the whole sequence at once."""
    weights = load("qwen3")
    config = AttentionConfig(num_heads=9, num_kv_heads=3, head_dim=12, rope_base=1e6, qk_norm=True)
    run, _ = rebuilt_model(weights, config, epsilon=1e-6)
    logits, _ = run(weights["embedding"][weights["tokens"]][None], [None] * 3, None)
    assert_close(logits[0], weights["logits"], "float32 oracle")


def test_mistral_in_two_pieces():
    """Sliding windows of 16 over 67 tokens through ring caches, with a padded token in front."""
    weights = load("mistral_swa")
    config = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=14, window=16)
    run, mixers = rebuilt_model(weights, config, epsilon=1e-5)
    states = [mixer.init_state(1, 100) for mixer in mixers]
    assert states[0].keys.shape[1] == 16
    x = np.pad(weights["embedding"][weights["tokens"]], ((1, 0), (0, 0)))[None]
    ids = (np.arange(68)[None] > 0).astype(np.int32)
    first, states = run(x[:, :34], states, ids[:, :34])
    second, _ = run(x[:, 34:], states, ids[:, 34:])
    assert_close(np.concatenate([first, second], axis=1)[0, 1:], weights["logits"], "float32 oracle")


YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 48}


@pytest.mark.parametrize(
    ("case", "kv_heads", "scaling"),
    [("llama_yarn", 2, YARN), ("llama_llama3", 2, LLAMA3), ("llama_linear", 4, LINEAR), ("llama_dynamic", 4, DYNAMIC)],
)
def test_llama_with_scaled_rope(case, kv_heads, scaling):
    weights = load(case)
    config = AttentionConfig(num_heads=4, num_kv_heads=kv_heads, head_dim=16, rope_scaling=scaling)
    run, _ = rebuilt_model(weights, config, epsilon=1e-5)
    logits, _ = run(weights["embedding"][weights["tokens"]][None], [None] * 2, None)
    assert_close(logits[0], weights["logits"], "float32 oracle")


def test_a_cache_longer_than_the_window_is_read_no_further_than_it():
    """A state may come from a module without the window: then token by token gives what one call does."""
    options = {"num_heads": 2, "head_dim": 4, "positions": "none"}
    mixer = AttentionConfig(window=4, **options).make(8, rngs=nnx.Rngs(0))
    state = AttentionConfig(**options).make(8, rngs=nnx.Rngs(0)).init_state(1, 16)
    x = np.random.default_rng(0).standard_normal((1, 12, 8), np.float32)
    run = jax.jit(lambda x, state: mixer(x, state))
    whole, after = run(x, state)
    outputs = []
    for t in range(12):
        y, state = run(x[:, t : t + 1], state)
        outputs.append(y)
    assert_close((np.concatenate(outputs, axis=1), state), (whole, after), "float32")

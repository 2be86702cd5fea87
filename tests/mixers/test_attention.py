"""What is special about the attention mixer: its ring cache and its options. (Equal to models of others:
tests/pretrained.)"""

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

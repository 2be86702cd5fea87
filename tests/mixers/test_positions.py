"""Attention's positions against naive float64: every score written out, at small and at large positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from compiling import OPTIMIZED
from flax import nnx
from lcr.layers import xpos
from lcr.layers.alibi import alibi_slopes
from lcr.mixers.attention import GQAConfig
from pallas_kernels.tolerances import assert_close

WIDTH, HEADS, GROUPS, HEAD_DIM, CAPACITY, LENGTH = 24, 6, 2, 8, 24, 54
SIZES = {"num_heads": HEADS, "num_kv_heads": GROUPS, "head_dim": HEAD_DIM}


def naive_scores(q, k, positions, kind, base=512):
    """`[H, T, T]` scores of queries `[T, H, K]` and keys `[T, G, K]` before the softmax, in float64."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    half = q.shape[2] // 2
    distance = positions[:, None] - positions[None, :]
    turns = np.exp(1j * positions[:, None] * 10_000.0 ** (-np.arange(half) / half))[:, None]
    if kind == "alibi":
        return np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[2]) - SLOPES[:, None, None] * distance
    q, k = ((x[..., :half] + 1j * x[..., half:]) * turns for x in (q, k))
    zeta = (np.arange(half) / half + 0.4) / 1.4 if kind == "xpos" else np.ones(half)
    factors = zeta ** (np.maximum(distance, 0)[..., None] / base)
    return np.einsum("thk,shk,tsk->hts", q, k.conj(), factors).real / np.sqrt(2 * half)


# section 3 of ALiBi for 4 heads, then the first two of those of 8 that are between: 2^-1 and 2^-3
SLOPES = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])


def naive(mixer, x, start, kind, window):
    """The mixer on one row in float64, each token seeing the last `window`."""
    wq, wk, wv, wo = (np.asarray(getattr(mixer, n).kernel[...], np.float64) for n in ("query", "key", "value", "out"))
    x = np.asarray(x, np.float64)
    positions = start + np.arange(len(x))
    q, k, v = ((x @ w).reshape(len(x), -1, HEAD_DIM) for w in (wq, wk, wv))
    scores = naive_scores(q, k, positions, kind)
    distance = positions[:, None] - positions[None, :]
    scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shk->thk", weights, np.repeat(v, HEADS // GROUPS, axis=1)).reshape(len(x), -1) @ wo


@functools.cache
def built(kind):
    return lcr.make_mixer("gqa", WIDTH, rngs=nnx.Rngs(0), positions=kind, **SIZES)


@nnx.jit
def apply(mixer, x, state):
    return mixer(x, state)


@nnx.jit
def apply_by_token(mixer, x, state):
    def step(state, token):
        y, state = mixer(token[:, None], state)
        return state, y[:, 0]

    state, y = jax.lax.scan(step, state, x.swapaxes(0, 1))
    return y.swapaxes(0, 1), state


@pytest.mark.parametrize("start", [0, 1_000_000])
@pytest.mark.parametrize("kind", ["alibi", "xpos"])
def test_equals_every_score_written_out(kind, start):
    """Whole, in pieces and token by token, through a ring of 24 that is full when the comparison begins."""
    mixer = built(kind)
    x = np.random.default_rng(1).standard_normal((2, LENGTH, WIDTH), np.float32)
    state = jax.device_get(mixer.init_state(2, CAPACITY))
    state = state.replace(position=state.position + np.int32(start), segment_id=state.segment_id + np.int32(1))
    want = np.stack([naive(mixer, row, start, kind, CAPACITY) for row in x])
    fed = {"whole": apply(mixer, x, state)[0], "tokens": apply_by_token(mixer, x, state)[0]}
    first, middle = apply(mixer, x[:, :27], state)
    fed["pieces"] = np.concatenate([first, apply(mixer, x[:, 27:], middle)[0]], axis=1)
    seen = 0 if start == 0 else CAPACITY  # at a million the slots are empty at first, which no real state is
    for name, y in fed.items():
        assert_close(np.asarray(y)[:, seen:], want[:, seen:], "float32", name)
    if start == 0:
        none, _ = apply(mixer, x[:, :CAPACITY], None)
        assert_close(none, want[:, :CAPACITY], "float32", "without a state")


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_slopes(heads):
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,) and len(set(slopes)) == heads
    if heads == 6:
        assert_close(slopes, SLOPES, "float64")
    if heads & (heads - 1) == 0:  # a geometric sequence that starts at 2^(-8/n) and ends at 2^-8
        assert_close(slopes, 2.0 ** (-8 / heads * np.arange(1, heads + 1)), "float64")


def qkv(length, kv_length):
    rng = np.random.default_rng(0)
    shapes = ((1, length, 4, 8), (1, kv_length, 2, 8), (1, kv_length, 2, 8))
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def index(ids, positions):
    return {"segment_ids": ids, "kv_segment_ids": ids, "q_positions": positions, "kv_positions": positions}


def test_blocks_with_references_of_their_own(monkeypatch):
    """100 tokens in blocks of 32, of two documents with padding between, with factors down to e^-15."""
    monkeypatch.setattr(xpos, "SCALE_BASE", 8)
    ids = np.array([[1] * 80 + [0] * 3 + [2] * 17], np.int32)
    steps = np.cumsum(ids != 0, axis=1, dtype=np.int32) - 1
    index_arrays = index(jnp.asarray(ids), jnp.asarray(steps))
    q, k, v = qkv(100, 100)

    def run(block):
        monkeypatch.setattr(xpos, "BLOCK", block)

        def loss(q, k, v):
            o = xpos.xpos_attention(q, k, v, **index_arrays)
            return jnp.sum(jnp.sin(o)), o

        (_, o), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return np.asarray(o), gradients

    (o, gradients), (o_alone, gradients_alone) = run(32), run(100)
    assert_close(o, o_alone, "float32")
    assert_close(gradients, gradients_alone, "float32 gradient")

    seen = (ids[0][:, None] == ids[0]) & np.tri(100, dtype=bool)
    # not turned here, so that only the factors are left of `naive_scores`
    repeated = np.repeat(np.asarray(k[0], np.float64), 2, axis=1)
    zeta = np.tile((np.arange(4) / 4 + 0.4) / 1.4, 2)
    at = np.asarray(steps[0], np.float64)
    factors = zeta ** (np.maximum(at[:, None] - at[None, :], 0)[..., None] / 8)
    scores = np.einsum("thk,shk,tsk->hts", np.asarray(q[0], np.float64), repeated, factors) / np.sqrt(8)
    weights = np.exp(np.where(seen, scores, -np.inf) - scores.max())
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    want = np.einsum("hts,shk->thk", weights, np.repeat(np.asarray(v[0], np.float64), 2, axis=1))
    assert_close(o[0, ids[0] != 0], want[ids[0] != 0], "float32")
    assert not o[0, ids[0] == 0].any()


@pytest.mark.parametrize("length", [1, 2])
def test_keys_up_to_a_million_tokens_ago(length):
    """What underflows is what float64 has near 0, and nothing overflows."""
    q, k, v = qkv(length, 2_000)
    distances = np.concatenate([np.arange(1_999, 0, -1) * 500 + length - 1, [0]])
    kv_positions, positions = jnp.asarray(-distances[None], jnp.int32), jnp.zeros((1, length), jnp.int32)
    options = {"segment_ids": jnp.ones((1, length), jnp.int32), "kv_segment_ids": jnp.ones((1, 2_000), jnp.int32)}
    run = jax.jit(functools.partial(xpos.xpos_attention, **options, q_positions=positions, kv_positions=kv_positions))
    zeta = np.tile((np.arange(4) / 4 + 0.4) / 1.4, 2)
    factors = zeta ** (distances[:, None] / 512.0)
    keys, values = (np.repeat(np.asarray(a[0], np.float64), 2, axis=1) for a in (k, v))
    scores = np.einsum("thk,shk,sk->hts", np.asarray(q[0], np.float64), keys, factors) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert_close(run(q, k, v)[0], np.einsum("hts,shk->thk", weights, values), "float32")


def test_a_call_of_65536_tokens():
    """Sixteen blocks, with a window of 8: the last tokens are exact, and all of them finite."""
    length = 65_536
    q, k, v = qkv(length, length)
    ids, steps = np.ones((1, length), np.int32), np.arange(length, dtype=np.int32)[None]
    run = jax.jit(functools.partial(xpos.xpos_attention, window=8), compiler_options=OPTIMIZED)
    o = np.asarray(run(q, k, v, **index(ids, steps)))
    assert np.isfinite(o).all()
    near = np.asarray(run(*[a[:, -16:] for a in (q, k, v)], **index(ids[:, :16], steps[:, :16])))
    assert_close(o[:, -8:], near[:, -8:], "float32")


def test_dynamic_frequencies_go_with_the_capacity():
    """Beyond the original length: whole and in pieces are one, and another capacity is another model."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
    for name in ("gqa", "mla"):
        mixer = lcr.make_mixer(name, 32, rngs=nnx.Rngs(0), rope_scaling=scaling)
        x = np.random.default_rng(1).standard_normal((2, 20, 32), np.float32)
        none, _ = apply(mixer, x, None)
        first, state = apply(mixer, x[:, :10], mixer.init_state(2, 20))
        second, _ = apply(mixer, x[:, 10:], state)
        assert_close(np.concatenate([first, second], axis=1), none, "float32", name)
        if name == "gqa":
            assert np.abs(np.asarray(apply(mixer, x, mixer.init_state(2, 40))[0]) - none).max() > 1e-3


def test_options_of_a_model_may_hold_mappings():
    """As they come from the command line: nested dicts, in a configuration that must be hashable."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    config = lcr.ModelConfig(
        vocab_size=8, d_model=16, mixers=("gqa", "mla"),
        mixer_options={"gqa": {"rope_scaling": scaling}, "mla": {"rope_scaling": scaling}},
    )  # fmt: skip
    assert hash(config) == hash(dataclasses.replace(config))
    assert hash(config.mixer("gqa")) == hash(GQAConfig(rope_scaling=scaling, dtype=jnp.dtype("float32")))
    assert config.mixer("gqa").rope_scaling["factor"] == 4.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "alibi", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "which turn nothing"),
        ({"positions": "none", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "beside positions='none'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "expected the field 'factor'"),
        ({"positions": "xpos", "head_dim": 3, "num_heads": 2}, "head_dim=3: xpos turns pairs of channels"),
        ({"positions": "alibbi"}, "Did you mean 'alibi'"),
    ],
)
def test_contradictions(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("attention", 24, rngs=nnx.Rngs(0), **options)


def test_latent_attention_with_yarn():
    """DeepSeek's: rotated parts grow by the ratio of the two mscales, scores by the square of the second."""
    scaling = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8, "mscale": 3.0,
        "mscale_all_dim": 2.0,
    }  # fmt: skip
    sizes = {"num_heads": 2, "nope_head_dim": 6, "rope_head_dim": 8, "value_head_dim": 5, "kv_lora_rank": 7}
    mixer = lcr.make_mixer("mla", WIDTH, rngs=nnx.Rngs(0), rope_scaling=scaling, **sizes)
    x = np.random.default_rng(1).standard_normal((1, 20, WIDTH), np.float32)
    wide = functools.partial(np.asarray, dtype=np.float64)
    at = wide(x[0])
    q = (at @ wide(mixer.query.kernel[...])).reshape(20, 2, 14)
    latent, shared = np.split(at @ wide(mixer.kv_down.kernel[...]), [7], axis=-1)
    latent /= np.sqrt((latent**2).mean(-1, keepdims=True) + 1e-6)

    # pairs of width 8: 64 10^-i / 2 pi = 10, 1.02, 0.1, 0.01 turns; the ramp runs from pair 0 to pair 2
    turns = np.array([1, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4, 0.001 / 4])
    stretch = (0.3 * np.log(4) + 1) / (0.2 * np.log(4) + 1)
    angles = np.exp(1j * np.arange(20)[:, None] * turns)

    def turned(y):
        return stretch * (y[..., 0::2] + 1j * y[..., 1::2])

    scores = np.einsum("thk,rhk,sr->hts", q[..., :6], wide(mixer.key_up[...]), latent)
    rotated = [turned(q[..., 6:]) * angles[:, None], turned(shared) * angles]
    scores += np.einsum("thk,sk->hts", rotated[0], rotated[1].conj()).real
    scores *= (0.2 * np.log(4) + 1) ** 2 / np.sqrt(14)
    weights = np.exp(np.where(np.tri(20, dtype=bool), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    values = np.einsum("sr,rhv->shv", latent, wide(mixer.value_up[...]))
    want = np.einsum("hts,shv->thv", weights, values).reshape(20, -1) @ wide(mixer.out.kernel[...])
    assert_close(np.asarray(apply(mixer, x, None)[0])[0], want, "float32", "expanded")
    assert_close(np.asarray(apply(mixer, x, mixer.init_state(1, 20))[0])[0], want, "float32", "absorbed")

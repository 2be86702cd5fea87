"""Infini-attention against the paper's equations, segment by segment, written out in NumPy and again in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lcr.layers import compressive_memory as memory_module
from lcr.layers.compressive_memory import Boundaries, Memory, compressive_memory, features
from lcr.mixers.infini import InfiniConfig
from lcr.mixers.interface import state_bytes
from pallas_kernels.tolerances import assert_close

WIDTH, HEADS, KV_HEADS, HEAD_DIM, SEGMENT = 16, 4, 2, 6, 7


@functools.cache
def build(**options):
    options = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "segment_length": SEGMENT} | options
    return InfiniConfig(**options).make(WIDTH, rngs=nnx.Rngs(0))


@functools.cache
def program(implementation=None, **options):
    """A compiled `(parameters, x, state, ids) -> (y, state)`."""
    graph = nnx.graphdef(build(implementation=implementation, **options))
    return jax.jit(lambda parameters, *args: nnx.merge(graph, parameters)(*args))


def activations(length, batch=2, seed=1, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal((batch, length, WIDTH)).astype(dtype)


def turned(y, position):
    """RoPE of `[..., K]` at one position, pairs (i, i + K / 2) as complex numbers."""
    half = HEAD_DIM // 2
    phase = np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
    z = (y[..., :half] + 1j * y[..., half:]) * phase
    return np.concatenate([z.real, z.imag], axis=-1)


def sigma(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def paper(parameters, x, update):
    """One row `[T, D]`, a segment at a time: outputs, and (M, z) of each head after the last whole segment."""
    heads = {name: x @ parameters[name] for name in ("query", "key", "value")}
    q, k, v = (heads[n].reshape(len(x), -1, HEAD_DIM) for n in ("query", "key", "value"))
    out, memories = np.zeros_like(q), []
    for h in range(HEADS):
        g, gate = h // (HEADS // KV_HEADS), 1 / (1 + np.exp(-parameters["beta"][h]))
        memory, normalizer = np.zeros((HEAD_DIM, HEAD_DIM)), np.zeros(HEAD_DIM)
        for start in range(0, len(x), SEGMENT):
            tokens = range(start, min(start + SEGMENT, len(x)))
            keys, values = k[tokens.start : tokens.stop, g], v[tokens.start : tokens.stop, g]
            for t in tokens:
                query = turned(q[t, h], t)
                scores = np.array([query @ turned(k[s, g], s) for s in range(start, t + 1)]) / np.sqrt(HEAD_DIM)
                local = softmax(scores) @ values[: t + 1 - start]
                seen = sigma(q[t, h]) @ memory / (sigma(q[t, h]) @ normalizer) if start else np.zeros(HEAD_DIM)
                out[t, h] = gate * seen + (1 - gate) * local
            if len(tokens) == SEGMENT:
                if update == "delta" and start:
                    values = values - sigma(keys) @ memory / (sigma(keys) @ normalizer)[:, None]
                memory = memory + sigma(keys).T @ values
                normalizer = normalizer + sigma(keys).sum(0)
        memories.append((memory, normalizer))
    return out.reshape(len(x), -1) @ parameters["out"], memories


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_equations_of_the_paper(update, monkeypatch):
    """Six segments and a part of a seventh, for both forms, over boundaries of chunks of 16."""
    monkeypatch.setattr(memory_module, "CHUNK", 16)
    beta = np.array([-1.0, 0.3, 2.0, 0.0], np.float32)
    x = activations(6 * SEGMENT + 3)
    with jax.enable_x64(True):
        for implementation in (None, "reference"):
            mixer = build(update=update, dtype="float64", implementation=implementation)
            mixer.beta[...] = jnp.asarray(beta)
            parameters = {n: np.asarray(getattr(mixer, n).kernel[...], np.float64) for n in ("query", "key", "value")}
            parameters |= {"out": np.asarray(mixer.out.kernel[...], np.float64), "beta": beta.astype(np.float64)}
            y, state = jax.jit(lambda x, mixer=mixer: mixer(x))(jnp.asarray(x))
            state = jax.tree.map(np.asarray, state)
            for b in range(2):
                expected, memories = paper(parameters, x[b], update)
                assert_close(y[b], expected, "float64")
                for h, (memory, normalizer) in enumerate(memories):
                    g = h // (HEADS // KV_HEADS)
                    assert_close(state.memory[b, g], memory, "float64")
                    assert_close(state.normalizer[b, g], normalizer, "float64")


def by_segments(q, k, v, delta):
    """Reads and final (M, z) of one head in JAX: `[n, L, K]`, whole segments; for gradients."""
    memory, normalizer = jnp.zeros((q.shape[-1], v.shape[-1])), jnp.zeros(q.shape[-1])
    reads = []
    for n, (queries, keys, values) in enumerate(zip(q, k, v, strict=True)):
        fq, fk = (jax.nn.elu(y) + 1 for y in (queries, keys))
        reads.append(fq @ memory / (fq @ normalizer)[:, None] if n else jnp.zeros_like(values))
        if delta and n:
            values = values - fk @ memory / (fk @ normalizer)[:, None]
        memory, normalizer = memory + fk.T @ values, normalizer + fk.sum(0)
    return jnp.stack(reads), memory, normalizer


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "linear"])
def test_gradients_of_the_memory(delta, monkeypatch):
    monkeypatch.setattr(memory_module, "CHUNK", 8)
    count, length, width = 5, 6, 4
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        inputs = tuple(jnp.asarray(rng.standard_normal((count, length, width))) for _ in range(3))
        weights = tuple(jnp.asarray(rng.standard_normal(s)) for s in ((count, length, width), (width, width), (width,)))

        def ours(q, k, v):
            flat = (y.reshape(1, count * length, 1, width) for y in (q, k, v))
            steps = jnp.arange(count * length)[None]
            at = Boundaries(jnp.ones(steps.shape, bool), steps == 0, steps % length == 0)
            empty = jnp.zeros((1, 1, width, width + 1))
            reads, memory = compressive_memory(*flat, at, Memory(empty, empty), delta=delta)
            total = (memory.past + memory.running)[0, 0]
            return reads.reshape(q.shape), total[:, :-1], total[:, -1]

        def loss(form, *args):
            return sum(jnp.sum(w * y) for w, y in zip(weights, form(*args), strict=True))

        forms = ours, functools.partial(by_segments, delta=delta)
        actual, expected = (jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1, 2)))(*inputs) for f in forms)
    assert_close(actual, expected, "float64")


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_any_packing_in_chunks_equals_token_by_token(update, monkeypatch):
    """Documents from one token to a few segments, padding between, over several chunks and calls."""
    monkeypatch.setattr(memory_module, "CHUNK", 8)
    rng = np.random.default_rng(5)
    ids = np.stack([np.repeat(rng.integers(0, 3, 20), rng.integers(1, 12, 20))[:60] for _ in range(2)]).astype(np.int32)
    x = activations(60, dtype=np.float32)
    mixer = build(update=update, segment_length=4)
    fast, slow = (program(form, update=update, segment_length=4) for form in (None, "reference"))
    parameters, empty = nnx.state(mixer), mixer.init_state(2)
    expected = slow(parameters, x, empty, ids)
    outputs, state = [], empty
    for cut in range(0, 60, 20):  # three chunks each, the last one filled up
        y, state = fast(parameters, x[:, cut : cut + 20], state, ids[:, cut : cut + 20])
        outputs.append(y)
    assert_close((np.concatenate(outputs, axis=1), state), expected, "float32")


def with_gate(beta, x, ids=None):
    """Outputs for three segments of tokens, of one document if no ids are given."""
    ids = np.ones(x.shape[:2], np.int32) if ids is None else ids
    return np.asarray(program()(nnx.state(build(gate_init=beta)), x, None, ids)[0])


def test_the_gate_at_its_ends_is_attention_or_memory_alone():
    x = activations(3 * SEGMENT, dtype=np.float32)
    alone = np.broadcast_to(np.repeat(np.arange(1, 4, dtype=np.int32), SEGMENT), x.shape[:2])
    local = with_gate(-200.0, x)
    assert_close(local, with_gate(-200.0, x, alone), "float32", "segments know nothing of one another")
    memory = with_gate(200.0, x)
    assert not memory[:, :SEGMENT].any(), "nothing is remembered in the first segment"
    changed = x.copy()
    changed[:, SEGMENT] = 5.0
    again = with_gate(200.0, changed)
    own = slice(SEGMENT + 1, 2 * SEGMENT)
    assert_close(again[:, own], memory[:, own], "float32", "a segment's own tokens are not in its memory")
    assert np.abs(again[:, 2 * SEGMENT :] - memory[:, 2 * SEGMENT :]).max() > 1e-3


def test_memory_has_no_positions():
    """The first segment's tokens in another order leave the same memory."""
    x = activations(3 * SEGMENT, dtype=np.float32)
    reversed_segment = np.concatenate([x[:, SEGMENT - 1 :: -1], x[:, SEGMENT:]], axis=1)
    one, other = (with_gate(200.0, y)[:, SEGMENT:] for y in (x, reversed_segment))
    assert np.abs(one).max() > 0.01
    assert_close(other, one, "float32")


def test_small_features_are_not_rounded_away():
    x = jnp.asarray([-30.0, -1.0, 0.0, 2.0])
    assert_close(features(x) / jnp.exp(jnp.minimum(x, 0)), np.array([1.0, 1.0, 1.0, 3.0]), "float32")
    assert_close(jax.vmap(jax.grad(features))(x[1:]), np.array([np.exp(-1.0), 1.0, 1.0]), "float32")


def test_the_delta_update_stays_bounded_whatever_the_keys():
    """The largest M_j / z_j grows by at most the largest value a segment, with keys that change their scale wildly."""
    rng = np.random.default_rng(7)
    segments, length, width = 40, 4, 5
    shape = (1, segments * length, 1, width)
    scale = np.repeat(10.0 ** rng.uniform(-2, 2, segments), length)[None, :, None, None]
    k = jnp.asarray((rng.standard_normal(shape) * scale).astype(np.float32))
    v = jnp.asarray(rng.uniform(-1, 1, shape).astype(np.float32))
    steps = jnp.arange(segments * length)[None]
    at = Boundaries(jnp.ones(steps.shape, bool), steps == 0, steps % length == 0)
    empty = jnp.zeros((1, 1, width, width + 1))
    run = jax.jit(functools.partial(compressive_memory, delta=True))
    reads, memory = jax.device_get(run(k, k, v, at, Memory(empty, empty)))
    assert np.isfinite(reads).all() and np.isfinite(memory.past).all()
    largest = np.abs(reads).max(axis=(0, 2, 3)).reshape(segments, length).max(axis=1)
    assert (largest <= np.arange(segments) + 1e-3).all()


def test_state_bytes_do_not_grow():
    mixer = build()
    held = 8 * KV_HEADS * HEAD_DIM * (HEAD_DIM + 1) + 2 * SEGMENT * KV_HEADS * HEAD_DIM * 4 + 8
    assert state_bytes(mixer.init_state(1)) == state_bytes(mixer.init_state(1, 10**6)) == held
    half = mixer.init_state(1, 1, jnp.bfloat16)
    assert half.keys.dtype == half.values.dtype == jnp.bfloat16 and half.memory.dtype == jnp.float32
    for length in (1, 3, 2 * SEGMENT):
        _, after = jax.eval_shape(mixer, jnp.ones((1, length, WIDTH)), half)
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in (half, after)]
        assert shapes[0] == shapes[1]


def test_gate_parameters_have_a_group_of_their_own():
    beta = build(gate_init=-0.5).beta
    assert beta.get_metadata()["group"] == "memory_gate"
    assert beta[...].shape == (HEADS,) and beta[...].dtype == jnp.float32 and (beta[...] == -0.5).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"segment_length": 0}, "segment_length=0: expected a whole number above 0"),
        ({"segment_length": -3}, "segment_length=-3: expected a whole number above 0"),
        ({"update": "dleta"}, "update: .*Did you mean 'delta'"),
        ({"gate_init": float("inf")}, "gate_init=inf: expected a finite number"),
        ({"rope_base": -1.0}, "rope_base=-1.0: expected a number above 0"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 0}, "head_dim=0: expected a whole number above 0"),
        ({"implementation": "fast"}, "implementation: unknown value 'fast'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        InfiniConfig(**options).make(WIDTH, rngs=nnx.Rngs(0))

"""Linear attention with a decay for each key channel, and with a bonus for the current token."""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMIZED
from pallas_kernels.linear_attention import api, linear_attention
from pallas_kernels.linear_attention.shapes import Shape
from pallas_kernels.linear_attention.vector_decay import BLOCK, CHUNK, block_tables, chunk_table
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
SMALL = Shape(B=2, T=150, H=2, K=5, V=3, decay="channel", bonus=True)


def make(shape, packed=False, dtype=jnp.float32):
    """Inputs, segment ids, and cotangents of both outputs."""
    random = np.random.default_rng(0)
    B, T, H, K, V, decay, bonus, _ = shape

    def normal(*sizes):
        return jnp.asarray(random.standard_normal(sizes), dtype)

    gates = {"channel": (B, T, H, K), "token": (B, T, H), "head": (H,)}[decay]
    inputs = {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "log_decay": -0.3 * jnp.exp(normal(*gates)),
        "initial_state": normal(B, H, K, V),
        "bonus": normal(H, K) if bonus else None,
    }
    ids = None
    if packed:  # short documents and padding; then a boundary between chunks, and a chunk of padding alone
        ids = np.repeat(random.integers(0, 4, (B, T)), 5, axis=1)[:, :T].astype(np.int32)
        ids[0, CHUNK - 1 : CHUNK + 1] = [5, 6][: max(0, min(2, T - CHUNK + 1))]
        ids[1, : CHUNK + BLOCK] = 0
    return inputs, None if ids is None else jnp.asarray(ids), (normal(B, T, H, V), normal(B, H, K, V))


def with_gradients(inputs, ids, cotangents, implementation, scale=None):
    def run(inputs):
        return linear_attention(**inputs, segment_ids=ids, scale=scale, implementation=implementation)

    outputs, pullback = jax.vjp(run, inputs)
    return outputs, pullback(cotangents)[0]


outputs_and_gradients = jax.jit(with_gradients, static_argnames=("implementation", "scale"))
fast_outputs_and_gradients = jax.jit(with_gradients, static_argnames="implementation", compiler_options=OPTIMIZED)


@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        (SMALL, True),
        (SMALL._replace(T=CHUNK + 1), False),  # a last chunk of one token
        (SMALL._replace(T=70, decay="head"), False),
    ],
    ids=lambda x: f"T{x.T}-{x.decay}{'-bonus' * x.bonus}" if isinstance(x, Shape) else "packed" if x else "",
)
def test_chunked_equals_token_by_token(shape, packed):
    case = make(shape, packed)
    outputs, gradients = outputs_and_gradients(*case, "chunked")
    expected_outputs, expected_gradients = outputs_and_gradients(*case, "reference")
    assert_close(outputs, expected_outputs, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["gla", "rwkv6"])
def test_oracle(name, implementation):
    """Numbers of flash-linear-attention: outputs, final state, every gradient."""
    golden = {key: jnp.asarray(value) for key, value in np.load(GOLDEN / f"{name}_fla.npz").items()}
    of = {"gla": {"q": "q", "log_decay": "gk"}, "rwkv6": {"q": "r", "log_decay": "w", "bonus": "u"}}[name]
    of |= {"k": "k", "v": "v", "initial_state": "h0"}
    outputs, gradients = outputs_and_gradients(
        {ours: golden[theirs] for ours, theirs in of.items()},
        None,
        (golden["do"], golden["dfinal_state"]),
        implementation,
        scale={"gla": None, "rwkv6": 1.0}[name],
    )
    assert_close(outputs, (golden["o"], golden["final_state"]), "float32 oracle")
    assert_close(gradients, {ours: golden[f"d{theirs}"] for ours, theirs in of.items()}, "float32 oracle")


def test_the_bonus_by_its_formula():
    """o_t = q_t (S_{t-1} + diag(u) k_t v_t^T), written out for three tokens, the third of another document."""
    inputs, _, cotangents = make(SMALL._replace(B=1, T=3, decay="token"))
    ids = jnp.asarray([[1, 1, 2]], jnp.int32)
    (o, state), _ = outputs_and_gradients(inputs, ids, cotangents, "reference", scale=1.0)
    q, k, v, g, before = (np.asarray(inputs[n])[0] for n in ("q", "k", "v", "log_decay", "initial_state"))
    for h in range(2):
        writes = [np.outer(k[t, h], v[t, h]) for t in range(3)]
        own = [np.asarray(inputs["bonus"])[h][:, None] * write for write in writes]
        second = np.exp(g[0, h]) * before[h] + writes[0]
        expected = [q[0, h] @ (before[h] + own[0]), q[1, h] @ (second + own[1]), q[2, h] @ own[2]]
        assert_close(o[0, :, h], np.stack(expected), "float32")
        assert_close(state[0, h], writes[2], "float32")


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_heads_that_share_queries_and_keys(decay):
    """q and k of two groups for six heads give what they give repeated; their gradients are sums over the heads."""
    inputs, ids, cotangents = make(SMALL._replace(H=6, T=70, decay=decay), packed=True)
    shared = inputs | {name: inputs[name][:, :, ::3] for name in "qk"}
    repeated = inputs | {name: jnp.repeat(shared[name], 3, axis=2) for name in "qk"}
    outputs, gradients = outputs_and_gradients(shared, ids, cotangents, "chunked")
    expected, expected_gradients = outputs_and_gradients(repeated, ids, cotangents, "reference")
    for name in "qk":
        of_heads = expected_gradients[name]
        expected_gradients[name] = of_heads.reshape(*of_heads.shape[:2], 2, 3, -1).sum(3)
    assert_close(outputs, expected, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


def test_float64():
    with jax.enable_x64(True):
        case = make(SMALL, packed=True, dtype=jnp.float64)
        found = outputs_and_gradients(*case, "chunked")
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(found))
        assert_close(found, outputs_and_gradients(*case, "reference"), "float64")


def test_bfloat16():
    inputs, ids, cotangents = make(SMALL._replace(K=8, V=8), packed=True)
    rounded = {k: v.astype(jnp.bfloat16) if k in ("q", "k", "v", "bonus") else v for k, v in inputs.items()}
    cotangents = (cotangents[0].astype(jnp.bfloat16), cotangents[1])
    outputs, gradients = outputs_and_gradients(rounded, ids, cotangents, "chunked")
    assert outputs[0].dtype == jnp.bfloat16 and outputs[1].dtype == jnp.float32
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (rounded, cotangents))
    expected_outputs, expected_gradients = outputs_and_gradients(exact[0], ids, exact[1], "reference")
    assert_close(outputs, expected_outputs, "bfloat16")
    assert_close(gradients, expected_gradients, "bfloat16 gradient")


def test_extreme_gates_over_a_long_sequence():
    """65,536 tokens; slow, fast and mixed gates, beside each other and one after another, against float64."""
    length, width = 65_536, 4
    random = np.random.default_rng(0)
    inputs, ids, cotangents = make(Shape(B=1, T=length, H=2, K=width, V=width, decay="channel"))
    gates = random.choice([-1e-6, -100.0, -1e-3, 0.0], (1, length, 2, width), p=[0.9, 0.02, 0.04, 0.04])
    gates[:, :, 0, 0], gates[:, :, 0, 1] = -1e-6, -100.0
    gates[:, :, 1, 0] = random.choice([-1e-6, -1e4, -np.inf], length, p=[0.9, 0.05, 0.05])
    inputs["log_decay"] = jnp.asarray(gates, jnp.float32)
    inputs["bonus"] = jnp.ones((2, width))
    outputs, gradients = jax.device_get(fast_outputs_and_gradients(inputs, ids, cotangents, "chunked"))
    with jax.enable_x64(True):
        exact, exact_cotangents = jax.tree.map(np.float64, (inputs, cotangents))
        positional = [exact[name] for name in ("q", "k", "v", "log_decay", "initial_state")]
        expected = jax.jit(lambda *args: api.IMPLEMENTATIONS["reference"].run(*args[:5], None, width**-0.5, args[5]))(
            *positional, exact["bonus"]
        )
        _, expected_gradients = jax.device_get(fast_outputs_and_gradients(exact, ids, exact_cotangents, "chunked"))
    assert_close(outputs, expected, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


def test_every_pair_of_a_block_parts_at_one_level():
    """And the sums on both sides of the split make up the decay between the two tokens."""
    for exclusive in (False, True):
        sums, parts = block_tables(BLOCK, exclusive)
        np.testing.assert_array_equal(parts.sum(0), np.tril(np.ones((BLOCK, BLOCK)), -1))
        for i in range(BLOCK):
            for j in range(i):
                level = int(parts[:, i, j].argmax())
                between = [float(j < t < i + (not exclusive)) for t in range(BLOCK)]
                assert (sums[level, i] + sums[level, j]).tolist() == between
    assert chunk_table(3)[2].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_memory_is_linear_in_length():
    """Forward and backward together: temporaries of less than eight times the inputs' bytes, at 65,536 tokens. One
    number for each pair of tokens would take 16 GiB."""
    shape = Shape(B=1, T=65_536, H=2, K=32, V=32, decay="channel", bonus=True)
    inputs, _, cotangents = jax.eval_shape(lambda: make(shape))
    compiled = outputs_and_gradients.lower(inputs, None, cotangents, "chunked").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * sum(x.size * 4 for x in inputs.values())


def test_a_bonus_of_another_shape_is_refused():
    inputs, _, _ = make(SMALL)
    with pytest.raises(ValueError, match=r"bonus of shape \(2, 1\): expected \[H, K\] = \[2, 5\]"):
        inspect.unwrap(linear_attention)(**inputs | {"bonus": jnp.ones((2, 1))})  # without the tests' type checker

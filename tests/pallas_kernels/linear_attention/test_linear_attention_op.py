import inspect
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMIZED
from pallas_kernels import dispatch
from pallas_kernels.linear_attention import api, linear_attention
from pallas_kernels.linear_attention.chunked import CHUNK
from pallas_kernels.linear_attention.shapes import SHAPES, Shape
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"


def make(shape, packed=False, seed=0, dtype=jnp.float32):
    """Inputs, keyword inputs, and cotangents of both outputs."""
    random = np.random.default_rng(seed)
    B, T, H, K, V, decay, *_ = shape

    def normal(*sizes):
        return jnp.asarray(random.standard_normal(sizes), dtype)

    gates = {"token": (B, T, H), "head": (H,), "none": None}[decay]
    inputs = {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "log_decay": None if gates is None else -0.2 * jnp.abs(normal(*gates)),
        "initial_state": normal(B, H, K, V),
    }
    ids = np.stack([document_ids(T, row, random) for row in range(B)]) if packed else None
    return inputs, None if ids is None else jnp.asarray(ids), (normal(B, T, H, V), normal(B, H, K, V))


def document_ids(length, row, random):
    """Short documents and padding; row 0 also has a boundary between two chunks and a chunk of padding alone."""
    ids = np.repeat(random.integers(0, 4, length), random.integers(1, 9, length))[:length].astype(np.int32)
    if row == 0:
        ids[CHUNK - 1 : CHUNK + 1] = [5, 6][: len(ids[CHUNK - 1 : CHUNK + 1])]
        ids[2 * CHUNK : 3 * CHUNK] = 0
    return ids


def with_gradients(inputs, ids, cotangents, implementation, scale=None):
    def run(inputs):
        inputs = dict(inputs)
        positional = [inputs.pop(name) for name in ("q", "k", "v", "log_decay")]
        return linear_attention(
            *positional, **inputs, segment_ids=ids, scale=scale, implementation=implementation
        )

    outputs, pullback = jax.vjp(run, inputs)
    return outputs, pullback(cotangents)[0]


outputs_and_gradients = jax.jit(with_gradients, static_argnames=("implementation", "scale"))
fast_outputs_and_gradients = jax.jit(with_gradients, static_argnames="implementation", compiler_options=OPTIMIZED)


@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        (Shape(B=2, T=200, H=3, K=4, V=6, decay="head"), True),
        (Shape(B=2, T=CHUNK + 1, H=3, K=4, V=6, decay="head"), False),  # a last chunk of one token
    ],
    ids=lambda x: f"T{x.T}-{x.decay}" if isinstance(x, Shape) else "packed" if x else "",
)
def test_chunked_equals_token_by_token(shape, packed):
    case = make(shape, packed)
    outputs, gradients = outputs_and_gradients(*case, "chunked")
    expected_outputs, expected_gradients = outputs_and_gradients(*case, "reference")
    assert_close(outputs, expected_outputs, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("retention_fla", "chunked"),
        ("simple_gla_fla", "chunked"),
        ("linear_attn_fla", "chunked"),
        ("simple_gla_fla", "reference"),
    ],
)
def test_oracle(name, implementation):
    """Numbers of flash-linear-attention: outputs, final state, every gradient."""
    golden = {key: jnp.asarray(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    inputs = {key: golden[key] for key in ("q", "k", "v")}
    inputs["log_decay"] = golden.get("g", golden.get("log_decay"))
    inputs["initial_state"] = golden.get("h0")
    outputs, gradients = outputs_and_gradients(
        inputs, None, (golden["do"], golden["dfinal_state"]), implementation
    )
    assert_close(outputs, (golden["o"], golden["final_state"]), "float32 oracle")
    names = {"q": "dq", "k": "dk", "v": "dv", "log_decay": "dg", "initial_state": "dh0"}
    compared = {key: golden[name] for key, name in names.items() if name in golden}
    assert_close({key: gradients[key] for key in compared}, compared, "float32 oracle")


def test_float64():
    with jax.enable_x64(True):
        case = make(Shape(B=2, T=200, H=3, K=4, V=6), packed=True, dtype=jnp.float64)
        outputs, gradients = outputs_and_gradients(*case, "chunked")
        expected = outputs_and_gradients(*case, "reference")
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(outputs))
        assert_close((outputs, gradients), expected, "float64")


GATES = {
    "slow": lambda random, T: np.full(T, -1e-6),
    "fast": lambda random, T: np.full(T, -20.0),
    "none": lambda random, T: np.zeros(T),
    "mixed": lambda random, T: random.choice([-1e-6, -1e-3, -20.0, 0.0], T, p=[0.5, 0.3, 0.1, 0.1]),
    "shut": lambda random, T: random.choice([-1e-6, -1e4, -np.inf], T, p=[0.9, 0.05, 0.05]),
}


def test_extreme_gates_over_a_long_sequence():
    """65,536 tokens, one head for each kind of gate, against float64 token by token (gradients: float64 chunked)."""
    length, width = 65_536, 4
    random = np.random.default_rng(0)
    inputs, ids, cotangents = make(Shape(B=1, T=length, H=len(GATES), K=width, V=width))
    gates = np.stack([gate(random, length) for gate in GATES.values()], axis=1)
    inputs["log_decay"] = jnp.asarray(gates[None], jnp.float32)
    outputs, gradients = jax.device_get(fast_outputs_and_gradients(inputs, ids, cotangents, "chunked"))
    with jax.enable_x64(True):
        exact, exact_cotangents = jax.tree.map(np.float64, (inputs, cotangents))
        names = ("q", "k", "v", "log_decay", "initial_state")
        expected = jax.jit(lambda *args: api.IMPLEMENTATIONS["reference"].run(*args, None, width**-0.5))(
            *[exact[name] for name in names]
        )
        expected = jax.device_get(expected)
        _, expected_gradients = jax.device_get(fast_outputs_and_gradients(exact, ids, exact_cotangents, "chunked"))
    for head, kind in enumerate(GATES):
        assert_close(outputs[0][:, :, head], expected[0][:, :, head], "float32", kind)
        assert_close(outputs[1][:, head], expected[1][:, head], "float32", kind)
        for name, gradient in gradients.items():
            axis = 1 if name == "initial_state" else 2
            found, wanted = (np.take(g, head, axis=axis) for g in (gradient, expected_gradients[name]))
            assert_close(found, wanted, "float32 gradient", f"{kind} d{name}")


def test_a_constant_gate_of_minus_infinity_forgets_everything():
    inputs, ids, cotangents = make(Shape(B=1, T=20, H=1, K=3, V=2))
    inputs["log_decay"] = jnp.full((1,), -jnp.inf)
    (o, state), gradients = outputs_and_gradients(inputs, ids, cotangents, "chunked", scale=1.0)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    assert_close(o, jnp.sum(q * k, axis=-1, keepdims=True) * v, "float32")
    assert_close(state, k[:, -1, :, :, None] * v[:, -1, :, None, :], "float32")
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("decay", ["channel", "channel-bonus", "token", "head", "none", "bfloat16"])
def test_the_loop_in_place_is_the_token_loop(decay, packed):
    """A CPU's default, which runs only where no gradient is asked for; `reference` where one is would hide it."""
    dtype = jnp.bfloat16 if decay == "bfloat16" else jnp.float32
    kind = decay if decay in ("head", "none") else "token"
    inputs, ids, _ = make(Shape(B=2, T=37, H=2, K=3, V=5, decay=kind), packed, dtype=dtype)
    if decay.startswith("channel"):
        inputs["log_decay"] = -jnp.abs(inputs["k"]) * inputs["q"] ** 2
    bonus = jnp.arange(6.0).reshape(2, 3) if decay == "channel-bonus" else None
    arguments = [inputs[name] for name in ("q", "k", "v", "log_decay", "initial_state")] + [ids]

    def run(implementation):
        return lambda *arrays: api.IMPLEMENTATIONS[implementation].run(*arrays, 0.7, bonus)

    found, expected = (jax.jit(run(name))(*arguments) for name in ("loop_forward", "reference"))
    assert (found[0].dtype, found[1].dtype) == (dtype, jnp.float32)
    tolerance = "bfloat16 cut" if dtype == jnp.bfloat16 else "float32"
    assert_close(found, expected, tolerance)

    axes = [None if x is None or x.ndim == 1 else 0 for x in arguments]
    rows = [x if axis is None else x[:, None] for x, axis in zip(arguments, axes, strict=True)]
    one_by_one = jax.jit(jax.vmap(run("loop_forward"), in_axes=axes))(*rows)
    assert_close(jax.tree.map(lambda x: x[:, 0], one_by_one), found, tolerance)


def test_vmap_scan_and_remat():
    inputs, _, (weights, _) = make(Shape(B=2, T=70, H=2, K=3, V=3))
    arguments = [inputs[name] for name in ("q", "k", "v", "log_decay")]

    def loss(q, k, v, g, weights, implementation):
        o, state = linear_attention(q, k, v, g, implementation=implementation)
        return jnp.sum(o * weights) + jnp.sum(jnp.sin(state))

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))

    def row_by_row(*arguments):  # every row once through scan, and vmap over a batch of batches of one row
        rows = [x[:, None, None] for x in arguments]
        body = jax.vmap(jax.checkpoint(lambda *row: gradient(*row, "loop_forward")))
        return jax.lax.scan(lambda carry, row: (carry, body(*row)), 0, rows)[1]

    found = jax.jit(row_by_row)(*arguments, weights)
    expected = jax.jit(gradient, static_argnums=5)(*arguments, weights, "chunked")
    assert_close(tuple(x[:, 0, 0] for x in found), expected, "float32 gradient")


def test_memory_is_linear_in_length():
    """Forward and backward together: temporaries of less than four times the inputs' bytes, at 65,536 tokens. One
    number for each pair of tokens would take 16 GiB."""
    B, T, H, K, V, *_ = shape = Shape(B=1, T=65_536, H=2, K=32, V=32)
    inputs = jax.eval_shape(lambda: make(shape)[0])
    cotangents = (jax.ShapeDtypeStruct((B, T, H, V), jnp.float32), jax.ShapeDtypeStruct((B, H, K, V), jnp.float32))
    compiled = outputs_and_gradients.lower(inputs, None, cotangents, "chunked").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * sum(x.size * 4 for x in inputs.values())


def test_one_token_is_a_direct_step():
    inputs, ids, _ = make(SHAPES["decode"], packed=True)
    positional = [inputs[name] for name in ("q", "k", "v", "log_decay")]
    state = inputs["initial_state"]

    def run(*args):
        return linear_attention(*args, initial_state=state, segment_ids=ids)

    assert "scan" not in str(jax.make_jaxpr(run)(*positional))
    expected = linear_attention(*positional, initial_state=state, segment_ids=ids, implementation="reference")
    assert_close(run(*positional), expected, "float32")


def test_default_follows_device_length_and_state():
    """On a CPU the token loop is the faster one with a small state, and with one decay a head with a large one, too."""
    one, few, many, most = (heads * 64 * 64 for heads in (1, 8, 16, 128))
    for by_channel in (False, True):
        assert api.preferred("cpu", 4096, one, by_channel) == ("loop_forward",)
        assert api.preferred("cpu", 512, few, by_channel) == ("loop_forward",)
        assert api.preferred("cpu", 4096, many, by_channel) == ("chunked",)
        assert api.preferred("cpu", 1, one, by_channel) == ("chunked",)
        for platform in ("gpu", "tpu"):  # the chunked form supports every call
            assert api.preferred(platform, 4096, many, by_channel) == (f"mosaic_{platform}", "chunked")
    assert api.preferred("cpu", 4096, most, by_channel=False) == ("loop_forward",)
    assert api.preferred("cpu", 4096, most, by_channel=True) == ("chunked",)


@pytest.mark.parametrize("heads, decay, expected", [
    (2, "token", "loop_forward"), (2, "channel", "loop_forward"), (4, "channel", "chunked"), (4, None, "chunked"),
    (32, "head", "loop_forward"), (32, None, "loop_forward"), (32, "channel", "chunked"),
])  # fmt: skip
def test_the_default_counts_the_states_of_all_rows_and_heads(heads, decay, expected):
    """Two rows of H heads, K = 64 and V = 128: 2^15 numbers with two heads."""
    q, v = jnp.zeros((2, 4, 1, 64)), jnp.zeros((2, 4, heads, 128))
    shapes = {"token": (2, 4, heads), "channel": (2, 4, heads, 64), "head": (heads,)}
    log_decay = None if decay is None else jnp.zeros(shapes[decay])
    with dispatch.recording_defaults() as chosen, jax.default_device(jax.devices("cpu")[0]):
        jax.eval_shape(linear_attention, q, q, v, log_decay)
    assert chosen == [("linear_attention", expected)]


def test_the_choice_is_logged_once(caplog):
    inputs, _, _ = make(SHAPES["ragged_short"])
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            linear_attention(inputs["q"], inputs["k"], inputs["v"])
    assert [record.getMessage() for record in caplog.records] == [
        "linear_attention: using the 'loop_forward' implementation"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 5, 3))}, r"q of shape \(2, 5, 3\): expected \[B, T, G, K\]"),
        ({"q": jnp.ones((2, 0, 3, 4))}, "nothing empty"),
        ({"k": jnp.ones((2, 5, 3, 6))}, r"k of shape .* the same shape"),
        ({"v": jnp.ones((2, 4, 3, 6))}, r"v of shape .* expected \[2, 5, H, V\] with H = 3"),
        ({"v": jnp.ones((2, 5, 4, 6))}, r"v of shape .* a multiple of it"),
        ({"v": jnp.ones((2, 5, 3, 6), jnp.bfloat16)}, "one float dtype"),
        ({"log_decay": jnp.ones((2, 5, 3, 6))}, r"expected \[2, 5, 3, 4\] .*\[2, 5, 3\] .*\[3\] "),
        ({"bonus": jnp.ones((4, 3))}, r"bonus of shape \(4, 3\): expected \[H, K\] = \[3, 4\]"),
        ({"initial_state": jnp.ones((2, 3, 6, 4))}, r"\[B, H, K, V\] = \[2, 3, 4, 6\]"),
        ({"segment_ids": jnp.ones((2, 4), jnp.int32)}, r"\[B, T\] = \[2, 5\]"),
        (
            {"implementation": "chunky"},
            "implementation='chunky': linear_attention has chunked, loop_forward, mosaic_gpu, mosaic_tpu, reference. "
            "Did you mean 'chunked'",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(change, message):
    call = {"q": jnp.ones((2, 5, 3, 4)), "k": jnp.ones((2, 5, 3, 4)), "v": jnp.ones((2, 5, 3, 6))} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(linear_attention)(**call)  # without the type checker of the tests

import functools
import inspect
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMIZED
from numpy_programs import evaluated
from pallas_kernels import dispatch
from pallas_kernels.delta_rule import api, delta_rule
from pallas_kernels.delta_rule.blocks import solve, unit_inverse
from pallas_kernels.delta_rule.chunked import CHUNK
from pallas_kernels.delta_rule.shapes import SHAPES, Shape
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
NAMES = ("q", "k", "v", "a", "b", "log_decay")


def make(shape, packed=False, seed=0, dtype=jnp.float32):
    """Inputs, segment ids and cotangents of both outputs; a and b as in DeltaNet, with a little of their own."""
    random = np.random.default_rng(seed)
    B, T, H, K, V, decay = shape

    def normal(*sizes):
        return random.standard_normal(sizes)

    key = normal(B, T, H, K)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    gates = {"scalar": (B, T, H), "vector": (B, T, H, K), "none": None}[decay]
    inputs = {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "a": key + 0.05 * normal(B, T, H, K),
        "b": -2 / (1 + np.exp(normal(B, T, H, 1))) * key,
        "log_decay": None if gates is None else -0.2 * np.abs(normal(*gates)),
        "initial_state": normal(B, H, K, V),
    }
    ids = jnp.asarray(np.stack([document_ids(T, row, random) for row in range(B)])) if packed else None
    cotangents = (normal(B, T, H, V), normal(B, H, K, V))
    inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, dtype), (inputs, cotangents))
    return inputs, ids, cotangents


def document_ids(length, row, random):
    """Short documents and padding; row 0 also has a boundary between two chunks and a chunk of padding alone."""
    ids = np.repeat(random.integers(0, 4, length), random.integers(1, 9, length))[:length].astype(np.int32)
    if row == 0:
        ids[CHUNK - 1 : CHUNK + 1] = [5, 6][: len(ids[CHUNK - 1 : CHUNK + 1])]
        ids[2 * CHUNK : 3 * CHUNK] = 0
    return ids


def with_gradients(inputs, ids, cotangents, implementation):
    def run(inputs):
        positional = [inputs[name] for name in NAMES]
        state = inputs["initial_state"]
        return delta_rule(*positional, initial_state=state, segment_ids=ids, implementation=implementation)

    outputs, pullback = jax.vjp(run, inputs)
    return outputs, pullback(cotangents)[0]


def outputs_and_gradients(*case):
    """Evaluated: a gradient of the chunked form takes 5 s to compile, which its suite does for each kind of call."""
    *case, implementation = case
    return evaluated(functools.partial(with_gradients, implementation=implementation))(*case)


compiled = jax.jit(with_gradients, static_argnames="implementation")
fast_outputs_and_gradients = jax.jit(with_gradients, static_argnames="implementation", compiler_options=OPTIMIZED)


@pytest.mark.parametrize(
    ("shape", "packed"),
    [
        (Shape(B=2, T=150, H=2, K=5, V=3, decay="vector"), True),
        (Shape(B=1, T=70, H=2, K=1, V=3, decay="vector"), False),
        (Shape(B=1, T=CHUNK + 1, H=2, K=4, V=3), False),  # a last chunk of one token
    ],
    ids=lambda x: f"T{x.T}-{x.decay}" if isinstance(x, Shape) else "packed" if x else "",
)
def test_chunked_equals_token_by_token(shape, packed):
    case = make(shape, packed)
    outputs, gradients = outputs_and_gradients(*case, "chunked")
    expected_outputs, expected_gradients = outputs_and_gradients(*case, "reference")
    assert_close(outputs, expected_outputs, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


def test_documents_alone_give_what_they_give_packed():
    inputs, _, _ = make(Shape(B=1, T=100, H=2, K=4, V=4, decay="vector"))
    ids = np.zeros((1, 100), np.int32)
    ids[0, 5:41], ids[0, 47:60], ids[0, 60:97] = 1, 1, 2
    tokens = [np.asarray(inputs[name]) for name in NAMES]
    chunked, token_by_token = (
        evaluated(functools.partial(delta_rule, implementation=name)) for name in ("chunked", "reference")
    )
    packed, state = chunked(*tokens, segment_ids=ids)
    packed = np.asarray(packed)
    for document in (1, 2):
        at = np.flatnonzero(ids[0] == document)
        alone, alone_state = token_by_token(*[x[:, at] for x in tokens])
        assert_close(packed[:, at], alone, "float32")
    assert_close(state, alone_state, "float32")
    assert not packed[ids == 0].any()


def conversions(golden):
    """The call of the op for one model's own inputs, as the docstring of `delta_rule` says, and its scale."""
    if "kk" in golden:
        b = golden["kk"] * golden["a"]
        return (golden["r"], golden["k"], golden["v"], -golden["kk"], b, golden["w"]), 1.0
    beta = golden["beta"][..., None]
    log_decay = golden.get("g")
    a = golden["k"]
    if log_decay is not None:
        a = a * jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    return (golden["q"], golden["k"], beta * golden["v"], a, -beta * golden["k"], log_decay), None


@pytest.mark.parametrize("name", ["delta_rule", "gated_delta_rule", "kda", "rwkv7"])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_oracle(name, implementation):
    """Numbers of flash-linear-attention: outputs, final state, every gradient."""
    golden = {key: jnp.asarray(value) for key, value in np.load(GOLDEN / f"{name}_fla.npz").items()}
    inputs = {key: golden[key] for key in golden if f"d{key}" in golden and key not in ("o", "final_state")}

    def run(inputs):
        arguments, scale = conversions(inputs)
        return delta_rule(*arguments, initial_state=inputs["h0"], scale=scale, implementation=implementation)

    def with_pullback(inputs, cotangents):
        outputs, pullback = jax.vjp(run, inputs)
        return outputs, pullback(cotangents)[0]

    program = evaluated if implementation == "chunked" else jax.jit
    outputs, gradients = program(with_pullback)(inputs, (golden["do"], golden["dfinal_state"]))
    assert_close(outputs, (golden["o"], golden["final_state"]), "float32 oracle")
    assert {"k", "v", "h0"} < set(gradients)
    assert_close(gradients, {key: golden[f"d{key}"] for key in inputs}, "float32 oracle")


def test_float64():
    with jax.enable_x64(True):
        case = make(Shape(B=2, T=100, H=2, K=4, V=6, decay="vector"), packed=True, dtype=jnp.float64)
        outputs, gradients = outputs_and_gradients(*case, "chunked")
        expected = outputs_and_gradients(*case, "reference")
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(outputs))
        assert_close((outputs, gradients), expected, "float64")


GATES = {
    "slow": lambda random, shape: np.full(shape, -1e-6),
    "fast": lambda random, shape: np.full(shape, -20.0),
    "none": lambda random, shape: np.zeros(shape),
    "mixed": lambda random, shape: random.choice([-1e-6, -1e-3, -20.0, -100.0], shape, p=[0.5, 0.3, 0.1, 0.1]),
    "shut": lambda random, shape: random.choice([-1e-6, -1e4, -np.inf], shape, p=[0.9, 0.05, 0.05]),
}


@functools.partial(jax.jit, compiler_options=OPTIMIZED)
def exact_loop(inputs):
    scale = inputs["k"].shape[-1] ** -0.5
    arguments = [inputs[name] for name in (*NAMES, "initial_state")]
    return api.IMPLEMENTATIONS["reference"].run(*arguments, None, scale)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_extreme_gates_over_a_long_sequence(decay):
    """65,536 tokens, one head for each kind of gate, against float64 token by token (gradients: float64 chunked), which
    is given scalar gates as vectors of equal ones."""
    length, width, heads = 65_536, 4, len(GATES)
    random = np.random.default_rng(0)
    inputs, ids, cotangents = make(Shape(B=1, T=length, H=heads, K=width, V=width))
    shape = (length, width) if decay == "vector" else (length,)
    gates = np.stack([gate(random, shape) for gate in GATES.values()], axis=1)
    inputs, cotangents = jax.device_get((inputs, cotangents))
    inputs["log_decay"] = gates[None].astype(np.float32)
    # a unit key and beta from 0 to 2, so that without decay nothing grows
    inputs["a"] = -inputs["b"] / np.linalg.norm(inputs["b"], axis=-1, keepdims=True)
    outputs, gradients = jax.device_get(fast_outputs_and_gradients(inputs, ids, cotangents, "chunked"))
    with jax.enable_x64(True):
        exact, exact_cotangents = jax.tree.map(np.float64, (inputs, cotangents))
        if decay == "scalar":
            exact["log_decay"] = np.repeat(exact["log_decay"][..., None], width, axis=-1)
        expected = jax.device_get(exact_loop(exact))
        _, expected_gradients = jax.device_get(fast_outputs_and_gradients(exact, ids, exact_cotangents, "chunked"))
    if decay == "scalar":
        expected_gradients["log_decay"] = expected_gradients["log_decay"].sum(-1)
    for head, kind in enumerate(GATES):
        assert_close(outputs[0][:, :, head], expected[0][:, :, head], "float32", kind)
        assert_close(outputs[1][:, head], expected[1][:, head], "float32", kind)
        for name, gradient in gradients.items():
            axis = 1 if name == "initial_state" else 2
            found, wanted = (np.take(g, head, axis=axis) for g in (gradient, expected_gradients[name]))
            assert_close(found, wanted, "float32 gradient", f"{kind} d{name}")


def test_unit_inverse_is_forward_substitution():
    """Also where entries of the matrix are large: then its powers are, and a series of them would lose everything."""
    lower = np.tril(3.0 * np.random.default_rng(0).standard_normal((2, 16, 16)), -1)
    expected = np.linalg.inv(np.eye(16) - lower)
    marked = lower + 7 * np.triu(np.ones((2, 16, 16)))  # above the diagonal nothing is read
    right, weights = np.random.default_rng(1).standard_normal((2, 2, 16, 3))

    @jax.jit
    def inverse_and_gradients(marked, right, weights):
        found = jax.vjp(solve, marked, right)[1](weights)
        wanted = jax.vjp(lambda lower, right: unit_inverse(lower) @ right, marked, right)[1](weights)
        return unit_inverse(marked), found, wanted

    with jax.enable_x64(True):
        inverse, found, wanted = jax.device_get(inverse_and_gradients(marked, right, weights))
    assert_close(inverse, expected, "float64")
    assert_close(found, wanted, "float64")


def test_vmap_scan_and_remat():
    inputs, _, (weights, _) = make(Shape(B=2, T=40, H=2, K=3, V=3, decay="vector"))
    arguments = [inputs[name] for name in NAMES]

    def loss(*arguments):
        *arguments, weights = arguments
        o, state = delta_rule(*arguments, implementation="chunked")
        return jnp.sum(o * weights) + jnp.sum(jnp.sin(state))

    gradient = jax.grad(loss, argnums=range(6))

    def row_by_row(*arguments):  # every row once through scan, and vmap over a batch of batches of one row
        rows = [x[:, None, None] for x in arguments]
        body = jax.vmap(jax.checkpoint(gradient))
        return jax.lax.scan(lambda carry, row: (carry, body(*row)), 0, rows)[1]

    found = evaluated(row_by_row)(*arguments, weights)
    expected = evaluated(gradient)(*arguments, weights)
    assert_close(tuple(x[:, 0, 0] for x in found), expected, "float32 gradient")


def test_memory_is_linear_in_length():
    """Forward and backward together: temporaries of less than five times the inputs' bytes, at 65,536 tokens. One
    number for each pair of tokens would take 16 GiB."""
    B, T, H, K, V, _ = shape = Shape(B=1, T=65_536, H=2, K=32, V=32, decay="vector")
    inputs = jax.eval_shape(lambda: make(shape)[0])
    cotangents = (jax.ShapeDtypeStruct((B, T, H, V), jnp.float32), jax.ShapeDtypeStruct((B, H, K, V), jnp.float32))
    program = compiled.lower(inputs, None, cotangents, "chunked").compile()
    assert program.memory_analysis().temp_size_in_bytes < 5 * sum(x.size * 4 for x in inputs.values())


def test_one_token_is_a_direct_step():
    inputs, ids, _ = make(SHAPES["decode"], packed=True)
    state = inputs["initial_state"]

    def run(*args):
        return delta_rule(*args, initial_state=state, segment_ids=ids)

    positional = [inputs[name] for name in NAMES]
    assert "scan" not in str(jax.make_jaxpr(run)(*positional))
    step = functools.partial(delta_rule, implementation="reference")
    expected = evaluated(lambda *args: step(*args, initial_state=state, segment_ids=ids))(*positional)
    assert_close(jax.jit(run)(*positional), expected, "float32")


def test_default_follows_the_device():
    assert api.preferred("cpu") == ("chunked",)
    assert api.preferred("gpu") == ("mosaic_gpu", "chunked") and api.preferred("tpu") == ("mosaic_tpu", "chunked")


def test_the_choice_is_logged_once(caplog):
    inputs, _, _ = make(SHAPES["ragged_short"])
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            jax.eval_shape(lambda inputs: delta_rule(*[inputs[name] for name in NAMES]), inputs)
    assert [record.getMessage() for record in caplog.records] == ["delta_rule: using the 'chunked' implementation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 5, 3))}, r"q of shape \(2, 5, 3\): expected \[B, T, H, K\]"),
        ({"q": jnp.ones((2, 0, 3, 4))}, "nothing empty"),
        ({"k": jnp.ones((2, 5, 3, 6))}, r"k of shape .* the same shape"),
        ({"b": jnp.ones((2, 5, 3))}, r"b of shape .* the same shape"),
        ({"v": jnp.ones((2, 4, 3, 6))}, r"v of shape .* expected \[2, 5, 3, V\]"),
        ({"a": jnp.ones((2, 5, 3, 4), jnp.bfloat16)}, "dtypes float32, float32, float32, bfloat16, .* one float dtype"),
        ({"log_decay": jnp.ones((3,))}, r"log_decay of shape \(3,\).*\[2, 5, 3\].*\[2, 5, 3, 4\]"),
        ({"log_decay": jnp.ones((2, 5, 3), jnp.int32)}, "log_decay of dtype int32"),
        ({"initial_state": jnp.ones((2, 3, 6, 4))}, r"\[B, H, K, V\] = \[2, 3, 4, 6\]"),
        ({"segment_ids": jnp.ones((2, 4), jnp.int32)}, r"\[B, T\] = \[2, 5\]"),
        (
            {"implementation": "chunky"},
            "implementation='chunky': delta_rule has chunked, mosaic_gpu, mosaic_tpu, reference. "
            "Did you mean 'chunked'",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(change, message):
    call = dict.fromkeys(("q", "k", "a", "b"), jnp.ones((2, 5, 3, 4))) | {"v": jnp.ones((2, 5, 3, 6))} | change
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(delta_rule)(**call)  # without the type checker of the tests

"""The selective scan: every implementation against float64 numbers, the reference, and its own promises."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMIZED
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "selective_scan.npz"


@pytest.fixture(params=["chunked", "reference"])  # those that run on a CPU
def implementation(request):
    return request.param


run = jax.jit(selective_scan, static_argnames="implementation")


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, inputs, cotangents):
    outputs, pull_back = jax.vjp(function, inputs)
    return outputs, pull_back(cotangents)[0]


def official(variant, inputs, implementation):
    """The computation of the golden numbers (channels before time): softplus and bias before our scan."""
    dt = inputs["delta"]
    if "delta_bias" in inputs:
        dt = jax.nn.softplus(dt + inputs["delta_bias"][None, :, None])
    y, state = selective_scan(
        inputs["u"].swapaxes(1, 2), dt.swapaxes(1, 2), inputs["A"],
        inputs["B"].swapaxes(1, 2), inputs["C"].swapaxes(1, 2), inputs.get("D"),
        gate=inputs["z"].swapaxes(1, 2) if "z" in inputs else None,
        initial_state=inputs.get("h0"), implementation=implementation,
    )  # fmt: skip
    return y.swapaxes(1, 2), state


@pytest.mark.parametrize("variant", ["plain", "full", "init_state"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_golden_outputs_states_and_gradients(variant, dtype, implementation):
    with jax.enable_x64(dtype == "float64"):
        arrays = {k.split("/")[1]: v for k, v in np.load(GOLDEN).items() if k.startswith(f"{variant}/")}
        outputs = {"y", "last_state"}
        gradients = {k: v for k, v in arrays.items() if k.startswith("d_")}
        inputs = {k: jnp.asarray(arrays[k.removeprefix("d_")], dtype) for k in gradients}
        inputs = {k.removeprefix("d_"): v for k, v in inputs.items()}
        assert set(arrays) == outputs | set(gradients) | set(inputs) | {f"ct_{k}" for k in outputs}
        cotangents = tuple(jnp.asarray(arrays[k], dtype) for k in ("ct_y", "ct_last_state"))
        function = functools.partial(official, variant, implementation=implementation)
        found, pulled = with_gradients(function, inputs, cotangents)
        kind = "float32" if dtype == "float32" else "float64"
        assert_close(found, (arrays["y"], arrays["last_state"]), kind)
        kind = "float32 gradient" if dtype == "float32" else "float64"
        assert_close(pulled, {k.removeprefix("d_"): v for k, v in gradients.items()}, kind)


def example(batch=2, length=63, width=6, states=5):
    random = np.random.default_rng(0)
    normal = random.standard_normal
    inputs = {
        "x": normal((batch, length, width)),
        "dt": np.logaddexp(normal((batch, length, width)) - 1, 0),
        "A": -np.exp(normal((width, states))),
        "B": normal((batch, length, states)),
        "C": normal((batch, length, states)),
        "D": normal((width,)),
        "initial_state": normal((batch, width, states)),
    }
    return {name: jnp.asarray(values, jnp.float32) for name, values in inputs.items()}


def packed_ids(batch, length):
    """Documents of about 20 tokens, with a seventh of the tokens padding."""
    steps = np.arange(length)
    ids = np.stack([1 + (steps + 5 * b) // 20 % 3 for b in range(batch)])
    ids[:, steps % 7 == 3] = 0
    return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize(
    ("batch", "length", "width", "packed"),
    [(5, 200, 700, True), (4, 33, 3, False)],  # rows in groups, and not
)
def test_chunked_equals_reference(batch, length, width, packed):
    inputs = example(batch, length, width)
    ids = packed_ids(batch, length) if packed else None
    random = np.random.default_rng(9)
    cotangents = tuple(random.standard_normal(inputs[k].shape, np.float32) for k in ("x", "initial_state"))

    def call(inputs, implementation):
        return selective_scan(**inputs, segment_ids=ids, implementation=implementation)

    chunked, reference = (functools.partial(call, implementation=form) for form in ("chunked", "reference"))
    outputs, gradients = with_gradients(chunked, inputs, cotangents)
    expected, expected_gradients = with_gradients(reference, inputs, cotangents)
    assert_close(outputs, expected, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


def test_a_boundary_forgets_and_padding_waits(implementation):
    inputs = example(1, 12)
    inputs = jax.device_get(inputs)
    ids = np.array([[0, 4, 4, 0, 4, 9, 9, 9, 0, 4, 4, 0]], np.int32)
    y, state = jax.device_get(run(**inputs, segment_ids=ids, implementation=implementation))
    for tokens, fresh in (([1, 2, 4], False), ([5, 6, 7], True), ([9, 10], True)):
        own = {k: v[:, tokens] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        if fresh:
            own["initial_state"] = np.zeros_like(own["initial_state"])
        y_own, state_own = run(**own, implementation="reference")
        assert_close(y[:, tokens], y_own, "float32")
    assert_close(state, state_own, "float32")
    assert not y[0, [0, 3, 8, 11]].any()


run_optimized = jax.jit(selective_scan, compiler_options=OPTIMIZED)


@pytest.mark.parametrize("bias", [-16.0, -4.0, 4.0], ids=["remembers all", "mixed", "forgets at once"])
def test_long_sequences_stay_exact(bias):
    """65,536 tokens in float32 against float64, with decays at both extremes."""
    length, width, states = 65_536, 4, 4
    inputs = example(1, length, width, states)
    steps = np.random.default_rng(3).standard_normal((1, length, width)) + bias
    inputs["dt"] = jnp.asarray(np.logaddexp(steps, 0), jnp.float32)
    y, state = run_optimized(**inputs)
    with jax.enable_x64(True):
        exact = {k: jnp.asarray(np.asarray(v), jnp.float64) for k, v in inputs.items()}
        y_exact, state_exact = run(**exact, implementation="reference")
        y_exact, state_exact = np.asarray(y_exact), np.asarray(state_exact)
    assert_close((y, state), (y_exact, state_exact), "float32 recurrence of 65,536 steps")


def largest_intermediate(jaxpr):
    """The most elements that any value of a program has, in its loops and calls too."""
    size = max((v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")), default=0)
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                size = max(size, largest_intermediate(inner))
    return size


def test_never_holds_every_state():
    batch, length, width, states = 2, 4096, 8, 16
    inputs = example(batch, length, width, states)

    def loss(inputs):
        y, state = selective_scan(**inputs)
        return (y**2).sum() + (state**2).sum()

    everything = batch * length * width * states
    for function in (loss, jax.grad(loss)):
        assert largest_intermediate(jax.make_jaxpr(function)(inputs).jaxpr) <= everything // 8


def test_dtypes(implementation):
    inputs = example()
    rounded = inputs | {k: inputs[k].astype(jnp.bfloat16) for k in ("x", "B", "C")}
    y, state = run(**rounded, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32
    assert_close(y, run(**inputs, implementation="reference")[0], "bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": jnp.zeros((2, 62, 6))}, r"dt: shape \(2, 62, 6\); expected \(2, 63, 6\)"),
        ({"A": jnp.zeros((7, 5))}, r"A: shape \(7, 5\); expected \(6, 5\)"),
        ({"C": jnp.zeros((2, 63, 4))}, "C: shape"),
        ({"gate": jnp.zeros((2, 63, 5))}, r"gate: shape \(2, 63, 5\); expected \(2, 63, 6\)"),
        ({"initial_state": jnp.zeros((2, 5, 6))}, "initial_state: shape"),
        ({"implementation": "chunk"}, "implementation='chunk': selective_scan has chunked, mosaic_gpu, mosaic_tpu, reference. Did"),
        ({"x": jnp.zeros((2, 0, 6)), "dt": jnp.zeros((2, 0, 6)), "B": jnp.zeros((2, 0, 5)),
          "C": jnp.zeros((2, 0, 5))}, "with nothing empty"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(change, message):
    # The annotations would refuse most of these first; users have no annotation checker installed.
    unchecked = getattr(selective_scan, "__wrapped__", selective_scan)
    with pytest.raises(ValueError, match=message):
        unchecked(**(example() | change))

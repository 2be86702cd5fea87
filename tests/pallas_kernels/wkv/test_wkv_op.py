"""WKV: every implementation against float64 numbers, the reference, and its own promises."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMIZED
from pallas_kernels.wkv import WKVState, chunked, wkv
from pallas_kernels.wkv.api import IMPLEMENTATIONS, preferred
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "wkv4.npz"


run = jax.jit(wkv, static_argnames="implementation")


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    """Chunks of eight tokens, a few of them together: so that short calls have boundaries of both kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", 8)
        patch.setattr(chunked, "ROW_ELEMENTS", 48)
        yield


def sums(state):
    """num and den as they are, not divided by exp(max)."""
    return state.num * jnp.exp(state.max), state.den * jnp.exp(state.max)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_golden_outputs_states_and_gradients(dtype, implementation):
    with jax.enable_x64(dtype == "float64"):
        golden = dict(np.load(GOLDEN))
        inputs = {name: jnp.asarray(golden[name], dtype) for name in ("k", "v", "w", "u")}

        def golden_outputs(inputs):
            y, state = wkv(
                inputs["k"], inputs["v"], -jnp.exp(inputs["w"]), inputs["u"], implementation=implementation
            )
            return y, *sums(state)

        @jax.jit
        def pull(inputs, cotangents):
            outputs, pull_back = jax.vjp(golden_outputs, inputs)
            return outputs, pull_back(cotangents)[0]

        cotangents = tuple(jnp.asarray(golden[f"ct_{name}"], dtype) for name in ("y", "num", "den"))
        found, gradients = pull(inputs, cotangents)
        kinds = ("float32", "float32 gradient") if dtype == "float32" else ("float64", "float64")
        assert_close(found, (golden["y"], golden["num"], golden["den"]), kinds[0])
        assert_close(gradients, {name: golden[f"d_{name}"] for name in inputs}, kinds[1])


def example(batch=2, length=63, width=6, dtype=jnp.float32):
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape)

    inputs = {
        "k": 2 * normal(batch, length, width),
        "v": normal(batch, length, width),
        "log_decay": -np.exp(np.linspace(-7.0, 2.0, width)),
        "bonus": normal(width),
        "initial_state": WKVState(normal(batch, width), 1 + np.exp(normal(batch, width)), normal(batch, width)),
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), inputs)


def packed_ids(batch, length):
    """Documents of about 20 tokens, with a seventh of the tokens padding."""
    steps = np.arange(length)
    ids = np.stack([1 + (steps + 5 * b) // 20 % 3 for b in range(batch)])
    ids[:, steps % 7 == 3] = 0
    return jnp.asarray(ids, jnp.int32)


def meaning(state):
    """The average and the logarithm of den: what a state says, whatever the rounding of its max, which decays by
    subtraction and in float32 is off by its own last place for every token; the sums make up for it."""
    return state.num / state.den, state.max + jnp.log(state.den)


@functools.partial(jax.jit, static_argnames=("implementation", "of_state"))
def with_gradients(inputs, ids, implementation, of_state):
    """Outputs, and all gradients, given cotangents of the outputs and of each leaf of `of_state(final state)`."""

    def run(inputs):
        y, state = wkv(**inputs, segment_ids=ids, implementation=implementation)
        return y, of_state(state)

    outputs, pull_back = jax.vjp(run, inputs)
    random = np.random.default_rng(9)
    weights = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype), outputs)
    return outputs, pull_back(weights)[0]


def forms_agree(inputs, ids, first, second, of_state=meaning, kinds=("float32", "float32 gradient")):
    outputs, gradients = with_gradients(inputs, ids, first, of_state)
    expected, expected_gradients = with_gradients(inputs, ids, second, of_state)
    assert_close(outputs, expected, kinds[0])
    assert_close(gradients, expected_gradients, kinds[1])
    return gradients


@pytest.mark.parametrize(
    ("batch", "length", "width", "packed"),
    [(2, 63, 6, True), (3, 1, 4, True), (1, 150, 5, False), (2, 24, 50, True)],
)
def test_chunked_equals_reference(batch, length, width, packed):
    ids = packed_ids(batch, length) if packed else None
    gradients = forms_agree(example(batch, length, width), ids, "chunked", "reference")
    for leaf in jax.tree.leaves(gradients):
        assert np.asarray(leaf).any()


def test_every_leaf_of_the_states():
    """num, den and max as they stand, and their gradients, in float64."""
    with jax.enable_x64(True):
        inputs = example(dtype=jnp.float64)
        kinds = ("float64", "float64")
        ids = packed_ids(2, 63)
        gradients = forms_agree(inputs, ids, "chunked", "reference", lambda state: state, kinds)
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(gradients))
        rounded = jax.tree.map(np.float32, inputs)
        outputs = with_gradients(rounded, ids, "chunked", lambda state: state)[0]
        expected = with_gradients(inputs, ids, "reference", lambda state: state)[0]
        assert_close(outputs, jax.tree.map(np.asarray, expected), "float32")


def test_loop_forward_has_the_gradients_of_the_chunks():
    forms_agree(example(), packed_ids(2, 63), "loop_forward", "reference")


@pytest.mark.parametrize("size", [200.0, 1000.0])
def test_huge_exponents(size):
    """exp(k) and 1 / exp(k) are out of float32's range; from the empty state, and across documents and padding."""
    inputs = example() | {"initial_state": None}
    for sign in (-1, 1):
        large = inputs | {"k": sign * size + 3 * inputs["k"]}
        forms_agree(large, packed_ids(2, 63), "chunked", "reference")
        y, _ = jax.device_get(run(**large, implementation="reference"))
        assert_close(y[:, 0], inputs["v"][:, 0], "float32")  # the first token reads itself alone
        with jax.enable_x64(True):  # y is that of keys of ordinary size: what is added to all of them drops out
            exact = {name: np.asarray(leaf, np.float64) for name, leaf in large.items() if leaf is not None}
            exact = jax.tree.map(jnp.asarray, exact | {"k": exact["k"] - sign * size})
            expected, _ = run(**exact, implementation="reference")
        assert_close(y, expected, "float32 oracle")  # keys of 1000 are rounded to 6e-5
    spread = inputs | {"k": size * inputs["k"]}
    forms_agree(spread, None, "chunked", "reference")


def test_a_boundary_forgets_and_padding_waits(implementation):
    inputs = jax.device_get(example(1, 12))
    ids = np.array([[0, 4, 4, 0, 4, 9, 9, 9, 0, 4, 4, 0]], np.int32)
    y, state = jax.device_get(run(**inputs, segment_ids=ids, implementation=implementation))
    for tokens, fresh in (([1, 2, 4], False), ([5, 6, 7], True), ([9, 10], True)):
        own = inputs | {"k": inputs["k"][:, tokens], "v": inputs["v"][:, tokens]}
        y_own, state_own = run(**own | ({"initial_state": None} if fresh else {}), implementation="reference")
        assert_close(y[:, tokens], y_own, "float32")
    assert_close(state, state_own, "float32")
    assert not y[0, [0, 3, 8, 11]].any()


@pytest.mark.parametrize("rest", [None, 10.0], ids=["from nothing", "after zeroed sums"])
def test_zero_sums_are_no_past(rest, implementation):
    """Whatever `max` stands beside them; and padding leaves them as they are."""
    inputs = example() | {"initial_state": None}
    expected = run(**inputs, implementation="reference")
    zero = jnp.zeros((2, 6))
    empty = WKVState(zero, zero, zero if rest is None else zero + rest)
    found = run(**inputs | {"initial_state": empty}, implementation=implementation)
    assert_close(found, expected, "float32")
    nothing = jnp.zeros((2, 63), jnp.int32)
    y, after = run(**inputs | {"initial_state": empty}, segment_ids=nothing, implementation=implementation)
    assert not np.asarray(y).any() and not np.asarray(after.num).any() and not np.asarray(after.den).any()


@pytest.mark.parametrize("form", ["reference", "chunked", "loop_forward"])
def test_what_stands_in_padding_is_never_used(form):
    """NaN in it is as good as zeros, in the cotangent too."""
    inputs, ids = jax.device_get(example(2, 63)), packed_ids(2, 63)

    def run(filling):
        filled = {n: jnp.where(ids[..., None] == 0, filling, a) if n in ("k", "v") else a for n, a in inputs.items()}
        (y, state), pull = jax.vjp(lambda inputs: wkv(**inputs, segment_ids=ids, implementation=form), filled)
        cotangent = jnp.where(ids[..., None] == 0, filling, jnp.cos(y))
        return y, state, pull((cotangent, jax.tree.map(jnp.ones_like, state)))[0]

    jax.tree.map(np.testing.assert_array_equal, *(jax.jit(run)(filling) for filling in (jnp.nan, 0.0)))


def test_long_sequences_stay_exact(monkeypatch):
    """65,536 tokens in float32 against float64: decays that keep all and nothing (of zero, -0.0 and -inf too)."""
    monkeypatch.undo()
    decays = jnp.array([-0.0, -1e-7, -1e-5, -1e-3, -1.0, -200.0, -1e9, -jnp.inf])
    k, v = jax.random.normal(jax.random.key(3), (2, 1, 65_536, len(decays)))
    inputs = {"k": 3 * k, "v": 1 + v, "log_decay": decays, "bonus": jnp.linspace(-2.0, 2.0, len(decays))}
    y, state = jax.jit(lambda inputs: wkv(**inputs, implementation="chunked"), compiler_options=OPTIMIZED)(inputs)
    found = (y, meaning(state))
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(np.asarray(leaf, np.float64)) for name, leaf in inputs.items()}
        expected = jax.jit(lambda inputs: wkv(**inputs, implementation="reference"))(exact)
        expected = jax.tree.map(np.asarray, (expected[0], meaning(expected[1])))
    assert y.dtype == jnp.float32 and expected[0].dtype == np.float64
    for channel in range(len(decays)):  # one by one: the sums differ in size
        of_channel = jax.tree.map(lambda leaf, c=channel: np.asarray(leaf)[..., c], (found, expected))
        assert_close(*of_channel, "float32 recurrence of 65,536 steps", f"log decay {decays[channel]}")


def test_dtypes(implementation):
    inputs = example() | {"initial_state": None}
    rounded = inputs | {name: inputs[name].astype(jnp.bfloat16) for name in ("k", "v")}
    y, state = run(**rounded, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in state} == {jnp.dtype(jnp.float32)}
    assert_close(y, run(**inputs, implementation="reference")[0], "bfloat16")


def test_the_default_is_the_loop_that_learns_in_chunks():
    assert preferred("cpu", 4096) == ("loop_forward",)
    assert preferred("cpu", 1) == preferred("gpu", 1) == ("reference",)
    assert preferred("gpu", 4096) == ("chunked",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((2, 6))}, r"k: shape \(2, 6\); expected \[B, T, D\] with nothing empty"),
        ({"k": jnp.zeros((2, 0, 6)), "v": jnp.zeros((2, 0, 6))}, r"k: shape \(2, 0, 6\); expected"),
        ({"v": jnp.zeros((2, 62, 6))}, r"v: shape \(2, 62, 6\); expected \(2, 63, 6\) beside k \(2, 63, 6\)"),
        ({"log_decay": jnp.zeros((2, 6))}, r"log_decay: shape \(2, 6\); expected \(6,\)"),
        ({"bonus": jnp.zeros((7,))}, r"bonus: shape \(7,\); expected \(6,\)"),
        ({"segment_ids": jnp.zeros((2, 62), jnp.int32)}, r"segment_ids: shape \(2, 62\); expected \(2, 63\)"),
        ({"segment_ids": jnp.zeros((2, 63), jnp.float32)}, "segment_ids of dtype float32: expected int32"),
        ({"initial_state": WKVState(*[jnp.zeros((2, 5))] * 3)},
         r"initial_state.num: shape \(2, 5\); expected \(2, 6\)"),
        ({"implementation": "chunk"}, "implementation='chunk': wkv has chunked, loop_forward, reference. Did you mean"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(change, message):
    # The annotations would refuse most of these first; users have no annotation checker installed.
    unchecked = getattr(wkv, "__wrapped__", wkv)
    with pytest.raises(ValueError, match=message):
        unchecked(**(example() | change))

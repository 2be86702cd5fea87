"""What NumPy evaluates is what XLA computes: each primitive, control flow, and simulated kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu, tpu
from numpy_programs import evaluated, traced
from pallas_kernels import devices
from pallas_kernels.conformance import compiled
from pallas_kernels.delta_rule import conformance as delta_rule
from pallas_kernels.linear_attention import conformance as linear_attention
from pallas_kernels.tolerances import TOLERANCE, error

RNG = np.random.default_rng(0)
X, Y = (RNG.standard_normal((3, 4, 5)).astype(np.float32) for _ in range(2))
POSITIVE = np.abs(X) + 0.1
WHOLE = RNG.integers(-9, 9, (3, 4, 5)).astype(np.int32)
OTHER = np.where(WHOLE[::-1] == 0, 3, WHOLE[::-1]).astype(np.int32)
HALVES = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Y, jnp.bfloat16)
SPECIAL = np.asarray([np.nan, np.inf, -np.inf, 3e9, -3e9, 2.7, -2.7, 0.0], np.float32)
lax = jax.lax

ONE = (jnp.exp, jnp.exp2, jnp.expm1, jnp.tanh, jnp.sin, jnp.cos, jnp.floor, jnp.ceil, jnp.abs, jnp.square, jnp.sign,
       jax.nn.sigmoid, jnp.negative, jnp.isfinite, jax.nn.softplus)  # fmt: skip
OF_HALVES = (jnp.exp, jnp.exp2, jnp.tanh, jax.nn.sigmoid, lax.rsqrt)
OF_TWO = (jnp.add, jnp.subtract, jnp.multiply, jnp.divide, jnp.maximum, jnp.minimum, jnp.less, jnp.less_equal,
          jnp.greater, jnp.greater_equal)  # fmt: skip
OF_WHOLE = (lax.div, lax.rem, jnp.floor_divide, jnp.mod, jnp.equal, jnp.not_equal, jnp.bitwise_and, jnp.bitwise_or,
            jnp.bitwise_xor, lax.shift_left, lax.shift_right_arithmetic, lax.shift_right_logical)  # fmt: skip
OVER_ONE = (jnp.sum, jnp.max, jnp.min, jnp.prod, jnp.argmax, jnp.argmin)
PRODUCTS = ("abc,abd->acd", "abc,dec->abde", "abc,abc->", "abc,abc->cb", "abc,dbe->eadc")
AT = np.array([2, 0, 1, 5])


def each(functions):
    return lambda *operands: [function(*operands) for function in functions]


PROGRAMS = {
    "one operand": [
        (each(ONE), X),
        (each((jnp.log, jnp.log1p, jnp.sqrt, lax.rsqrt)), POSITIVE),
        (each(OF_HALVES), jnp.abs(HALVES[0])),
        (lambda x: [x**3, x**-2, x**0, jnp.isnan(x), jnp.maximum(x, 0), jnp.exp(x)], SPECIAL),
    ],
    "two operands": [
        (each(OF_TWO), X, Y),
        (each(OF_TWO), *HALVES),
        (lambda x, y: [lax.rem(x, y), x**y, lax.clamp(0.2, x, 0.9), jnp.where(x < y, x, y)], POSITIVE, POSITIVE[::-1]),
        (each(OF_WHOLE), WHOLE, OTHER),
        (lambda x: ~x, WHOLE),
    ],
    "dtypes": [
        (lambda x: [x.astype(t) for t in (jnp.int32, jnp.int8, jnp.uint8, jnp.bool_, jnp.float16)], SPECIAL),
        (lambda x: x.astype(jnp.bfloat16), SPECIAL),
        (lambda x: [lax.bitcast_convert_type(x, t) for t in (jnp.int32, jnp.int16, jnp.int8)], X),
        (lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int16), jnp.float32), X),
        (lambda x: [x.astype(jnp.float32), x.astype(jnp.bool_), x > 0], WHOLE),
        (lambda x: [tpu.bitcast(tpu.bitcast(x, jnp.int16), jnp.bfloat16)], X),
    ],
    "shapes": [
        (lambda x: [x.reshape(-1, 2), x.transpose(2, 0, 1), x[:, None], x[::-1], x[1:, ::2], jnp.flip(x, (0, 2))], X),
        (lambda x: [lax.broadcasted_iota(jnp.int32, (2, 3, 4), 1), jnp.broadcast_to(x, (2, 3, 4, 5))], X),
        (lambda x: lax.pad(x, 2.0, [(1, 2, 1), (-1, 0, 0), (0, -2, 2)]), X),
        (lambda x: lax.pad(x, 2.0, [(-4, 9, 0), (0, 0, 0), (0, 0, 0)]), X),
        (lambda x, y: [jnp.concatenate([x, y], 1), jnp.stack([x, y], 1), *jnp.split(x, [1, 3], axis=1)], X, Y),
        (lambda x, i: lax.dynamic_slice(x, (i, -i, i), (2, 2, 3)), X, np.int32(2)),
        (lambda x, i: lax.dynamic_update_slice(x, x[:2, :2] * 2, (i, i, i)), X, np.int32(2)),
        (lambda x: [jnp.roll(x, 2, 1), tpu.roll(x, 3, 2), jnp.squeeze(x[:1], 0), jnp.repeat(x, 3, axis=1), *x], X),
    ],
    "sums": [
        (lambda x: [f(x, axis=axis) for f in OVER_ONE for axis in (0, 1, 2)], X),
        (lambda x: [jnp.sum(x, (0, 2)), jnp.all(x > 0, 1), jnp.any(x > 0, 1), jnp.sum(x > 0), jnp.max(x)], X),
        (lambda x: [jnp.cumsum(x, 1), jnp.cumprod(x, 1), lax.cummax(x, 1, reverse=True), lax.cummin(x, 2)], X),
        (lambda x: [jnp.sum(x, axis=1), jnp.cumsum(x, axis=1), jnp.max(x, 0)], HALVES[0]),
        (lambda x: [jnp.sum(x, 1), jnp.cumsum(x, 1), lax.sort(x, dimension=1)], WHOLE),
    ],
    "products": [
        (lambda x, y: [jnp.einsum(formula, x, y) for formula in PRODUCTS], X, Y),
        (lambda x, y: jnp.einsum("abc,abd->acd", x, y, preferred_element_type=jnp.float32), *HALVES),
        (lambda x, y: jnp.einsum("abc,abd->acd", x, y), WHOLE, OTHER),
    ],
    "indices": [
        (lambda x, i: [x[i], x[:, i], x[i, 1], x[i, :, i], jnp.take(x, i, axis=1, mode="clip")], X, AT - 3),
        (lambda x, i: [jnp.take_along_axis(x, i, axis=1), jnp.take_along_axis(x, i, axis=1, mode="fill")], X, WHOLE),
        (lambda x, i: [x.at[i].set(7.0), x.at[:, i[:2]].add(2.0), jax.vmap(lambda a, b: a[b])(x, i[:3])], X, AT),
        (lambda x, i: jax.vmap(lambda a, b: jnp.take(a, b, axis=1, mode="fill"))(x, i), X, WHOLE[:, :, 0]),
    ],
    "control flow": [
        (lambda x: lax.scan(lambda c, a: (c * 0.5 + a, (c, a.sum())), x[0], x[1:], reverse=True), X),
        (jax.grad(lambda x: lax.scan(lambda c, a: (jnp.tanh(c + a), c * a), x[0], x)[1].sum()), X),
        (lambda x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * 1.5), (0, x)), X),
        (lambda x, i: [lax.switch(i + d, [lambda x: x, jnp.exp, jnp.sin], x) for d in (-5, 0, 1, 9)], X, np.int32(1)),
        (jax.grad(jax.checkpoint(lambda x: jax.nn.relu(jnp.sin(x)).sum())), X),
        (lambda x: lax.fori_loop(0, 4, lambda i, c: c + i * x[0], x[1]), X),
    ],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_compiled(name):
    with jax.numpy_dtype_promotion("standard"):
        for function, *operands in PROGRAMS[name]:
            found, expected = evaluated(function)(*operands), jax.jit(function)(*operands)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                halves = a.dtype in (jnp.bfloat16, jnp.float16)
                rtol = float(jnp.finfo(a.dtype).eps) if halves else 3e-6  # halves: the last place
                np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "suite", "name", "dtype"),
    [
        ("tpu", linear_attention.SUITE, "one chunk", jnp.float32),
        ("gpu", delta_rule.SUITE, "one token, padded", jnp.bfloat16),
    ],
)
def test_simulated_kernels_as_compiled(platform, suite, name, dtype):
    call = suite.cases[name], f"mosaic_{platform}", dtype
    with devices.interpreting(platform, detect_races=True):
        found, expected = (suite.prepare(*call, program=program)() for program in (traced, compiled))
    for what, want in expected.items():
        assert error(found[what], want) <= TOLERANCE["float32" if dtype == jnp.float32 else "bfloat16"], what


@pytest.mark.parametrize("ordered", [True, False])
def test_a_race_of_two_warpgroups_is_found(ordered):
    def body(x, o, tile, written):
        def write():
            tile[...] = x[...]
            mosaic_gpu.commit_smem()

        def read():
            if ordered:
                mosaic_gpu.barrier_wait(written)
            o[...] = tile[...]

        first = jax.lax.axis_index("warpgroup") == 0
        jax.lax.cond(first, write, lambda: None)
        if ordered:
            jax.lax.cond(first, lambda: mosaic_gpu.barrier_arrive(written), lambda: None)
        jax.lax.cond(first, lambda: None, read)

    x = jnp.ones((8, 128), jnp.float32)
    kernel = mosaic_gpu.kernel(
        body, out_type=x, num_threads=2, thread_name="warpgroup",
        scratch_types=[mosaic_gpu.SMEM(x.shape, x.dtype), mosaic_gpu.Barrier()],
    )  # fmt: skip
    with devices.interpreting("gpu", detect_races=True):
        if ordered:
            np.testing.assert_array_equal(evaluated(kernel)(x), x)
        else:
            with pytest.raises(Exception, match="race"):
                evaluated(kernel)(x)
            reset_gpu_interpret_mode_state()


def test_what_is_written_between_two_runs_is_not_kept():
    state = {"sum": 0.0}

    def add(x):
        state["sum"] += float(x)
        return np.float32(state["sum"])

    run = traced(lambda x: jax.experimental.io_callback(add, jax.ShapeDtypeStruct((), jnp.float32), x), np.float32(2.0))
    assert (run(), run()) == (2.0, 4.0)

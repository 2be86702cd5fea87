"""Calls of `attention` on arrays at hand, compiled once for all that differ in arrays alone; and held to the reference.
(What every implementation is held to is `pallas_kernels.attention.conformance`.)"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy_programs import evaluated
from pallas_kernels.attention import attention, tiles
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.tolerances import assert_close


def arrays(shape: Shape, seed: int = 0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(s).astype(dtype)) for s in (shape.q, shape.k, shape.v))


@functools.cache
def _compiled(gradients, tile_side, **static):
    """One program for all calls that differ in arrays alone (compiling is what takes these tests their time)."""

    def forward(qkv, index):
        return attention(*qkv, **index, **static)

    def both(qkv, index, cotangent):
        o, pullback = jax.vjp(lambda *qkv: forward(qkv, index), *qkv)
        return o, pullback(cotangent.astype(o.dtype))

    # the chunked form is what a user compiles on a CPU
    program = jax.jit if static.get("implementation", "chunked") == "chunked" else evaluated
    return program(both if gradients else forward)


def _split(options):
    """Options that are arrays, and those that are known when the op is traced."""
    index = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    return index, {name: value for name, value in options.items() if name not in index}


def compute(q, k, v, **options):
    index, static = _split(options)
    return _compiled(False, tiles.SIDE, **static)((q, k, v), index)


def out_and_gradients(implementation, q, k, v, cotangent=None, **options):
    """The output, and the gradients of its sum against a cotangent."""
    index, static = _split(options)
    if cotangent is None:
        shape = (*q.shape[:3], v.shape[3])
        cotangent = jnp.asarray(np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape))
    run = _compiled(True, tiles.SIDE, implementation=implementation, **static)
    return run((q, k, v), index, cotangent)


def assert_like_reference(implementation, q, k, v, kind="float32", **options):
    o, gradients = out_and_gradients(implementation, q, k, v, **options)
    expected, expected_gradients = out_and_gradients("reference", q, k, v, **options)
    assert o.dtype == q.dtype
    assert_close(o, expected, kind, "o")
    for name, actual, want in zip("qkv", gradients, expected_gradients, strict=True):
        assert_close(actual, want, f"{kind} gradient", f"d{name}")

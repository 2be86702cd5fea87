"""RoPE against plain float64 numpy, at every position that an int32 can hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lcr.layers.rope import apply_rope, rope_frequencies, rotate
from pallas_kernels.tolerances import assert_close


def expected(x, positions, frequencies, interleaved):
    """The rotation as multiplication of complex numbers, in float64."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turn = np.exp(1j * positions.astype(np.float64)[:, :, None, None] * frequencies)
    turned = (a + 1j * b) * turn
    out = np.empty_like(x)
    if interleaved:
        out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
    else:
        out[..., :half], out[..., half:] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start", [0, 999_000, 2_000_000_000, -500])
def test_rotation_equals_float64(start, interleaved):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 50, 3, 16), np.float32)
    positions = (start + np.array([np.arange(50), np.arange(0, 150, 3)])).astype(np.int32)
    actual = apply_rope(jnp.asarray(x), jnp.asarray(positions), base=10_000.0, interleaved=interleaved)
    want = expected(x, positions, 10_000.0 ** (-np.arange(0, 16, 2) / 16), interleaved)
    assert np.abs(np.asarray(actual) - want).max() < 5e-6


@pytest.mark.parametrize("frequency", [0.0, 1e-9, 3.0, 7.5, -0.25])
def test_any_frequency(frequency):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 7, 1, 4), np.float32))
    positions = np.asarray([[0, 1, 2, 1023, 1024, 1_048_575, 16_777_217]], np.int32)
    frequencies = np.asarray([frequency, 1.0])
    actual = rotate(x, jnp.asarray(positions), frequencies)
    assert np.abs(np.asarray(actual) - expected(x, positions, frequencies, False)).max() < 5e-6


def test_products_depend_on_distance_alone():
    rng = np.random.default_rng(2)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 32), np.float32)) for _ in range(2))

    def product(query_position, key_position):
        at = [jnp.asarray([[p]], jnp.int32) for p in (query_position, key_position)]
        return (apply_rope(q, at[0]) * apply_rope(k, at[1])).sum()

    assert_close(product(1_000_037, 1_000_000), product(37, 0), "float32")


def test_dtypes_and_gradient():
    x = jnp.asarray(np.random.default_rng(3).standard_normal((1, 5, 2, 8), np.float32))
    positions = jnp.arange(5, dtype=jnp.int32)[None, :]
    half = apply_rope(x.astype(jnp.bfloat16), positions)
    assert half.dtype == jnp.bfloat16
    assert_close(half.astype(jnp.float32), apply_rope(x, positions), "bfloat16")
    gradient = jax.grad(lambda x: (apply_rope(x, positions) ** 2).sum())(x)  # rotations keep lengths
    assert_close(gradient, 2 * x, "float32 gradient")
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(x, np.float64))
        turned = apply_rope(wide, positions)
        assert turned.dtype == jnp.float64
        assert_close(turned, expected(x, np.asarray(positions), rope_frequencies(8), False), "float64")


def test_wrong_number_of_frequencies():
    x = jnp.zeros((1, 2, 1, 8))
    with pytest.raises(ValueError, match="one frequency for each pair"):
        rotate(x, jnp.zeros((1, 2), jnp.int32), np.ones(3))
    with pytest.raises(ValueError, match="even width"):
        apply_rope(x[..., :7], jnp.zeros((1, 2), jnp.int32))

"""The states before every chunk, by the kernel for Hopper, against a loop over chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_programs import evaluated
from pallas_kernels import devices
from pallas_kernels.mosaic_gpu_states import states, supports
from pallas_kernels.tolerances import assert_close


def loop(keys, values, total, initial, read=None, write=None, chunk=64):
    def chunks(x):
        return None if x is None else x.astype(jnp.float32).reshape(x.shape[0], -1, chunk, *x.shape[2:])

    keys, values, read, write = map(chunks, (keys, values, read, write))
    state, before = initial, []
    for c in range(keys.shape[1]):
        before.append(state)
        added = jnp.einsum("bchk,bchv->bhkv", keys[:, c], values[:, c])
        if read is not None:
            was_read = jnp.einsum("bchk,bhkv->bchv", read[:, c], state)
            added += jnp.einsum("bchk,bchv->bhkv", write[:, c], was_read)
        state = total[:, c][..., None] * state + added
    return jnp.stack(before, axis=1), state


@pytest.mark.parametrize(
    ("shape", "reads", "scalar", "chunk"),
    [
        ((1, 320, 1, 64, 64), False, True, 64),
        ((1, 128, 1, 128, 128), False, False, 64),
        ((1, 320, 1, 64, 128), True, True, 64),
        ((2, 64, 1, 128, 64), True, False, 32),
    ],
)
def test_states_and_gradients(shape, reads, scalar, chunk):
    batch, length, heads, width, value_width = shape
    rng = np.random.default_rng(0)

    def normal(*sizes, dtype=jnp.bfloat16, scale=1.0):
        return jnp.asarray(rng.standard_normal(sizes) * scale, dtype)

    of_keys, state = (batch, length, heads, width), (batch, heads, width, value_width)
    arrays = [normal(*of_keys, scale=1 / 8), normal(*of_keys[:3], value_width)]
    total = rng.uniform(0, 1, (batch, length // chunk, heads, 1 if scalar else width))
    total[:, -1] = 0
    arrays += [jnp.asarray(total, jnp.float32), normal(*state, dtype=jnp.float32)]
    if reads:
        arrays += [normal(*of_keys, scale=1 / 8) for _ in range(2)]
    cotangents = normal(batch, length // chunk, *state[1:]), normal(*state, dtype=jnp.float32)

    def both(function, cotangents):
        results, pullback = jax.vjp(lambda *a: function(*a, chunk=chunk), *arrays)
        return results, pullback(cotangents)

    with devices.interpreting("gpu", detect_races=True):
        found, gradients = evaluated(functools.partial(both, states))(cotangents)
    exact_cotangents = cotangents[0].astype(jnp.float32), cotangents[1]
    expected, expected_gradients = evaluated(functools.partial(both, loop))(exact_cotangents)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]

    def exact(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    assert_close(exact(found), exact(expected), "bfloat16")
    assert_close(exact(gradients), exact(expected_gradients), "bfloat16 gradient")


def test_says_what_it_does_not_support():
    assert "needs a Hopper GPU" in supports(64, 64, jnp.bfloat16)
    with devices.interpreting("gpu"):
        assert supports(128, 512, jnp.bfloat16) is None
        assert "float32" in supports(64, 64, jnp.float32)
        assert "48 and 64" in supports(48, 64, jnp.bfloat16)

"""The scan that cuts its chunks out of the arrays where they lie, against chunks cut by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_kernels.chunks import scan_chunks
from pallas_kernels.tolerances import assert_close

B, K = 2, 3


def body(shared, carry, x, *, power):
    """A decayed sum, with a counter of the tokens so far."""
    weight, table = shared
    state, count = carry
    u, mask, nothing = x
    assert nothing is None
    u = jnp.where(mask[..., None], u, 0.0) * weight[None, None] + table[count][None, None]
    state = jnp.tanh(state * 0.5 + jnp.sum(u**power, axis=1))
    return (state, count + u.shape[1]), (u + state[:, None]) * jnp.float32(2)


def by_hand(body, chunk, shared, carry, inputs):
    outputs = []
    for start in range(0, inputs[0].shape[1], chunk):
        carry, o = body(shared, carry, jax.tree.map(lambda x, s=start: x[:, s : s + chunk], inputs))
        outputs.append(o)
    return carry, jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize(("length", "chunk"), [(12, 4), (13, 4), (3, 4), (4, 4), (5, 1)])
def test_values_and_gradients(length, chunk):
    rng = np.random.default_rng(0)
    shared = jnp.asarray(rng.normal(size=K), jnp.float32), jnp.asarray(rng.normal(size=(20, K)), jnp.float32)
    state, u = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((B, K), (B, length, K)))
    mask = jnp.asarray(rng.integers(0, 2, (B, length)), bool)
    run = functools.partial(body, power=2)

    @functools.partial(jax.jit, static_argnums=0)
    def both(form, shared, state, u):
        def loss(shared, state, u):
            (last, count), o = form(run, chunk, shared, (state, jnp.int32(0)), (u, mask, None))
            return jnp.sum(jnp.sin(o)) + jnp.sum(last**3), (last, count, o)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(shared, state, u)

    (_, found), gradients = both(scan_chunks, shared, state, u)
    (_, expected), expected_gradients = both(by_hand, shared, state, u)
    assert_close(found, expected, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")
    assert int(found[1]) == length


@pytest.mark.parametrize("length", [1 << 16, (1 << 16) + 1])
def test_inputs_are_not_copied(length):
    """Temporaries of a long forward are a few chunks, not the inputs over again."""
    u, mask = jax.ShapeDtypeStruct((1, length, 64), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.bool_)

    def run(u, mask):
        shared = jnp.ones(64), jnp.ones((4, 64))
        return scan_chunks(functools.partial(body, power=2), 64, shared, (jnp.ones((1, 64)), jnp.int32(0)), (u, mask, None))

    compiled = jax.jit(run).lower(u, mask).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < u.size * 4 / 16

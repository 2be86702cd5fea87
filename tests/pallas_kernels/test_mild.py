"""Chunks of mild decays, by the form without decay: at the limit, across documents, and no gradient to later tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMIZED
from pallas_kernels import mild
from pallas_kernels.delta_rule import chunked, delta_rule
from pallas_kernels.linear_attention import linear_attention, vector_decay
from pallas_kernels.tolerances import assert_close

B, T, H, K, V = 2, 80, 2, 4, 3
FORMS = ("linear", "bonus", "delta")


def gates(rng, size=-0.99 * mild.LIMIT):
    """Hardly any decay but for one gate in each half of a chunk that decays nearly as much as such a half may."""
    half = vector_decay.CHUNK // 2
    assert vector_decay.CHUNK == chunked.CHUNK
    found = rng.choice([-1e-6, -3e-7, -1e-3], (B, -(-T // half), half, H, K), p=[0.6, 0.35, 0.05])
    np.put_along_axis(found, rng.integers(0, half, (B, found.shape[1], 1, H, K)), size, axis=2)
    return found.reshape(B, -1, H, K)[:, :T]


def make(form):
    rng = np.random.default_rng(0)
    names = {"linear": "qk", "bonus": "qk", "delta": "qkab"}[form]
    inputs = {name: rng.standard_normal((B, T, H, K)) for name in names} | {"v": rng.standard_normal((B, T, H, V))}
    if form == "delta":
        inputs["a"] /= np.linalg.norm(inputs["a"], axis=-1, keepdims=True)
        inputs["b"] = -0.8 * inputs["a"]
    if form == "bonus":
        inputs["bonus"] = rng.standard_normal((H, K))
    inputs |= {"log_decay": gates(rng), "initial_state": rng.standard_normal((B, H, K, V))}
    ids = np.repeat(rng.integers(0, 3, (B, T // 8)), 8, axis=1).astype(np.int32)
    cotangents = rng.standard_normal((B, T, H, V)), rng.standard_normal((B, H, K, V))
    return *jax.tree.map(np.float32, (inputs, cotangents)), ids


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=OPTIMIZED)
def outputs_and_gradients(form, implementation, inputs, cotangents, ids):
    op = delta_rule if form == "delta" else linear_attention
    outputs, pull = jax.vjp(lambda x: op(**x, segment_ids=ids, implementation=implementation), inputs)
    return outputs, pull(cotangents)[0]


@pytest.fixture(autouse=True)
def every_chunk_is_mild(monkeypatch):
    """Every chunk is taken by the form for mild decays, or there is no number left."""

    def never(state, x, *options):
        return jnp.full_like(state, jnp.nan), jnp.full_like(x.v, jnp.nan)

    monkeypatch.setattr(chunked, "_any_chunk", never)
    monkeypatch.setattr(vector_decay, "_any_chunk", never)


@pytest.mark.parametrize("form", FORMS)
def test_at_the_limit_it_is_the_token_loop_in_float64(form):
    """And no gradient flows to later tokens, not even rounding noise: later log decays have gradients of exactly 0."""
    inputs, cotangents, ids = make(form)
    outputs, gradients = outputs_and_gradients(form, "chunked", inputs, cotangents, ids)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.float64, (inputs, cotangents))
        expected, expected_gradients = outputs_and_gradients(form, "reference", *exact, ids)
    assert_close(outputs, expected, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")

    of_o, of_state = cotangents
    of_o[:, 40:] = 0
    one_document = np.ones_like(ids)
    _, gradients = jax.device_get(outputs_and_gradients(form, "chunked", inputs, (of_o, 0 * of_state), one_document))
    for name in set(inputs) - {"initial_state", "bonus"}:
        assert gradients[name][:, :40].any() and not gradients[name][:, 40:].any(), name


def test_what_is_mild():
    rng = np.random.default_rng(0)
    chunk = jnp.asarray(np.swapaxes(gates(rng), 1, 2)[:, :, : vector_decay.CHUNK], jnp.float32)
    assert mild.is_mild(chunk)
    assert mild.is_mild(jnp.zeros((1, 1, 1, 1)))
    for worse in (-mild.LIMIT, -np.inf, np.nan):
        assert not mild.is_mild(chunk.at[1, 1, 3, 2].set(worse))

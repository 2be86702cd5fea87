"""Sequences cut into parts that run at once: what the whole gives, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_kernels import parts
from pallas_kernels.delta_rule import chunked as delta_rule_chunked
from pallas_kernels.delta_rule import conformance as delta_rule
from pallas_kernels.delta_rule import mosaic_gpu as delta_rule_gpu
from pallas_kernels.delta_rule.parts import in_parts as delta_rule_in_parts
from pallas_kernels.linear_attention import chunked as linear_attention_chunked
from pallas_kernels.linear_attention import conformance as linear_attention
from pallas_kernels.linear_attention import mosaic_gpu as linear_attention_gpu
from pallas_kernels.linear_attention.parts import in_parts as linear_attention_in_parts
from pallas_kernels.tolerances import assert_close

ARGUMENTS = {
    "linear_attention": ("q", "k", "v", "log_decay", "initial_state", "ids", "scale", "bonus"),
    "delta_rule": ("q", "k", "v", "a", "b", "log_decay", "initial_state", "ids", "scale"),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(run, op, inputs, ids, cotangents):
    def call(inputs):
        values = {**inputs, "ids": ids, "scale": 0.3}
        return run(*(values.get(name) for name in ARGUMENTS[op]))

    outputs, pullback = jax.vjp(call, inputs)
    return outputs, pullback(cotangents)[0]


def compare(op, module, in_parts, chunked, shape, **options):
    inputs, ids = module.inputs(module.Case(shape=shape, **options))
    if ids is not None:  # a boundary where two parts meet; a part of padding alone, before and after documents that go on
        ids = ids[:, : shape.T]
        ids[0, 31:33] = [1, 2]
        ids[1, 32:64] = 0
        ids[1, 64:70] = ids[1, 31]
    inputs = {name: jnp.asarray(a, jnp.float32) for name, a in inputs.items()}
    ids = None if ids is None else jnp.asarray(ids)
    rng = np.random.default_rng(5)
    sizes = (shape.B, shape.T, shape.H, shape.V), (shape.B, shape.H, shape.K, shape.V)
    cotangents = tuple(jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes)
    found, gradients = with_gradients(functools.partial(in_parts, chunked.run, 4), op, inputs, ids, cotangents)
    expected, expected_gradients = with_gradients(chunked.run, op, inputs, ids, cotangents)
    assert_close(found, expected, "float32")
    assert_close(gradients, expected_gradients, "float32 gradient")


SMALL = linear_attention.CASES["ragged"].shape._replace(B=2, T=128, H=2, K=4, V=6)


@pytest.mark.parametrize(
    "options",
    [
        {"packed": True, "decay": "channel", "bonus": True, "gates": "extreme"},
        {"packed": True, "decay": "head", "fresh": True},
        {"H": 4, "G": 2},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_linear_attention(options):
    shape = {name: options[name] for name in options if name in SMALL._fields}
    case = {name: options[name] for name in options if name not in SMALL._fields}
    compare(
        "linear_attention", linear_attention, linear_attention_in_parts, linear_attention_chunked,
        SMALL._replace(**shape), **case,
    )  # fmt: skip


@pytest.mark.parametrize(("decay", "packed"), [("scalar", False), ("vector", True)])
def test_delta_rule(decay, packed):
    shape = delta_rule.CASES["ragged"].shape._replace(B=2, T=128, H=2, K=4, V=6, decay=decay)
    compare("delta_rule", delta_rule, delta_rule_in_parts, delta_rule_chunked, shape, packed=packed, fresh=not packed)


@pytest.mark.parametrize(
    ("chains", "length", "expected"),
    [
        (16, 262_144, 8),  # 128 of 132
        (1, 262_144, 128),
        (64, 65_536, 2),
        (67, 65_536, 1),  # half of them are busy
        (16, 8_192, 4),  # parts of 2,048 tokens
        (16, 4_095, 1),
        (1, 3 * 4_096, 4),  # 3,072 tokens
    ],
)
def test_how_many_parts(chains, length, expected):
    assert parts.count(chains, length) == expected


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_kernels_of_a_gpu_are_given_parts(op, monkeypatch):
    """The chunked form in the kernels' place: it gets short rows, and together they give what the long one does."""
    module, suite, chunked = {
        "linear_attention": (linear_attention_gpu, linear_attention, linear_attention_chunked),
        "delta_rule": (delta_rule_gpu, delta_rule, delta_rule_chunked),
    }[op]
    lengths = []

    def run(*call):
        lengths.append(call[0].shape[1])
        return chunked.run(*call)

    monkeypatch.setattr(parts, "LEAST", 32)
    monkeypatch.setattr(module, "_run", run)
    shape = suite.CASES["packed"].shape._replace(B=2, T=128, H=2, K=4, V=6)
    inputs, ids = suite.inputs(suite.Case(shape=shape, packed=True))
    values = {**{name: jnp.asarray(a, jnp.float32) for name, a in inputs.items()}, "ids": jnp.asarray(ids), "scale": 0.3}
    call = [values.get(name) for name in ARGUMENTS[op]]
    found, expected = jax.jit(lambda: module.run(*call))(), jax.jit(lambda: chunked.run(*call))()
    assert set(lengths) == {32}
    assert_close(found, expected, "float32")

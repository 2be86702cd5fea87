"""Limits that are not the kernels' own: of CUDA's grids, of a TPU's scalar memory, of JAX's 64-bit mode."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import pallas_kernels
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from pallas_kernels import devices, dispatch


def call(op, dtype=jnp.bfloat16, batch=4, length=256, heads=4):
    """Of the public function, on shapes."""
    x = jax.ShapeDtypeStruct((batch, length, heads, 64), dtype)
    arguments = (x,) * {"attention": 3, "linear_attention": 3, "delta_rule": 5}[op]
    gates = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)
    arguments += () if op == "attention" else (gates,)
    return getattr(pallas_kernels, op), arguments


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_a_million_tokens_of_several_rows_fit_the_grids(op, monkeypatch):
    """Blocks lie along three axes: the last two of a grid, and all others together, which have 65,535 places at most."""
    grids = []
    kernel = plgpu.kernel
    monkeypatch.setattr(plgpu, "kernel", lambda *a, grid, **rest: grids.append(grid) or kernel(*a, grid=grid, **rest))
    function, arguments = call(op, length=2**20)

    def loss(*arguments):
        o, state = function(*arguments)
        return o.astype(jnp.float32).sum() + state.sum()

    with devices.interpreting("gpu"):
        jax.eval_shape(jax.grad(loss, tuple(range(len(arguments)))), *arguments)
    assert len(grids) >= 4
    for grid in grids:
        assert math.prod(grid[:-2]) <= 65_535 and (len(grid) < 2 or grid[-2] <= 65_535), grid


@pytest.mark.parametrize("kv_heads", [32, 1])
def test_a_million_tokens_fit_the_scalar_memory_of_a_tpu(kv_heads, monkeypatch):
    """Which holds a MiB: the list of tiles that attention is to visit, and the next one."""
    found, kernel = {}, pl.pallas_call

    def looked_at(*arguments, in_specs, name, **rest):
        lists = [spec for spec in in_specs if spec is not None and spec.memory_space == pltpu.SMEM]
        found[name] = sum(2 * 4 * math.prod(size or 1 for size in spec.block_shape) for spec in lists)
        return kernel(*arguments, in_specs=in_specs, name=name, **rest)

    monkeypatch.setattr(pl, "pallas_call", looked_at)
    q, k = (jax.ShapeDtypeStruct((1, 2**20, heads, 64), jnp.bfloat16) for heads in (32, kv_heads))

    def loss(q, k, v):
        return pallas_kernels.attention(q, k, v, implementation="mosaic_tpu").astype(jnp.float32).sum()

    with devices.interpreting("tpu"):
        jax.eval_shape(jax.grad(loss, (0, 1, 2)), q, k, k)
    assert len(found) == 2
    for name, size in found.items():
        assert 0 < size <= 2**19, f"{name}: {size}"


@pytest.mark.parametrize("op", ["attention", "linear_attention", "delta_rule"])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_in_64_bit_mode_plain_jax_is_taken(op, platform):
    with jax.enable_x64(True), devices.interpreting(platform), dispatch.recording_defaults() as chosen:
        function, arguments = call(op)
        jax.eval_shape(function, *arguments)
        with pytest.raises(ValueError, match="32-bit mode"):
            jax.eval_shape(lambda *a: function(*a, implementation=f"mosaic_{platform}"), *arguments)
    assert [name for _, name in chosen] in (["chunked"], ["cudnn"])


def test_attention_of_more_rows_than_a_grid_has_places_is_refused_on_a_gpu():
    function, arguments = call("attention", batch=2, length=2**20, heads=1)
    with devices.interpreting("gpu"):
        jax.eval_shape(functools.partial(function, implementation="mosaic_gpu"), *arguments)
        function, arguments = call("attention", batch=8, length=2**20, heads=1)
        with pytest.raises(ValueError, match="these are 8 rows of 1048576 tokens"):
            jax.eval_shape(functools.partial(function, implementation="mosaic_gpu"), *arguments)


@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
@pytest.mark.parametrize(
    ("reason", "length", "heads", "width", "values"),
    [
        ("on 31 of 72 keys", 4, 31, 72, 72),  # in whole registers they come all together, or not at all
        (None, 1, 31, 72, 72),
        (None, 4, 32, 72, 72),
        (None, 4, 1, 2048, 2048),
        ("one token of 28 heads at once, here with a state of 256 x 512", 1, 28, 256, 512),  # more than fits the VMEM
    ],
)
def test_heads_that_are_no_fit_for_a_tpu_are_refused(op, reason, length, heads, width, values):
    q, v = (jax.ShapeDtypeStruct((1, length, heads, n), jnp.bfloat16) for n in (width, values))
    function = functools.partial(getattr(pallas_kernels, op), implementation="mosaic_tpu")
    arguments = (q, q, v) if op == "linear_attention" else (q, q, v, q, q)
    outcome = contextlib.nullcontext() if reason is None else pytest.raises(ValueError, match=reason)
    with devices.interpreting("tpu"), outcome:
        jax.eval_shape(function, *arguments)

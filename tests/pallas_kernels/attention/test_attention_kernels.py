"""Our kernels under JAX's transformations, as traced and compiled for their devices; and which device that is."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_calls import arrays, out_and_gradients
from numpy_programs import evaluated
from pallas_kernels import devices, targets
from pallas_kernels.attention import attention, cudnn, mosaic_tpu
from pallas_kernels.attention.options import Options
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.check import cases
from pallas_kernels.tolerances import assert_close

ROWS = Shape(B=3, T=300, H=4, G=2, K=64)


def row_gradients(*row_and_ids, implementation, wrap=lambda f: f):
    *row, ids = (a[None] for a in row_and_ids)

    def loss(*row):
        o = attention(*row, segment_ids=ids, implementation=implementation)
        return (o.astype(jnp.float32) ** 2).sum()

    return jax.grad(wrap(loss), (0, 1, 2))(*row)


def assert_traced(implementation, wrap):
    """Under jit, vmap and scan."""
    step = functools.partial(row_gradients, implementation=implementation)

    def both_ways(*rows):
        return jax.vmap(step)(*rows), jax.lax.scan(lambda carry, row: (carry, step(*row, wrap=wrap)), 0, rows)[1]

    rows = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (ROWS.q, ROWS.k, ROWS.v)]
    rows.append(jax.ShapeDtypeStruct(ROWS.q[:2], jnp.int32))
    for found in jax.eval_shape(jax.jit(both_ways), *rows):
        assert [a.shape for a in found] == [(a.shape[0], 1, *a.shape[1:]) for a in rows[:3]]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_kernels_are_traced_under_transforms(platform):
    with devices.interpreting(platform):
        assert_traced(f"mosaic_{platform}", wrap=lambda loss: loss)  # a simulated kernel has effects: no remat


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason=f"needs {targets.INSTALL}")
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_kernels_are_traced_for_an_absent_device(target):
    with targets.tracing(targets.find(target)):
        assert_traced("mosaic_tpu", wrap=jax.checkpoint)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason=f"needs {targets.INSTALL}")
@pytest.mark.parametrize(
    "shape",
    [
        Shape(B=2, T=1, S=2_048, H=8, G=2, K=128),
        Shape(B=2, T=2, S=2_176, H=8, G=4, K=64),
        Shape(B=2, T=1, S=2_048, H=16, G=1, K=576, V=512, latent=True),
    ],
)
def test_decoding_copies_no_cache(shape):
    call, arrays = cases.attention(shape)
    memory = targets.compile(call, arrays, targets.find("v5e")).memory_analysis()
    assert memory.temp_size_in_bytes < 2 * np.prod(shape.k) / 4


def test_rows_of_a_batch_by_vmap(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "HEAVIEST", (128, 128))
    qkv = arrays(Shape(B=2, T=130, H=1, G=1, K=64))
    ids = jnp.asarray(np.arange(130)[None] // np.array([[50], [90]]) + 1, jnp.int32)
    o, _ = out_and_gradients("reference", *qkv, segment_ids=ids)
    _, want = out_and_gradients("reference", *qkv, segment_ids=ids, cotangent=2 * o)
    with devices.interpreting("tpu", detect_races=True):
        found = evaluated(jax.vmap(functools.partial(row_gradients, implementation="mosaic_tpu")))(*qkv, ids)
    assert_close(tuple(a[:, 0] for a in found), want, "float32 gradient")


def test_the_default_device_is_heeded():
    """A device, or the name of a platform; it is asked for anew in each call."""
    assert devices.current().platform == jax.default_backend()
    for default in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(default):
            assert devices.current() == devices.Device("cpu", jax.devices("cpu")[0].device_kind)


@pytest.mark.parametrize(
    ("capability", "width", "reason"),
    [
        ((7, 5), 64, "compute capability 8.0"),
        ((8, 0), 128, None),
        ((8, 0), 136, "up to 128"),
        ((9, 0), 256, None),
        ((10, 0), 256, None),
        ((10, 0), 264, "up to 256"),
    ],
)
def test_cudnn_is_for_ampere_and_later(capability, width, reason, monkeypatch):
    monkeypatch.setattr(devices, "current", lambda: devices.Device("gpu", "NVIDIA GPU"))
    monkeypatch.setattr(
        cudnn.fused_attention_stablehlo,
        "check_compute_capability",
        lambda least: capability >= tuple(int(n) for n in least.split(".")),
    )
    x = jax.ShapeDtypeStruct((1, 128, 1, width), jnp.bfloat16)
    found = cudnn.supports(x, x, x, None, None, Options(scale=1.0))
    assert found is None if reason is None else reason in found

"""The Hopper kernels on a simulated GPU, where every read takes milliseconds: few tokens, mostly in tiles of 8."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance_suite import assert_conforms, conformance_tests
from numpy_programs import evaluated, traced
from pallas_kernels import devices
from pallas_kernels.selective_scan import conformance, mosaic_gpu, mosaic_gpu_parts, selective_scan
from pallas_kernels.selective_scan.conformance import Case
from pallas_kernels.selective_scan.shapes import Shape

CASES = {
    "one token": Case(shape=Shape(B=1, T=1, D=32)),
    "one token, padded": Case(shape=Shape(B=3, T=1, D=40, gated=True), packed=True),
    "one tile": Case(shape=Shape(B=1, T=8, D=32), fresh=True),
    "ragged, blocks of 64 channels": Case(shape=Shape(B=2, T=21, D=64, gated=True)),
    "packed": Case(shape=Shape(B=2, T=37, D=32), packed=True),
    "parts": Case(shape=Shape(B=1, T=37, D=32, N=8), steps="all"),
    "packed parts": Case(shape=Shape(B=2, T=37, D=32, N=8, gated=True), packed=True),
    "64 states": Case(shape=Shape(B=1, T=13, D=32, N=64, gated=True), packed=True),
    "small widths": Case(shape=Shape(B=2, T=11, D=24, N=5), steps=-16.0),
}
SUITE = dataclasses.replace(conformance.SUITE, cases=CASES)


def simulated():
    return devices.interpreting("gpu", detect_races=True)


@pytest.fixture
def small_tiles(monkeypatch):
    for module in (mosaic_gpu, mosaic_gpu_parts):
        monkeypatch.setattr(module, "LARGEST_TILE", 8)
    monkeypatch.setattr(mosaic_gpu, "BACKWARD", {8: (8, 4, 4), 16: (8, 4, 2), 64: (8, 2, 1)})


class TestMosaicGPU(conformance_tests(SUITE)):
    implementation = "mosaic_gpu"
    program = staticmethod(traced)
    dtypes = (jnp.bfloat16,)
    run_twice = frozenset({"one tile"})

    @pytest.fixture(autouse=True)
    def small_chip(self, small_tiles, monkeypatch, request):
        name = request.node.callspec.params["name"]
        if "parts" in name:
            monkeypatch.setattr(mosaic_gpu_parts, "LEAST", 1)
            monkeypatch.setattr(mosaic_gpu_parts, "BLOCKS", 4 * CASES[name].shape.B)
            assert mosaic_gpu_parts.cut(*CASES[name].shape[:3]) == (3, 2)
        if "64 channels" in name:
            monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 2)

    def device(self):
        return simulated()


@pytest.mark.parametrize("length", [35, 1])
def test_conforms_in_float32_and_tiles_of_32(length):
    case = Case(shape=Shape(B=1, T=length, D=32, gated=True), packed=length > 1)
    with simulated():
        assert_conforms(SUITE, case, "mosaic_gpu", jnp.float32)


@pytest.mark.usefixtures("small_tiles")
def test_what_stands_in_padding_is_never_used():
    """NaN in it is as good as zeros, backward too."""
    rng = np.random.default_rng(0)
    length, width, states = 13, 32, 16
    ids = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 2, 2, 0, 2, 0]], np.int32)
    shapes = {"x": width, "dt": width, "B": states, "C": states, "gate": width, "dy": width}
    drawn = {name: np.abs(rng.standard_normal((1, length, size), np.float32)) for name, size in shapes.items()}
    A, state = -np.exp(rng.standard_normal((width, states), np.float32)), np.zeros((1, width, states), np.float32)

    def run(filling):
        x, dt, B, C, gate, dy = (jnp.where(ids[..., None] == 0, filling, a) for a in drawn.values())

        def call(x, dt, A, B, C, gate):
            return selective_scan(x, dt, A, B, C, gate=gate, segment_ids=jnp.asarray(ids), implementation="mosaic_gpu")

        def both(cotangents, *inputs):
            (y, final), pullback = jax.vjp(call, *inputs)
            return y, final, *pullback(cotangents)

        with simulated():
            return evaluated(both)((dy, state), x, dt, A, B, C, gate)

    for name, found, want in zip(("y", "state", "x", "dt", "A", "B", "C", "gate"), run(jnp.nan), run(0.0), strict=True):
        np.testing.assert_array_equal(found, want, err_msg=name)


def test_parts_fill_the_chip_and_are_not_too_short():
    cut = mosaic_gpu_parts.cut
    assert cut(batch=4, length=65_536, width=4_096) == (1, 2_048)
    assert cut(batch=1, length=65_536, width=4_096) == (1, 2_048)  # 128 blocks are enough
    parts, each = cut(batch=1, length=65_536, width=1_024)
    assert parts * each >= 2_048 > (parts - 1) * each
    assert 32 * parts >= 3 * 132
    assert cut(batch=1, length=1_024, width=1_024) == (4, 8)
    assert cut(batch=1, length=1_000, width=1_024) == (4, 8)
    assert cut(batch=1, length=500, width=1_024) == (1, 16)


@pytest.mark.parametrize(
    ("states", "dtype", "platform", "reason"),
    [
        (16, jnp.float32, None, "needs a Hopper or Blackwell GPU"),
        (144, jnp.float32, "gpu", "up to 128 states of a channel, and these are 144"),
        (16, jnp.float64, "gpu", "32-bit mode alone"),
    ],
)
def test_says_what_it_does_not_support(states, dtype, platform, reason):
    shapes = (1, 8, 32), (1, 8, 32), (32, states), (1, 8, states), (1, 8, states)
    simulated = devices.interpreting(platform) if platform else contextlib.nullcontext()
    with jax.enable_x64(dtype == jnp.float64), simulated, pytest.raises(ValueError, match=reason):
        selective_scan(*[jnp.zeros(shape, dtype) for shape in shapes], implementation="mosaic_gpu")

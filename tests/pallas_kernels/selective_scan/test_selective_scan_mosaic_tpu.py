"""The TPU's kernels, simulated: memory spaces, copies and semaphores, with races looked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from conformance_suite import assert_conforms, conformance_tests
from numpy_programs import traced
from pallas_kernels import devices
from pallas_kernels.selective_scan import mosaic_tpu_tiles, selective_scan
from pallas_kernels.selective_scan.conformance import SUITE, Case
from pallas_kernels.selective_scan.shapes import Shape

simulated = functools.partial(devices.interpreting, "tpu", detect_races=True)


def shortened(name, case):
    """A simulator takes long: a group of tokens and a bit, but for two cases that go on into a second chunk; and of many
    states two groups and a bit."""
    batch, length, width, states, gated = case.shape
    most = {"long": 130, "packed": 130}.get(name, 20 if states <= 16 else 10)
    return dataclasses.replace(case, shape=Shape(1 if name == "packed" else batch, min(length, most), width, min(states, 36), gated))


SHORT = dataclasses.replace(SUITE, cases={name: shortened(name, case) for name, case in SUITE.cases.items()})


class TestMosaicTPU(conformance_tests(SHORT)):
    implementation = "mosaic_tpu"
    program = staticmethod(traced)
    run_twice = frozenset({"one token", "small widths"})

    @pytest.fixture(autouse=True)
    def all_states_together(self, monkeypatch):
        """A simulator has no registers to run out of, and takes its time for every load. A few at a time: below."""
        monkeypatch.setattr(mosaic_tpu_tiles, "TOGETHER", 16)

    def device(self):
        return simulated()


@pytest.mark.parametrize("shape", [Shape(B=1, T=20, D=1100, N=3, gated=True), Shape(B=2, T=1, D=200)], ids=["wide", "one token"])
def test_bfloat16(shape):
    """Of more channels than a register holds, so that two are taken together."""
    with simulated():
        assert_conforms(SUITE, Case(shape=shape), "mosaic_tpu", jnp.bfloat16)


def test_parts_of_the_channels(monkeypatch):
    """Two parts, of which the second one ends early: the gradients of B and C are sums over both."""
    monkeypatch.setattr(mosaic_tpu_tiles, "WIDEST", 2048)  # half of it in float32
    with simulated():
        assert_conforms(SUITE, Case(shape=Shape(B=1, T=20, D=1100, N=3, gated=True), packed=True), "mosaic_tpu", jnp.float32)


@pytest.mark.parametrize(
    ("reason", "states", "dtypes"),
    [
        ("at most 128 states", 129, (jnp.float32, jnp.float32)),
        ("x is float16", 4, (jnp.float16, jnp.float32)),
        ("gate is float16", 4, (jnp.float32, jnp.float16)),
    ],
)
def test_says_what_it_does_not_support(reason, states, dtypes):
    (x, gate), weights = (jnp.zeros((1, 4, 8), dtype) for dtype in dtypes), jnp.zeros((1, 4, states))
    arguments = x, jnp.zeros((1, 4, 8)), -jnp.ones((8, states)), weights, weights
    call = functools.partial(selective_scan, *arguments, gate=gate)
    with simulated(), pytest.raises(ValueError, match=reason):
        call(implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="needs a TPU"):
        call(implementation="mosaic_tpu")
    jax.eval_shape(call)  # by default another one is taken

"""Scaled frequencies of RoPE against their formulas, and the mappings that describe them."""

import jax.numpy as jnp
import numpy as np
import pytest
from lcr.layers.rope import apply_rope
from lcr.layers.rope_scaling import freeze_rope_scaling, read_rope_scaling, rope_frequencies
from pallas_kernels.tolerances import assert_close

WIDTH, BASE = 64, 10_000.0
LLAMA3 = {
    "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
    "original_max_position_embeddings": 256,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2_048}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}
DEEPSEEK_V3 = YARN | {"factor": 40, "original_max_position_embeddings": 4_096, "mscale": 1.0, "mscale_all_dim": 1.0}


def frequencies(fields, length=1, width=WIDTH):
    return read_rope_scaling(fields).frequencies(width, BASE, length)


def plain():
    return np.array([BASE ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])


@pytest.mark.parametrize("fields", [None, {"rope_type": "default"}])
def test_nothing_is_scaled(fields):
    assert_close(frequencies(fields), plain(), "float64")
    scaling = read_rope_scaling(fields)
    assert scaling.magnitude == scaling.softmax_factor == 1.0


def test_linear():
    for key in ("rope_type", "type"):
        assert_close(frequencies({key: "linear", "factor": 4}), plain() / 4, "float64")


@pytest.mark.parametrize(("length", "grown"), [(100, 1.0), (512, 1.0), (1_024, 3.0), (5_120, 19.0)])
def test_dynamic_ntk(length, grown):
    """At the original length and below nothing changes; then the slowest pair turns as if interpolated by `grown`."""
    actual = frequencies(DYNAMIC, length)
    assert_close(actual[0], 1.0, "float64")
    assert_close(actual[-1], plain()[-1] / grown, "float64")
    assert_close(np.diff(np.log(actual)), np.full(31, np.log(actual[-1]) / 31), "float64")  # one base for all


def test_yarn():
    """The ramp's ends by search: the first pairs that turn fewer than 32 times, and once, within 2,048 tokens."""
    ratio = frequencies(YARN) / plain()
    turns = 2_048 * plain() / (2 * np.pi)
    low, high = np.flatnonzero(turns < 32)[0] - 1, np.flatnonzero(turns < 1)[0]
    assert 0 < low < high < WIDTH // 2 - 1
    assert_close(ratio[: low + 1], np.ones(low + 1), "float64")
    assert_close(ratio[high:], np.full(WIDTH // 2 - high, 0.25), "float64")
    assert_close(np.diff(ratio[low : high + 1]), np.full(high - low, -0.75 / (high - low)), "float64")

    exact = frequencies(YARN | {"truncate": False}) / plain()
    pair = [WIDTH * np.log(2_048 / (2 * np.pi * n)) / (2 * np.log(BASE)) for n in (32, 1)]
    ramp = np.clip((np.arange(WIDTH // 2) - pair[0]) / (pair[1] - pair[0]), 0, 1)
    assert_close(exact, 1 - 0.75 * ramp, "float64")


@pytest.mark.parametrize(
    ("fields", "magnitude", "softmax_factor"),
    [
        (YARN, 0.1 * np.log(4) + 1, 1.0),
        (YARN | {"attention_factor": 1.5}, 1.5, 1.0),
        (YARN | {"factor": 1.0}, 1.0, 1.0),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 0}, 0.1 * np.log(4) + 1, 1.0),
        (YARN | {"mscale": 2.0, "mscale_all_dim": 1.0},
         (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1), (0.1 * np.log(4) + 1) ** 2),
        (DEEPSEEK_V3, 1.0, 1.8738542), # its authors' softmax_scale times mscale^2, mscale = 1.3689
    ],
)  # fmt: skip
def test_temperature(fields, magnitude, softmax_factor):
    scaling = read_rope_scaling(fields)
    assert_close(scaling.magnitude, magnitude, "float64")
    assert_close(scaling.softmax_factor, softmax_factor, "float64 against float32 oracle")


def test_llama3():
    """By bands of wavelengths, as the released code has it: all three occur."""
    wanted, bands = [], set()
    for w in plain():
        wavelength = 2 * np.pi / w
        if wavelength < 256 / 4:
            bands.add("kept")
            wanted.append(w)
        elif wavelength > 256 / 1:
            bands.add("interpolated")
            wanted.append(w / 8)
        else:
            bands.add("between")
            smooth = (256 / wavelength - 1) / (4 - 1)
            wanted.append((1 - smooth) * w / 8 + smooth * w)
    assert len(bands) == 3
    assert_close(frequencies(LLAMA3), np.array(wanted), "float64")


def test_products_grow_with_the_square_of_the_magnitude():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 8), np.float32))
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    scaling = read_rope_scaling(YARN)
    turned = apply_rope(x, positions, scaling=scaling)
    assert_close((turned**2).sum(-1), (0.1 * np.log(4) + 1) ** 2 * (x**2).sum(-1), "float32")
    by_length = [apply_rope(x, positions, scaling=read_rope_scaling(DYNAMIC), length=n) for n in (None, 5, 600)]
    assert_close(by_length[0], by_length[1], "exact")
    assert jnp.abs(by_length[0] - by_length[2]).max() > 1e-2
    assert_close(by_length[0], apply_rope(x, positions), "float32")


def test_frozen_mappings_are_hashable():
    assert hash(freeze_rope_scaling(dict(YARN))) == hash(freeze_rope_scaling(dict(YARN)))
    assert freeze_rope_scaling(freeze_rope_scaling(YARN)) == freeze_rope_scaling(YARN)
    assert freeze_rope_scaling(None) is None
    assert rope_frequencies(8).dtype == np.float64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected one 'rope_type', of default, linear"),
        ({"factor": 2.0}, "expected one 'rope_type', of default, linear"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "expected one 'rope_type'"),
        ({"rope_type": ["yarn"]}, "expected one 'rope_type'"),
        ({"rope_type": "yarm"}, "rope_type: unknown value 'yarm'. Did you mean 'yarn'"),
        ({"rope_type": "linear"}, "expected the field 'factor' of 'linear' too"),
        ({"rope_type": "linear", "factor": None}, "expected the field 'factor' of 'linear' too"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5: expected at least 1"),
        ({"rope_type": "linear", "factor": "4"}, "factor='4': expected a number above 0"),
        ({"rope_type": "default", "factor": 2.0}, "unknown field of 'default': 'factor'"),
        (DYNAMIC | {"original_max_position_embeddings": 2.5}, "original_max_position_embeddings=2.5: expected a whole"),
        (YARN | {"beta_fst": 8}, "unknown field of 'yarn': 'beta_fst'. Did you mean 'beta_fast'"),
        (YARN | {"beta_fast": 1, "beta_slow": 2}, "beta_fast=1.0 beside beta_slow=2.0"),
        (YARN | {"truncate": 1}, "truncate=1: expected True or False"),
        (YARN | {"mscale": -1.0}, "mscale=-1.0: expected a number above 0"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor=1.0 beside low_freq_factor=1.0: expected a larger"),
    ],
)
def test_bad_mappings(fields, message):
    with pytest.raises(ValueError, match=message):
        read_rope_scaling(fields)


def test_narrow_heads_have_no_dynamic_base():
    with pytest.raises(ValueError, match="rotated width of 2: expected one of at least 4"):
        frequencies(DYNAMIC, 600, width=2)

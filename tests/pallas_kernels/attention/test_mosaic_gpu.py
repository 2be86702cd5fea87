import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_suite import AttentionSuite, assert_conforms
from numpy_programs import evaluated, traced
from pallas_kernels import devices
from pallas_kernels.attention import attention, conformance, mosaic_gpu


class TestMosaicGPU(AttentionSuite):
    implementation = "mosaic_gpu"
    program = staticmethod(traced)
    dtypes = (jnp.bfloat16,)
    refused = frozenset({"alibi"})
    run_twice = frozenset({"ragged, grouped", "packed, window", "decode"})

    @pytest.fixture(autouse=True)
    def small_chip(self, monkeypatch):
        """Small caches are split, and two tiles are in flight: a third one is filled into the place of the first."""
        monkeypatch.setattr(mosaic_gpu, "LEAST", 2)
        monkeypatch.setattr(mosaic_gpu, "_stages", lambda own, each: 2)

    def device(self):
        return devices.interpreting("gpu", detect_races=True)

    def test_conforms_in_float16(self):
        with self.device():
            assert_conforms(conformance.CASES["ragged, grouped"], "mosaic_gpu", jnp.float16, traced)

    def test_tiles_that_are_not_listed_are_never_read(self):
        """The second of three tiles is padding: NaN in it is as good as zeros, backward too."""
        rng = np.random.default_rng(0)
        padding = np.arange(384) // 128 == 1
        ids = jnp.where(padding, 0, 1)[None].astype(jnp.int32)

        def run(filling):
            q, k, v, cotangent = (
                jnp.where(padding[None, :, None, None], filling, rng.standard_normal((1, 384, heads, 64)))
                .astype(jnp.bfloat16)
                for heads in (2, 1, 1, 2)
            )  # fmt: skip
            def both(q, k, v, cotangent):
                o, pullback = jax.vjp(
                    lambda q, k, v: attention(q, k, v, segment_ids=ids, implementation="mosaic_gpu"), q, k, v
                )
                return o, *pullback(cotangent)

            with self.device():
                return evaluated(both)(q, k, v, cotangent)

        state = rng.bit_generator.state
        want = run(0.0)
        rng.bit_generator.state = state
        for name, found, expected in zip(("o", "dq", "dk", "dv"), run(jnp.nan), want, strict=True):
            np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize(
    ("width", "dtype", "options", "reason"),
    [
        (64, jnp.float32, {}, "float32"),
        (48, jnp.bfloat16, {}, "multiples of 32"),
        (288, jnp.bfloat16, {}, "up to 256"),
        (64, jnp.bfloat16, {"block_mask": np.ones((2, 2), bool), "block_size": (64, 64)}, "multiples of 128"),
        (64, jnp.bfloat16, {"alibi_slopes": np.ones(1, np.float32)}, "slopes"),
    ],
)
def test_says_what_it_does_not_support(width, dtype, options, reason):
    x = jnp.ones((1, 128, 1, width), dtype)
    options = {name: jnp.asarray(a) if isinstance(a, np.ndarray) else a for name, a in options.items()}
    with devices.interpreting("gpu"), pytest.raises(ValueError, match=reason):
        attention(x, x, x, **options, implementation="mosaic_gpu")


def test_is_for_hopper_alone():
    x = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="Hopper"):
        attention(x, x, x, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("blocks", "tiles", "splits"),
    [(64, 1024, 2), (1, 1024, 122), (132, 1024, 1), (300, 1024, 1), (8, 16, 2), (6, 1, 1)],
)
def test_few_blocks_are_split_over_the_chip(blocks, tiles, splits):
    assert mosaic_gpu.split(blocks, tiles) == splits

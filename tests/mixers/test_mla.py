"""MLA: its cache, its sizes and its errors. (Equal to DeepSeek-V2 and -V3 of transformers: tests/pretrained.)"""

import jax.numpy as jnp
import lcr
import pytest
from flax import nnx

WIDTH = 50
SIZES = {"num_heads": 5, "nope_head_dim": 10, "rope_head_dim": 8, "value_head_dim": 14, "kv_lora_rank": 22}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_the_cache_holds_latents_alone(dtype, itemsize):
    mla = lcr.make_mixer("mla", WIDTH, rngs=nnx.Rngs(0), dtype=dtype, **SIZES)
    held = [lcr.state_bytes(mla.init_state(2, capacity)) for capacity in (100, 1100)]
    assert held[0] == 2 * (100 * (22 + 8) * itemsize + 8)
    assert held[1] - held[0] == 2 * 1000 * (22 + 8) * itemsize


def test_the_defaults_fit_every_width_that_16_divides():
    for width in range(16, 1041, 16):
        config = lcr.MIXERS["mla"]().sized(width)
        assert config.num_heads * config.nope_head_dim == width and config.rope_head_dim % 2 == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 7}, "num_heads=7 does not divide d_model=50: expected a divisor, or nope_head_dim"),
        ({"rope_head_dim": 5}, "rope_head_dim=5: expected an even width"),
        ({"rope_base": 1.0}, "rope_base=1.0: expected a number above 1"),
        (
            {"num_heads": 5, "rope_head_dim": 2, "rope_scaling": DYNAMIC},
            "'dynamic' with a rotated width of 2: expected one of at least 4",
        ),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0: expected a whole number above 0"),
        ({"implementation": "chunkd"}, "Did you mean 'chunked'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("mla", WIDTH, rngs=nnx.Rngs(0), **options)

"""The architectures reach their op's kernels through its public function, where they are on an accelerator."""

import jax
import jax.numpy as jnp
import lcr
import pytest
from flax import nnx
from pallas_kernels import devices
from pallas_kernels.dispatch import recording_defaults

# Sizes of 1.3B models, in bfloat16; nothing is computed.
MIXERS = {
    "retnet": ("linear_attention", {"num_heads": 8}),
    "mamba": ("selective_scan", {}),
    "mamba2": ("linear_attention", {"state_size": 128}),
    "gla": ("linear_attention", {"num_heads": 4}),
    "rwkv6": ("linear_attention", {}),
    "rwkv7": ("delta_rule", {}),
    "deltanet": ("delta_rule", {"num_heads": 16}),
    "gated_deltanet": ("delta_rule", {"num_heads": 8}),
    "mha": ("attention", {"num_heads": 16}),
    "gqa": ("attention", {"num_heads": 16, "num_kv_heads": 4}),
    "mla": ("attention", {"num_heads": 16}),
    "infini": ("attention", {"num_heads": 16}),
}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_reach_the_kernels(name, platform):
    op, options = MIXERS[name]
    mixer = nnx.eval_shape(lambda: lcr.make_mixer(name, 2048, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, **options))

    def trained(mixer, x):
        return nnx.grad(lambda mixer: mixer(x)[0].astype(jnp.float32).sum())(mixer)

    def fed(mixer, x, state, ids):
        return mixer(x, state, segment_ids=ids)

    state = jax.eval_shape(lambda: mixer.init_state(2, 4096))
    with devices.interpreting(platform), recording_defaults() as chosen:
        for length in (1, 200):
            x = jax.ShapeDtypeStruct((2, length, 2048), jnp.bfloat16)
            ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
            nnx.eval_shape(fed, mixer, x, state, ids)
        nnx.eval_shape(trained, mixer, x)
    assert set(chosen) == {(op, f"mosaic_{platform}")}

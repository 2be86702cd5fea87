"""MLA against DeepSeek-V2 of transformers, its cache, and its two forms."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.layers.mlp import SwiGLU
from lcr.layers.moe import MoE, MoEConfig
from lcr.layers.norms import RMSNorm
from tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WIDTH = 50
SIZES = {"num_heads": 5, "nope_head_dim": 10, "rope_head_dim": 8, "value_head_dim": 14, "kv_lora_rank": 22}


@functools.cache
def golden():
    return {name: jnp.asarray(array) for part in ("mla", "moe") for name, array in load(part).items()}


def load(part):
    return np.load(GOLDEN / f"{part}_deepseek_v2.npz")


def mixer(layer):
    """Layer `layer` of the golden model: its weights are [out, in]."""
    mla, weights = lcr.make_mixer("mla", WIDTH, rngs=nnx.Rngs(0), **SIZES), golden()

    def named(name):
        return weights[f"{layer}.self_attn.{name}.weight"]

    mla.query.kernel[...] = named("q_proj").T
    mla.kv_down.kernel[...] = named("kv_a_proj_with_mqa").T
    mla.kv_norm.scale[...] = named("kv_a_layernorm")
    mla.out.kernel[...] = named("o_proj").T
    up = named("kv_b_proj").reshape(5, 10 + 14, 22).transpose(2, 0, 1)
    mla.key_up[...], mla.value_up[...] = up[..., :10], up[..., 10:]
    return mla


def feed_forward(layer):
    weights, rngs = golden(), nnx.Rngs(0)

    def gate_up(prefix):
        parts = (weights[f"{layer}.{prefix}.{name}_proj.weight"].T for name in ("gate", "up"))
        return jnp.concatenate(list(parts), axis=-1)

    if layer == 0:
        dense = SwiGLU(WIDTH, 64, dtype=jnp.float32, rngs=rngs)
        dense.gate_up.kernel[...] = gate_up("mlp")
        dense.down.kernel[...] = weights["0.mlp.down_proj.weight"].T
        return dense
    config = MoEConfig(num_experts=6, top_k=3, d_expert=22, num_shared=2, normalize=False)
    moe = MoE(config, WIDTH, 64, dtype=jnp.float32, rngs=rngs)
    experts = {name: weights[f"{layer}.experts.{name}_proj"].swapaxes(1, 2) for name in ("gate", "up", "down")}
    moe.router[...] = weights[f"{layer}.mlp.gate.weight"].T
    moe.gate_up[...] = jnp.concatenate([experts["gate"], experts["up"]], axis=-1)
    moe.down[...] = experts["down"]
    moe.shared.gate_up.kernel[...] = gate_up("mlp.shared_experts")
    moe.shared.down.kernel[...] = weights[f"{layer}.mlp.shared_experts.down_proj.weight"].T
    return moe


def norm(x, scale):
    layer = RMSNorm(WIDTH, epsilon=1e-6)
    layer.scale[...] = scale
    return layer(x)


@functools.cache
def layers():
    return [(mixer(layer), feed_forward(layer)) for layer in range(3)]


def logits(x, states):
    """The golden model on embedded tokens [1, T, D]; states: None, or one for each layer."""
    after = []
    for layer, (mla, mlp) in enumerate(layers()):
        h = norm(x, golden()[f"{layer}.input_layernorm.weight"])
        y, state = mla(h, None if states is None else states[layer])
        after.append(state)
        x = x + y
        h = norm(x, golden()[f"{layer}.post_attention_layernorm.weight"])
        x = x + (mlp(h) if layer == 0 else mlp(h)[0])
    return norm(x, golden()["norm"]) @ golden()["head"].T, after


@pytest.mark.parametrize("cuts", [(), (33, 34)], ids=["expanded", "absorbed"])
def test_equals_deepseek_v2_of_transformers(cuts):
    x = golden()["embedded"][None]
    empty = [mla.init_state(1, 67) for mla, _ in layers()]
    states, run = empty if cuts else None, jax.jit(logits)
    outputs = []
    for start, end in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        y, states = run(x[:, start:end], states)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1)[0], golden()["logits"], "float32 oracle")


@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_the_cache_holds_latents_alone(dtype, itemsize):
    mla = lcr.make_mixer("mla", WIDTH, rngs=nnx.Rngs(0), dtype=dtype, **SIZES)
    held = [lcr.state_bytes(mla.init_state(2, capacity)) for capacity in (100, 1100)]
    assert held[0] == 2 * (100 * (22 + 8) * itemsize + 8)
    assert held[1] - held[0] == 2 * 1000 * (22 + 8) * itemsize


def test_low_rank_queries():
    mla = lcr.make_mixer("mla", 32, rngs=nnx.Rngs(0), q_lora_rank=6)
    assert mla.query_down.kernel.shape == (32, 6) and mla.query.kernel.shape[0] == 6
    x = np.random.default_rng(0).standard_normal((2, 8, 32), np.float32)
    run = nnx.jit(lambda mla, *args: mla(*args))
    whole, _ = run(mla, x)
    first, state = run(mla, x[:, :4], mla.init_state(2, 8))
    assert_close(np.concatenate([first, run(mla, x[:, 4:], state)[0]], axis=1), whole, "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 7}, "num_heads=7 does not divide d_model=50: expected a divisor, or nope_head_dim"),
        ({"rope_head_dim": 5}, "rope_head_dim=5: expected an even width"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0: expected a whole number above 0"),
        ({"implementation": "chunkd"}, "Did you mean 'chunked'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lcr.make_mixer("mla", WIDTH, rngs=nnx.Rngs(0), **options)

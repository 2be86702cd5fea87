"""MLA against DeepSeek-V2 and -V3 of transformers, its cache, and its two forms."""

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
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WIDTH = 50
SIZES = {"num_heads": 5, "nope_head_dim": 10, "rope_head_dim": 8, "value_head_dim": 14, "kv_lora_rank": 22}


YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}
OPTIONS = {"v2": SIZES, "v3": {**SIZES, "q_lora_rank": 20, "rope_scaling": YARN}}
EXPERTS = {
    "v2": MoEConfig(num_experts=6, top_k=3, d_expert=22, num_shared=2, normalize=False),
    "v3": MoEConfig(
        num_experts=8, top_k=3, d_expert=22, num_shared=1, scoring="sigmoid", balance="bias", weight_scale=2.5,
        num_groups=4, top_groups=2,
    ),
}  # fmt: skip


@functools.cache
def golden(version):
    files = (np.load(GOLDEN / f"{part}_deepseek_{version}.npz") for part in ("mla", "moe"))
    return {name: jnp.asarray(array) for file in files for name, array in file.items()}


def mixer(version, layer):
    """Layer `layer` of the golden model: its weights are [out, in]."""
    mla, weights = lcr.make_mixer("mla", WIDTH, rngs=nnx.Rngs(0), **OPTIONS[version]), golden(version)

    def named(name):
        return weights[f"{layer}.self_attn.{name}.weight"]

    if version == "v2":
        mla.query.kernel[...] = named("q_proj").T
    else:
        mla.query_down.kernel[...] = named("q_a_proj").T
        mla.query_norm.scale[...] = named("q_a_layernorm")
        mla.query.kernel[...] = named("q_b_proj").T
    mla.kv_down.kernel[...] = named("kv_a_proj_with_mqa").T
    mla.kv_norm.scale[...] = named("kv_a_layernorm")
    mla.out.kernel[...] = named("o_proj").T
    up = named("kv_b_proj").reshape(5, 10 + 14, 22).transpose(2, 0, 1)
    mla.key_up[...], mla.value_up[...] = up[..., :10], up[..., 10:]
    return mla


def feed_forward(version, layer):
    weights, rngs = golden(version), nnx.Rngs(0)

    def gate_up(prefix):
        parts = (weights[f"{layer}.{prefix}.{name}_proj.weight"].T for name in ("gate", "up"))
        return jnp.concatenate(list(parts), axis=-1)

    if layer == 0:
        dense = SwiGLU(WIDTH, 64, dtype=jnp.float32, rngs=rngs)
        dense.gate_up.kernel[...] = gate_up("mlp")
        dense.down.kernel[...] = weights["0.mlp.down_proj.weight"].T
        return dense
    moe = MoE(EXPERTS[version], WIDTH, 64, dtype=jnp.float32, rngs=rngs)
    experts = {name: weights[f"{layer}.experts.{name}_proj"].swapaxes(1, 2) for name in ("gate", "up", "down")}
    moe.router[...] = weights[f"{layer}.mlp.gate.weight"].T
    if version == "v3":
        moe.selection_bias[...] = weights[f"{layer}.mlp.gate.e_score_correction_bias"]
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
def layers(version):
    return [(mixer(version, layer), feed_forward(version, layer)) for layer in range(3)]


@functools.partial(jax.jit, static_argnums=0)
def logits(version, x, states):
    """The golden model on embedded tokens [1, T, D]; states: None, or one for each layer."""
    weights, after = golden(version), []
    for layer, (mla, mlp) in enumerate(layers(version)):
        h = norm(x, weights[f"{layer}.input_layernorm.weight"])
        y, state = mla(h, None if states is None else states[layer])
        after.append(state)
        x = x + y
        h = norm(x, weights[f"{layer}.post_attention_layernorm.weight"])
        x = x + (mlp(h) if layer == 0 else mlp(h)[0])
    return norm(x, weights["norm"]) @ weights["head"].T, after


@pytest.mark.parametrize("cuts", [(), (33, 34)], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("version", OPTIONS)
def test_equals_deepseek_of_transformers(version, cuts):
    """V2; and V3, with queries of low rank, YaRN, and experts chosen by groups, sigmoids and a bias."""
    weights = golden(version)
    x = weights["embedded"][None]
    empty = [mla.init_state(1, 67) for mla, _ in layers(version)]  # and the layers are made outside of jit
    states = empty if cuts else None
    outputs = []
    for start, end in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        y, states = logits(version, x[:, start:end], states)
        outputs.append(y)
    assert_close(jnp.concatenate(outputs, axis=1)[0], weights["logits"], "float32 oracle")


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

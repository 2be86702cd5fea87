"""Whole models of transformers whose Mamba has norms inside: Jamba (with attention and experts) and Falcon-Mamba."""

import pathlib

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from pallas_kernels.tolerances import assert_close

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


class Golden:
    """The arrays of golden files, each handed out once; linear layers there are [out, in]. What is set in a model has
    an axis for its repetitions in front."""

    def __init__(self, *names):
        self.arrays = {}
        for name in names:
            self.arrays |= dict(np.load(GOLDEN / f"{name}.npz"))

    def __call__(self, name):
        return self.arrays.pop(name)

    def linear(self, *names):
        return np.concatenate([self(f"{name}.weight").T for name in names], axis=-1)


def set_mamba(mamba, at, golden, prefix, norms):
    """Sets the mixer's parameters at the index `at` of their first axis."""

    def put(parameter, value):
        parameter[...] = parameter[...].at[at].set(value)

    for name in ("in_proj", "x_proj", "out_proj"):
        put(getattr(mamba, name).kernel, golden.linear(f"{prefix}.{name}"))
    put(mamba.conv.weight, golden(f"{prefix}.conv1d.weight")[:, 0, ::-1].T)
    put(mamba.conv.bias, golden(f"{prefix}.conv1d.bias"))
    put(mamba.dt_kernel, golden.linear(f"{prefix}.dt_proj"))
    put(mamba.dt_bias, golden(f"{prefix}.dt_proj.bias"))
    put(mamba.A_log, golden(f"{prefix}.A_log"))
    put(mamba.D, golden(f"{prefix}.D"))
    for name, norm in norms.items():
        put(getattr(mamba, name).scale, golden(f"{prefix}.{norm}.weight"))


def jamba():
    golden = Golden("jamba_transformers", "jamba_transformers_mlp")
    model = lcr.make_model(
        {"vocab_size": 131, "d_model": 48, "d_ff": 36, "norm_epsilon": 1e-6, "tie_embeddings": False,
         "mixers": ("mamba", "gqa", "mamba", "mamba"), "feed_forward": ("swiglu", "moe", "swiglu", "moe"),
         "mixer_options": {"mamba": {"state_size": 9, "dt_rank": 5, "inner_norm": "scaled"},
                           "gqa": {"num_heads": 6, "num_kv_heads": 2, "positions": "none"}},
         "feed_forward_options": {"moe": {"num_experts": 4, "top_k": 2, "d_expert": 36, "normalize": False}}},
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    norms = {"dt_norm": "dt_layernorm", "B_norm": "b_layernorm", "C_norm": "c_layernorm"}
    for i, block in enumerate(model.groups.blocks):
        prefix = f"model.layers.{i}"
        block.mixer_norm.scale[...] = golden(f"{prefix}.input_layernorm.weight")[None]
        block.mlp_norm.scale[...] = golden(f"{prefix}.pre_ff_layernorm.weight")[None]
        if i == 1:
            for name, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
                getattr(block.mixer, name).kernel[...] = golden.linear(f"{prefix}.self_attn.{theirs}_proj")[None]
        else:
            set_mamba(block.mixer, 0, golden, f"{prefix}.mamba", norms)
        mlp = f"{prefix}.feed_forward"
        if i in (1, 3):
            experts = [f"{mlp}.experts.{e}" for e in range(4)]
            block.mlp.router[...] = golden.linear(f"{mlp}.router")[None]
            gate_up = [golden.linear(f"{e}.gate_proj", f"{e}.up_proj") for e in experts]
            block.mlp.gate_up[...] = np.stack(gate_up)[None]
            block.mlp.down[...] = np.stack([golden.linear(f"{e}.down_proj") for e in experts])[None]
        else:
            block.mlp.gate_up.kernel[...] = golden.linear(f"{mlp}.gate_proj", f"{mlp}.up_proj")[None]
            block.mlp.down.kernel[...] = golden.linear(f"{mlp}.down_proj")[None]
    model.embedding[...] = golden("model.embed_tokens.weight")
    model.final_norm.scale[...] = golden("model.final_layernorm.weight")
    model.head[...] = golden("lm_head.weight")
    return model, golden


def falcon_mamba():
    golden = Golden("falcon_mamba_transformers")
    model = lcr.make_model(
        {"vocab_size": 131, "d_model": 48, "d_ff": 0, "tie_embeddings": False, "mixers": ("mamba",) * 3,
         "mixer_options": {"mamba": {"state_size": 9, "dt_rank": 6, "inner_norm": "plain", "inner_norm_eps": 1e-4}}},
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    block = model.groups.blocks[0]
    for i in range(3):
        set_mamba(block.mixer, i, golden, f"backbone.layers.{i}.mixer", {})
    block.mixer_norm.scale[...] = np.stack([golden(f"backbone.layers.{i}.norm.weight") for i in range(3)])
    model.embedding[...] = golden("backbone.embeddings.weight")
    model.final_norm.scale[...] = golden("backbone.norm_f.weight")
    model.head[...] = golden("lm_head.weight")
    return model, golden


@pytest.mark.parametrize("build", [jamba, falcon_mamba])
def test_equals_the_model_of_transformers_whole_and_in_pieces(build):
    model, golden = build()
    ids, at, expected = jnp.asarray(golden("input_ids")), golden("at"), golden("logits")
    assert not golden.arrays, f"weights without a place: {sorted(golden.arrays)}"
    graph, parameters = nnx.split(model)
    run = jax.jit(lambda *call: nnx.merge(graph, parameters)(*call))
    whole, _ = run(ids)
    assert_close(whole[:, at], expected, "float32 oracle")
    states, outputs = model.init_states(2, 67), []
    for start, end in ((0, 33), (33, 66), (66, 67)):
        part, states = run(ids[:, start:end], states)
        outputs.append(part)
    assert_close(jnp.concatenate(outputs, axis=1)[:, at], expected, "float32 oracle")

"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import (
    ACTIVATIONS, Family, activation_name, balance_options, attention, ends, experts, head_fields, scale,
    transformer_fields, write_transformer, write_balance,
)  # fmt: skip
from lcr.pretrained.fields import Fields
from lcr.pretrained.rope import read_rope, write_rope
from lcr.pretrained.tensors import Line, transposed


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_layers=32)
    heads = head_fields(c, sizes["d_model"], num_heads=32, num_kv_heads=8)
    rope = read_rope(c, heads["head_dim"], longest=131_072, theta=1_000_000.0)
    balance = c.number("router_aux_loss_coef", 0.001)
    mixture = {
        "num_experts": c.count("num_local_experts", c.count("num_experts", 8)),
        "top_k": c.whole("num_experts_per_tok", 2),
        "d_expert": sizes["d_ff"],
        "activation": c.choice("hidden_act", ACTIVATIONS, "silu"),
        **balance_options(balance),
    }
    return sizes | {
        "mixer_options": {"attention": {**heads, **rope, "window": c.nullable("sliding_window", None)}},
        "feed_forward": "moe",
        "feed_forward_options": {"moe": mixture},
        "norm_epsilon": c.number("rms_norm_eps", 1e-5),
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    options, mixture = config.mixer("attention"), config.feed_forward_options["moe"]
    return write_transformer(config, "attention") | write_rope(options) | {
        "sliding_window": options.window,
        "num_local_experts": mixture["num_experts"],
        "num_experts_per_tok": mixture["top_k"],
        "router_aux_loss_coef": write_balance(mixture),
        "hidden_act": activation_name(mixture.get("activation", "silu")),
    }  # fmt: skip


def lines(config: ModelConfig) -> Iterator[Line]:
    yield from ends(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}"
        mixture = f"{prefix}.block_sparse_moe"
        yield from scale(f"{prefix}.input_layernorm", "mixer_norm", config.d_model, layer=layer)
        yield from attention(f"{prefix}.self_attn", config, layer)
        yield from scale(f"{prefix}.post_attention_layernorm", "mlp_norm", config.d_model, layer=layer)
        router = config.feed_forward_options["moe"]["num_experts"], config.d_model
        yield Line(f"{mixture}.gate.weight", router, "mlp.router", transposed, layer=layer)
        yield from experts(_name(mixture), config, layer)


def _name(mixture: str):
    return lambda e, i: f"{mixture}.experts.{e}.{('w1', 'w3', 'w2')[i]}.weight"


FAMILY = Family("mixtral", "MixtralForCausalLM", read, write, lines)

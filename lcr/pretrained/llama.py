"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and what has their form."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import (
    ACTIVATIONS, Family, activation_name, attention, ends, gated, head_fields, scale, transformer_fields,
    write_transformer,
)  # fmt: skip
from lcr.pretrained.fields import Fields
from lcr.pretrained.rope import read_rope, write_rope
from lcr.pretrained.tensors import Line


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_layers=32)
    heads = head_fields(c, sizes["d_model"], num_heads=32, num_kv_heads=None)
    bias = c.flag("attention_bias", False)
    options = {**heads, **read_rope(c, heads["head_dim"], longest=2048), "qkv_bias": bias, "out_bias": bias}
    activation, mlp_bias = c.choice("hidden_act", ACTIVATIONS, "silu"), c.flag("mlp_bias", False)
    return sizes | {
        "mixer_options": {"attention": options},
        "feed_forward_options": {"swiglu": {"activation": activation, "use_bias": mlp_bias}},
        "norm_epsilon": c.number("rms_norm_eps", 1e-6),
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    options, feed_forward = config.mixer("attention"), config.feed_forward_options.get("swiglu", {})
    return write_transformer(config, "attention", divides=True) | write_rope(options) | {
        "attention_bias": options.qkv_bias,
        "mlp_bias": feed_forward.get("use_bias", False),
        "hidden_act": activation_name(feed_forward.get("activation", "silu")),
    }  # fmt: skip


def lines(config: ModelConfig) -> Iterator[Line]:
    yield from ends(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}"
        yield from scale(f"{prefix}.input_layernorm", "mixer_norm", config.d_model, layer=layer)
        yield from attention(f"{prefix}.self_attn", config, layer)
        yield from scale(f"{prefix}.post_attention_layernorm", "mlp_norm", config.d_model, layer=layer)
        yield from gated(f"{prefix}.mlp", config, layer)


FAMILY = Family("llama", "LlamaForCausalLM", read, write, lines)

"""Mistral (arXiv 2310.06825): Llama with attention in a sliding window."""

from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import (
    ACTIVATIONS, Family, activation_name, head_fields, transformer_fields, write_transformer,
)  # fmt: skip
from lcr.pretrained.fields import Fields
from lcr.pretrained.llama import lines
from lcr.pretrained.rope import read_rope, write_rope


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_layers=32)
    heads = head_fields(c, sizes["d_model"], num_heads=32, num_kv_heads=8)
    options = {
        **heads,
        **read_rope(c, heads["head_dim"], longest=131_072),
        "window": c.nullable("sliding_window", 4096),
    }
    return sizes | {
        "mixer_options": {"attention": options},
        "feed_forward_options": {"swiglu": {"activation": c.choice("hidden_act", ACTIVATIONS, "silu")}},
        "norm_epsilon": c.number("rms_norm_eps", 1e-6),
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    options, feed_forward = config.mixer("attention"), config.feed_forward_options.get("swiglu", {})
    return write_transformer(config, "attention") | write_rope(options) | {
        "sliding_window": options.window,
        "hidden_act": activation_name(feed_forward.get("activation", "silu")),
    }  # fmt: skip


FAMILY = Family("mistral", "MistralForCausalLM", read, write, lines)

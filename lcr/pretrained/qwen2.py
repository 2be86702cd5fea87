"""Qwen2 and 2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values."""

from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import (
    ACTIVATIONS, Family, activation_name, head_fields, layer_kinds, transformer_fields, write_kinds,
    write_transformer,
)  # fmt: skip
from lcr.pretrained.fields import Fields
from lcr.pretrained.llama import lines
from lcr.pretrained.rope import read_rope, write_rope


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, num_layers=32)
    heads = head_fields(c, sizes["d_model"], num_heads=32, num_kv_heads=32)
    return read_layers(c, sizes, {**heads, **read_rope(c, heads["head_dim"], longest=32_768), "qkv_bias": True})


def read_layers(c: Fields, sizes: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What Qwen2 and Qwen3 have alike: the layers from `max_window_layers` on may see a window alone."""
    count, window = len(sizes["mixers"]), c.nullable("sliding_window", 4096)
    if not c.flag("use_sliding_window", False):
        window = None
    first = c.whole("max_window_layers", 28, least=0)
    default = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(count)]
    kinds = {"full_attention": options, "sliding_attention": options | {"window": window}}
    return sizes | layer_kinds(c, count, default, kinds) | {
        "feed_forward_options": {"swiglu": {"activation": c.choice("hidden_act", ACTIVATIONS, "silu")}},
        "norm_epsilon": c.number("rms_norm_eps", 1e-6),
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }  # fmt: skip


def write(config: ModelConfig) -> dict[str, Any]:
    name, feed_forward = config.mixers[0], config.feed_forward_options.get("swiglu", {})
    windows = {config.mixer(name).window for name in config.mixers} - {None}
    return write_transformer(config, name) | write_rope(config.mixer(name)) | {
        "use_sliding_window": bool(windows),
        "sliding_window": max(windows, default=None),
        "layer_types": write_kinds(config),
        "hidden_act": activation_name(feed_forward.get("activation", "silu")),
    }  # fmt: skip


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read, write, lines)

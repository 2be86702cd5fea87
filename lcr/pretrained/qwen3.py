"""Qwen3 (arXiv 2505.09388): Llama with norms of each query and key head."""

from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import qwen2
from lcr.pretrained.family import Family, head_fields, transformer_fields
from lcr.pretrained.fields import Fields
from lcr.pretrained.llama import lines
from lcr.pretrained.rope import read_rope


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, num_layers=32)
    heads = head_fields(c, sizes["d_model"], num_heads=32, num_kv_heads=32, head_dim=128)
    bias = c.flag("attention_bias", False)
    norms = {"qk_norm": True, "norm_epsilon": c.number("rms_norm_eps", 1e-6)}
    options = {**heads, **read_rope(c, heads["head_dim"], longest=32_768), **norms, "qkv_bias": bias, "out_bias": bias}
    return qwen2.read_layers(c, sizes, options)


def write(config: ModelConfig) -> dict[str, Any]:
    return qwen2.write(config) | {"attention_bias": config.mixer(config.mixers[0]).qkv_bias}


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read, write, lines)

"""Gemma 2 (arXiv 2408.00118): soft caps, norms before and after, and attention in a window by turns."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import (
    ACTIVATIONS, Family, activation_name, attention, ends, gated, head_fields, layer_kinds, optional_float, scale,
    transformer_fields, write_kinds, write_transformer,
)  # fmt: skip
from lcr.pretrained.fields import Fields
from lcr.pretrained.rope import read_rope, write_rope
from lcr.pretrained.tensors import Line


def read(c: Fields) -> dict[str, Any]:
    sizes, options = read_sizes(c, vocab_size=256_000, attention_cap=50.0)
    options |= read_rope(c, options["head_dim"], longest=8192)
    return sizes | read_layers(c, sizes, options, options, period=2, logit_cap=30.0)


def read_sizes(c: Fields, *, vocab_size: int, attention_cap: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes, and the options of attention without its positions; alike in Gemma 2 and 3."""
    sizes = transformer_fields(c, vocab_size=vocab_size, hidden_size=2304, intermediate_size=9216, num_layers=26)
    heads = head_fields(c, sizes["d_model"], num_heads=8, num_kv_heads=4, head_dim=256)
    bias = c.flag("attention_bias", False)
    c.only("use_bidirectional_attention", False)
    cap, scalar = "attn_logit_softcapping", c.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        c.refuse("query_pre_attn_scalar", "a number above 0")
    return sizes, heads | {
        "scale": scalar**-0.5,
        "soft_cap": None if c.null(cap) else c.number(cap, attention_cap),
        "qkv_bias": bias,
        "out_bias": bias,
    }  # fmt: skip


def read_layers(
    c: Fields, sizes: dict, full: dict, sliding: dict, *, period: int, logit_cap: float | None
) -> dict[str, Any]:
    """The layers, of which every period-th is without a window; alike in Gemma 2 and 3."""
    count = len(sizes["mixers"])
    default = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]
    kinds = {"full_attention": full, "sliding_attention": sliding | {"window": c.nullable("sliding_window", 4096)}}
    c.get("hidden_act", None)  # an older name, which the models' code passes over
    cap, activation = "final_logit_softcapping", c.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    return layer_kinds(c, count, default, kinds) | {
        "feed_forward_options": {"swiglu": {"activation": activation}},
        "norm": "rms_offset",
        "norm_epsilon": c.number("rms_norm_eps", 1e-6),
        "post_norms": True,
        "embedding_scale": sizes["d_model"] ** 0.5,
        "logit_soft_cap": None if c.null(cap) else c.number(cap, logit_cap),
        "tie_embeddings": c.flag("tie_word_embeddings", True),
    }  # fmt: skip


def write(config: ModelConfig) -> dict[str, Any]:
    options, feed_forward = config.mixer(config.mixers[0]), config.feed_forward_options.get("swiglu", {})
    windows = {config.mixer(name).window for name in config.mixers} - {None}
    return write_transformer(config, config.mixers[0], divides=True) | write_rope(options) | {
        "attention_bias": options.qkv_bias,
        "query_pre_attn_scalar": _whole(options.scale or options.head_dim**-0.5),
        "attn_logit_softcapping": optional_float(options.soft_cap),
        "final_logit_softcapping": optional_float(config.logit_soft_cap),
        "sliding_window": max(windows, default=4096),  # transformers wants one even where no layer has it
        "layer_types": write_kinds(config),
        "hidden_activation": activation_name(feed_forward.get("activation", "silu")),
    }  # fmt: skip


def _whole(scale: float) -> int:
    """transformers takes a whole number only; where it is none, what is given is read as another model, and refused."""
    return round(scale**-2)


def lines(config: ModelConfig) -> Iterator[Line]:
    yield from ends(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}"
        for theirs, ours in (
            ("input_layernorm", "mixer_norm"),
            ("post_attention_layernorm", "mixer_post_norm"),
            ("pre_feedforward_layernorm", "mlp_norm"),
            ("post_feedforward_layernorm", "mlp_post_norm"),
        ):
            yield from scale(f"{prefix}.{theirs}", ours, config.d_model, layer=layer)
        yield from attention(f"{prefix}.self_attn", config, layer)
        yield from gated(f"{prefix}.mlp", config, layer)


FAMILY = Family("gemma2", "Gemma2ForCausalLM", read, write, lines)

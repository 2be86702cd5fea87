"""Phi-3 and 4 (arXiv 2404.14219): Llama with fused projections and LongRoPE."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import (
    ACTIVATIONS, Family, activation_name, ends, head_fields, linear, rows, scale, transformer_fields,
    write_transformer,
)  # fmt: skip
from lcr.pretrained.fields import Fields
from lcr.pretrained.rope import rope_options, write_rope
from lcr.pretrained.tensors import Line


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=32_064, hidden_size=3072, intermediate_size=8192, num_layers=32)
    heads = head_fields(c, sizes["d_model"], num_heads=32, num_kv_heads=None)
    given = c.mapping("rope_scaling") or c.mapping("rope_parameters")
    rope = rope_options(
        c,
        given,
        heads["head_dim"],
        base=c.number("rope_theta", 10_000.0),
        partial=c.number("partial_rotary_factor", 1.0),
        types=("default", "longrope"),
        original=4096,
        longest=4096,
    )
    for name in ("resid_pdrop", "embd_pdrop"):
        c.get(name, None)  # of training
    options = {**heads, **rope, "window": c.nullable("sliding_window", None)}
    return sizes | {
        "mixer_options": {"attention": options},
        "feed_forward_options": {"swiglu": {"activation": c.choice("hidden_act", ACTIVATIONS, "silu")}},
        "norm_epsilon": c.number("rms_norm_eps", 1e-5),
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    options, feed_forward = config.mixer("attention"), config.feed_forward_options.get("swiglu", {})
    fields = write_transformer(config, "attention") | write_rope(options) | {
        "sliding_window": options.window,
        "hidden_act": activation_name(feed_forward.get("activation", "silu")),
    }  # fmt: skip
    width = fields["head_dim"]
    if width == config.d_model // fields["num_attention_heads"]:
        fields.pop("head_dim")  # not a field of its own there, but read where it stands
    fields["pad_token_id"] = None  # the class's own is 32,000, whatever the vocabulary
    if options.rope_width is not None:
        fields["partial_rotary_factor"] = options.rope_width / width
    scaling = fields["rope_scaling"]
    if scaling is not None:
        original = scaling.pop("original_max_position_embeddings")
        fields["original_max_position_embeddings"] = original
        fields["max_position_embeddings"] = round(scaling.pop("factor", 1.0) * original)
        fields["rope_scaling"] = {"type": scaling.pop("rope_type")} | scaling
    return fields


def lines(config: ModelConfig) -> Iterator[Line]:
    yield from ends(config)
    width, inner = config.d_model, config.ff_width
    heads, kv_heads, head_dim = config.mixer("attention").head_sizes(width)
    sizes = {"query": heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
    for layer in range(len(config.mixers)):
        prefix, start = f"model.layers.{layer}", 0
        yield from scale(f"{prefix}.input_layernorm", "mixer_norm", width, layer=layer)
        for name, size in sizes.items():
            fused = f"{prefix}.self_attn.qkv_proj"
            yield from rows(fused, sum(sizes.values()), f"mixer.{name}", start, size, width, layer=layer)
            start += size
        yield from linear(f"{prefix}.self_attn.o_proj", "mixer.out", width, sizes["query"], layer=layer)
        yield from scale(f"{prefix}.post_attention_layernorm", "mlp_norm", width, layer=layer)
        yield from linear(f"{prefix}.mlp.gate_up_proj", "mlp.gate_up", 2 * inner, width, layer=layer)
        yield from linear(f"{prefix}.mlp.down_proj", "mlp.down", width, inner, layer=layer)


FAMILY = Family("phi3", "Phi3ForCausalLM", read, write, lines)

"""DeepSeek-V2 (arXiv 2405.04434): multi-head latent attention and, after the first layers, mixtures of experts."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import (
    ACTIVATIONS, Family, activation_name, balance_options, ends, experts, gated, linear, scale, transformer_fields,
    write_balance,
)  # fmt: skip
from lcr.pretrained.fields import Fields
from lcr.pretrained.rope import read_rope, write_rope
from lcr.pretrained.tensors import Line, transposed


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=102_400, hidden_size=4096, intermediate_size=11_008, num_layers=32)
    c.only("scoring_func", "softmax")
    c.only("norm_topk_prob", False)  # transformers never reads it, the authors' code does: they would differ
    groups = c.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    counts = (c.whole("n_group", 1), c.whole("topk_group", 1))
    balance = c.number("aux_loss_alpha", 0.0)
    mixture = {
        "num_experts": c.count("n_routed_experts", c.count("num_experts", 64)),
        "top_k": c.whole("num_experts_per_tok", 1),
        "num_shared": c.whole("n_shared_experts", 2, least=0),
        "num_groups": counts[0] if groups else 1,
        "top_groups": counts[1] if groups else 1,
        "shared_bias": c.flag("mlp_bias", False),
        "normalize": False,
        **balance_options(balance),
    }
    for name in ("seq_aux", "ep_size"):  # of training
        c.get(name, None)
    c.only("rope_interleave", True)
    return read_layers(c, sizes, mixture, num_heads=32, dense=0, d_expert=1407, weight=1.0, longest=2048)


def read_layers(
    c: Fields,
    sizes: dict,
    mixture: dict,
    *,
    num_heads: int,
    dense: int,
    d_expert: int,
    weight: float,
    longest: int,
) -> dict[str, Any]:
    """Attention and feed-forwards; alike in V2 and V3."""
    depth, rope_width = len(sizes["mixers"]), c.whole("qk_rope_head_dim", 64)
    heads = c.whole("num_attention_heads", num_heads)
    if c.whole("num_key_value_heads", heads) != heads:
        c.refuse("num_key_value_heads", f"num_attention_heads={heads}: latent attention has keys for each head")
    c.get("head_dim", None)  # follows from the others
    frequency = c.whole("moe_layer_freq", 1)  # the authors' code reads it, transformers does not
    activation = c.choice("hidden_act", ACTIVATIONS, "silu")
    attention = {
        "num_heads": heads,
        "nope_head_dim": c.whole("qk_nope_head_dim", 128),
        "rope_head_dim": rope_width,
        "value_head_dim": c.whole("v_head_dim", 128),
        "kv_lora_rank": c.whole("kv_lora_rank", 512),
        "q_lora_rank": c.nullable("q_lora_rank", 1536),
        "bias": c.flag("attention_bias", False),
        "rope_interleaved": not c.null("rope_interleave") and c.flag("rope_interleave", True),
        **read_rope(c, rope_width, longest=longest),
    }
    mixture = mixture | {
        "d_expert": c.whole("moe_intermediate_size", d_expert),
        "weight_scale": c.number("routed_scaling_factor", weight),
        "activation": activation,
    }
    first = c.whole("first_k_dense_replace", dense, least=0)
    kinds = tuple("moe" if i >= first and i % frequency == 0 else "swiglu" for i in range(depth))
    options = {"swiglu": {"activation": activation, "use_bias": mixture.get("shared_bias", False)}, "moe": mixture}
    return sizes | {
        "mixers": ("mla",) * depth,
        "mixer_options": {"mla": attention},
        "feed_forward": kinds if len(set(kinds)) == 2 else kinds[0],
        "feed_forward_options": {name: options[name] for name in set(kinds)},
        "norm_epsilon": c.number("rms_norm_eps", 1e-6),
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    mixture = config.feed_forward_options.get("moe", {})
    grouped = mixture.get("num_groups", 1) > 1
    return write_layers(config) | {
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": write_balance(mixture),
        "mlp_bias": config.feed_forward_options.get("swiglu", {}).get("use_bias", mixture.get("shared_bias", False)),
    }


def write_layers(config: ModelConfig) -> dict[str, Any]:
    options, kinds = config.mixer("mla"), [name for _, name in config.layers]
    if config.d_model % options.num_heads:
        raise ValueError(f"{options.num_heads} heads do not divide the width, which transformers asks for there")
    every = config.feed_forward_options
    mixture, activation = every.get("moe", {}), every[kinds[0]].get("activation", "silu")
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "moe_intermediate_size": mixture.get("d_expert", config.ff_width),
        "num_hidden_layers": len(config.mixers),
        "num_attention_heads": options.num_heads,
        "num_key_value_heads": options.num_heads,
        "kv_lora_rank": options.kv_lora_rank,
        "q_lora_rank": options.q_lora_rank,
        "qk_rope_head_dim": options.rope_head_dim,
        "qk_nope_head_dim": options.nope_head_dim,
        "v_head_dim": options.value_head_dim,
        "attention_bias": options.bias,
        "rope_interleave": options.rope_interleaved,
        **write_kinds(kinds),
        "n_routed_experts": mixture.get("num_experts", 1),
        "num_experts_per_tok": mixture.get("top_k", 1),
        "n_shared_experts": mixture.get("num_shared", 0),
        "n_group": mixture.get("num_groups", 1),
        "topk_group": mixture.get("top_groups", 1),
        "routed_scaling_factor": float(mixture.get("weight_scale", 1.0)),
        "hidden_act": activation_name(activation),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(options),
    }
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"]["type"] = fields["rope_scaling"]["rope_type"]
    return fields


def write_kinds(kinds: list[str]) -> dict[str, int]:
    """Which layers are mixtures: from the first one on, every so many."""
    depth, mixtures = len(kinds), [i for i, kind in enumerate(kinds) if kind == "moe"]
    first = mixtures[0] if mixtures else depth
    if len(mixtures) > 1:
        frequency = mixtures[1] - first
    else:
        frequency = 1 if first >= depth - 1 else first or depth
    return {"first_k_dense_replace": first, "moe_layer_freq": frequency}


def lines(config: ModelConfig) -> Iterator[Line]:
    yield from ends(config)
    for layer, (_, kind) in enumerate(config.layers):
        prefix = f"model.layers.{layer}"
        yield from scale(f"{prefix}.input_layernorm", "mixer_norm", config.d_model, layer=layer)
        yield from latent_attention(f"{prefix}.self_attn", config, layer)
        yield from scale(f"{prefix}.post_attention_layernorm", "mlp_norm", config.d_model, layer=layer)
        yield from (
            gated(f"{prefix}.mlp", config, layer) if kind == "swiglu" else mixture(f"{prefix}.mlp", config, layer)
        )


def latent_attention(prefix: str, config: ModelConfig, layer: int) -> Iterator[Line]:
    options, width = config.mixer("mla"), config.d_model
    heads, rank, nope, value = options.num_heads, options.kv_lora_rank, options.nope_head_dim, options.value_head_dim
    key = nope + options.rope_head_dim
    if options.q_lora_rank is None:
        yield from linear(f"{prefix}.q_proj", "mixer.query", heads * key, width, layer=layer)
    else:
        inner, down = options.q_lora_rank, f"{prefix}.q_a_proj"
        yield from linear(down, "mixer.query_down", inner, width, bias=options.bias, layer=layer)
        yield from scale(f"{prefix}.q_a_layernorm", "mixer.query_norm", inner, layer=layer)
        yield from linear(f"{prefix}.q_b_proj", "mixer.query", heads * key, inner, layer=layer)
    down = f"{prefix}.kv_a_proj_with_mqa"
    yield from linear(down, "mixer.kv_down", rank + options.rope_head_dim, width, bias=options.bias, layer=layer)
    yield from scale(f"{prefix}.kv_a_layernorm", "mixer.kv_norm", rank, layer=layer)
    for name, part in (("key_up", slice(0, nope)), ("value_up", slice(nope, None))):
        yield Line(  # [heads (nope + value), rank] there, [rank, heads, width] here
            f"{prefix}.kv_b_proj.weight",
            (heads * (nope + value), rank),
            f"mixer.{name}",
            lambda t, part=part: t.reshape(heads, nope + value, rank)[:, part].transpose(2, 0, 1),
            layer=layer,
        )
    yield from linear(f"{prefix}.o_proj", "mixer.out", width, heads * value, bias=options.bias, layer=layer)


def mixture(prefix: str, config: ModelConfig, layer: int) -> Iterator[Line]:
    options = config.feed_forward_options["moe"]
    router = options["num_experts"], config.d_model
    yield Line(f"{prefix}.gate.weight", router, "mlp.router", transposed, layer=layer)
    if options.get("balance") == "bias":
        yield Line(f"{prefix}.gate.e_score_correction_bias", router[:1], "mlp.selection_bias", layer=layer)
    yield from experts(lambda e, i: f"{prefix}.experts.{e}.{('gate', 'up', 'down')[i]}_proj.weight", config, layer)
    if shared := options["num_shared"] * options["d_expert"]:
        yield from gated(f"{prefix}.shared_experts", config, layer, parameter="mlp.shared", d_ff=shared)


FAMILY = Family("deepseek_v2", "DeepseekV2ForCausalLM", read, write, lines, ("mla",))

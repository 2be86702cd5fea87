"""Jamba (arXiv 2403.19887): Mamba, now and then attention without positions, now and then a mixture of experts."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import mamba
from lcr.pretrained.family import (
    ACTIVATIONS, Family, activation_name, balance_options, attention, ends, experts, gated, head_fields, scale,
    transformer_fields, write_balance,
)  # fmt: skip
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line, transposed


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=65_536, hidden_size=4096, intermediate_size=14_336, num_layers=32)
    depth, epsilon = len(sizes["mixers"]), c.number("rms_norm_eps", 1e-6)
    heads = head_fields(c, sizes["d_model"], num_heads=32, num_kv_heads=8)
    c.only("sliding_window", None)
    for name in (
        "use_mamba_kernels",
        "use_mambapy",
        "use_associative_scan",
        "num_logits_to_keep",
        "output_router_logits",
    ):
        c.get(name, None)
    activation, balance = c.choice("hidden_act", ACTIVATIONS, "silu"), c.number("router_aux_loss_coef", 0.001)
    of_mamba = {
        "state_size": c.whole("mamba_d_state", 16),
        "expand": c.whole("mamba_expand", 2),
        "conv_width": c.whole("mamba_d_conv", 4),
        "dt_rank": mamba.rank(c, "mamba_dt_rank", sizes["d_model"]),
        "conv_bias": c.flag("mamba_conv_bias", True),
        "proj_bias": c.flag("mamba_proj_bias", False),
        "activation": activation,
        "inner_norm": "scaled",
        "inner_norm_eps": epsilon,
    }
    mixture = {
        "num_experts": c.count("num_experts", c.count("num_local_experts", 16)),
        "top_k": c.whole("num_experts_per_tok", 2),
        "d_expert": sizes["d_ff"],
        "normalize": False,
        "activation": activation,
        **balance_options(balance),
    }
    period, offset = c.whole("attn_layer_period", 8), c.whole("attn_layer_offset", 4, least=0)
    mixers = tuple("attention" if i % period == offset else "mamba" for i in range(depth))
    period, offset = c.whole("expert_layer_period", 2), c.whole("expert_layer_offset", 1, least=0)
    with_experts = [mixture["num_experts"] > 1 and i % period == offset for i in range(depth)]
    kinds = tuple("moe" if yes else "swiglu" for yes in with_experts)
    mixer_options = {"attention": heads | {"positions": "none"}, "mamba": of_mamba}
    options = {"swiglu": {"activation": activation}, "moe": mixture}
    return sizes | {
        "mixers": mixers,
        "mixer_options": {name: mixer_options[name] for name in set(mixers)},
        "feed_forward": kinds if len(set(kinds)) == 2 else kinds[0],
        "feed_forward_options": {name: options[name] for name in set(kinds)},
        "norm_epsilon": epsilon,
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    of_mamba, mixture = config.mixer("mamba"), config.feed_forward_options.get("moe", {})
    heads, kv_heads, head_dim = config.mixer("attention").head_sizes(config.d_model)
    mixers, kinds = zip(*config.layers, strict=True)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": len(mixers),
        "num_attention_heads": heads,
        **({} if head_dim == config.d_model // heads else {"head_dim": head_dim}),
        "num_key_value_heads": kv_heads,
        "num_experts": mixture.get("num_experts", 1),
        "num_experts_per_tok": mixture.get("top_k", 2),
        "router_aux_loss_coef": write_balance(mixture),
        **_period("attn_layer", [name == "attention" for name in mixers]),
        **_period("expert_layer", [name == "moe" for name in kinds]),
        "mamba_d_state": of_mamba.state_size,
        "mamba_d_conv": of_mamba.conv_width,
        "mamba_expand": of_mamba.expand,
        "mamba_dt_rank": of_mamba.dt_rank or -(-config.d_model // 16),
        "mamba_conv_bias": of_mamba.conv_bias,
        "mamba_proj_bias": of_mamba.proj_bias,
        "hidden_act": activation_name(of_mamba.activation),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _period(name: str, marked: list[bool]) -> dict[str, int]:
    """Where the marked layers stand. Where they have no period, what is given is read as other layers, and refused."""
    places = [i for i, mark in enumerate(marked) if mark]
    if not places:
        return {f"{name}_period": len(marked) + 1, f"{name}_offset": len(marked)}
    period = places[1] - places[0] if len(places) > 1 else max(len(marked), places[0] + 1)
    return {f"{name}_period": period, f"{name}_offset": places[0]}


def lines(config: ModelConfig) -> Iterator[Line]:
    yield from ends(config, norm="model.final_layernorm")
    for layer, (kind, feed_forward) in enumerate(config.layers):
        prefix = f"model.layers.{layer}"
        yield from scale(f"{prefix}.input_layernorm", "mixer_norm", config.d_model, layer=layer)
        if kind == "attention":
            yield from attention(f"{prefix}.self_attn", config, layer)
        else:
            options = config.mixer(kind)
            yield from mamba.mixer(f"{prefix}.mamba", config, layer)
            for name, ours, width in (
                ("dt", "dt_norm", options.dt_rank),
                ("b", "B_norm", options.state_size),
                ("c", "C_norm", options.state_size),
            ):
                yield from scale(f"{prefix}.mamba.{name}_layernorm", f"mixer.{ours}", width, layer=layer)
        yield from scale(f"{prefix}.pre_ff_layernorm", "mlp_norm", config.d_model, layer=layer)
        if feed_forward == "swiglu":
            yield from gated(f"{prefix}.feed_forward", config, layer)
        else:
            router = config.feed_forward_options["moe"]["num_experts"], config.d_model
            yield Line(f"{prefix}.feed_forward.router.weight", router, "mlp.router", transposed, layer=layer)
            yield from experts(_name(f"{prefix}.feed_forward"), config, layer)


def _name(prefix: str):
    return lambda e, i: f"{prefix}.experts.{e}.{('gate', 'up', 'down')[i]}_proj.weight"


FAMILY = Family("jamba", "JambaForCausalLM", read, write, lines, ("mamba", "attention"))

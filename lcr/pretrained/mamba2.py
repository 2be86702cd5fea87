"""Mamba-2 (arXiv 2405.21060)."""

import math
from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import ACTIVATIONS, Family, activation_name, ends, linear, scale
from lcr.pretrained.fields import Fields
from lcr.pretrained.mamba import TRAINING, convolution
from lcr.pretrained.tensors import Line


def read(c: Fields) -> dict[str, Any]:
    width, expand = c.whole("hidden_size", 4096), c.whole("expand", 2)
    heads, head_width = c.whole("num_heads", 128), c.whole("head_dim", 64)
    if heads * head_width != expand * width:
        c.refuse("num_heads", f"expand x hidden_size / head_dim, {expand * width} / {head_width}")
    # transformers passes over the last three: its step size has no rank, its norm is always there, and after the gate
    for name in (*TRAINING, "chunk_size", "time_step_rank", "rms_norm", "norm_before_gate"):
        c.get(name, None)
    limit = c.get("time_step_limit", [0.0, math.inf])
    if not isinstance(limit, list) or len(limit) != 2:
        c.refuse("time_step_limit", "two numbers")
    options = {
        "state_size": c.whole("state_size", 128),
        "expand": expand,
        "conv_width": c.whole("conv_kernel", 4),
        "head_width": head_width,
        "num_groups": c.whole("n_groups", 8),
        "dt_limit": tuple(_number(c, value) for value in limit),
        "norm_eps": c.number("layer_norm_epsilon", 1e-5),
        "proj_bias": c.flag("use_bias", False),
        "conv_bias": c.flag("use_conv_bias", True),
        "activation": c.choice("hidden_act", ACTIVATIONS, "silu"),
    }
    return {
        "vocab_size": c.whole("vocab_size", 32_768),
        "d_model": width,
        "d_ff": 0,
        "mixers": ("mamba2",) * c.count("num_hidden_layers", 64),
        "mixer_options": {"mamba2": options},
        "norm_epsilon": c.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }


def _number(c: Fields, value: Any) -> float:
    """Infinities are written as {"__float__": "Infinity"}, or as JSON's own extension."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        value = float(value["__float__"])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        c.refuse("time_step_limit", "two numbers")
    return float(value)


def write(config: ModelConfig) -> dict[str, Any]:
    options = config.mixer("mamba2")
    inner = options.expand * config.d_model
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.mixers),
        "state_size": options.state_size,
        "expand": options.expand,
        "conv_kernel": options.conv_width,
        "head_dim": options.head_width,
        "num_heads": inner // options.head_width,
        "n_groups": options.num_groups,
        "time_step_limit": [float(value) for value in options.dt_limit],
        "use_bias": options.proj_bias,
        "use_conv_bias": options.conv_bias,
        "hidden_act": activation_name(options.activation),
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    options, width = config.mixer("mamba2"), config.d_model
    inner = options.expand * width
    heads, channels = inner // options.head_width, inner + 2 * options.num_groups * options.state_size
    yield from ends(config, embedding="backbone.embeddings", norm="backbone.norm_f")
    for layer in range(len(config.mixers)):
        prefix, bias = f"backbone.layers.{layer}.mixer", options.proj_bias
        yield from scale(f"backbone.layers.{layer}.norm", "mixer_norm", width, layer=layer)
        into = f"{prefix}.in_proj"
        yield from linear(into, "mixer.in_proj", inner + channels + heads, width, bias=bias, layer=layer)
        yield from convolution(f"{prefix}.conv1d", channels, options, layer)
        for name in ("dt_bias", "A_log", "D"):
            yield Line(f"{prefix}.{name}", (heads,), f"mixer.{name}", layer=layer)
        yield Line(f"{prefix}.norm.weight", (inner,), "mixer.norm_scale", layer=layer)
        yield from linear(f"{prefix}.out_proj", "mixer.out_proj", width, inner, bias=bias, layer=layer)


FAMILY = Family("mamba2", "Mamba2ForCausalLM", read, write, lines, ("mamba2",))

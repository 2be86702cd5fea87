"""Mamba (arXiv 2312.00752)."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import ACTIVATIONS, Family, activation_name, ends, linear, scale
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line, transposed

TRAINING = (  # how parameters start, and which kernels there are for them
    "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor", "use_mambapy",
    "rescale_prenorm_residual", "residual_in_fp32", "use_associative_scan", "use_falcon_mambapy", "intermediate_size",
)  # fmt: skip

OLD_NAME = ((r"^backbone\.embedding\.weight$", "backbone.embeddings.weight"),)  # as the authors have it


def read(c: Fields) -> dict[str, Any]:
    width = c.whole("hidden_size", 768)
    for name in TRAINING:
        c.get(name, None)
    options = {
        "state_size": c.whole("state_size", 16),
        "expand": c.whole("expand", 2),
        "conv_width": c.whole("conv_kernel", 4),
        "dt_rank": rank(c, "time_step_rank", width),
        "proj_bias": c.flag("use_bias", False),
        "conv_bias": c.flag("use_conv_bias", True),
        "activation": c.choice("hidden_act", ACTIVATIONS, "silu"),
    }
    return {
        "vocab_size": c.whole("vocab_size", 50_280),
        "d_model": width,
        "d_ff": 0,
        "mixers": ("mamba",) * c.count("num_hidden_layers", 32),
        "mixer_options": {"mamba": options},
        "norm_epsilon": c.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": c.flag("tie_word_embeddings", True),
    }


def rank(c: Fields, name: str, width: int) -> int:
    """A rank of step sizes; "auto" is a sixteenth of the width."""
    return -(-width // 16) if c.get(name, "auto") == "auto" else c.whole(name)


def write(config: ModelConfig) -> dict[str, Any]:
    options = config.mixer("mamba")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.mixers),
        "state_size": options.state_size,
        "expand": options.expand,
        "intermediate_size": options.expand * config.d_model,
        "conv_kernel": options.conv_width,
        "time_step_rank": options.dt_rank or -(-config.d_model // 16),
        "use_bias": options.proj_bias,
        "use_conv_bias": options.conv_bias,
        "hidden_act": activation_name(options.activation),
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    yield from ends(config, embedding="backbone.embeddings", norm="backbone.norm_f")
    for layer in range(len(config.mixers)):
        yield from scale(f"backbone.layers.{layer}.norm", "mixer_norm", config.d_model, layer=layer)
        yield from mixer(f"backbone.layers.{layer}.mixer", config, layer)


def mixer(prefix: str, config: ModelConfig, layer: int) -> Iterator[Line]:
    options, width = config.mixer(config.mixers[layer]), config.d_model
    inner, states, dt_rank = options.expand * width, options.state_size, options.dt_rank
    yield from linear(f"{prefix}.in_proj", "mixer.in_proj", 2 * inner, width, bias=options.proj_bias, layer=layer)
    yield from convolution(f"{prefix}.conv1d", inner, options, layer)
    yield from linear(f"{prefix}.x_proj", "mixer.x_proj", dt_rank + 2 * states, inner, layer=layer)
    yield Line(f"{prefix}.dt_proj.weight", (inner, dt_rank), "mixer.dt_kernel", transposed, layer=layer)
    yield Line(f"{prefix}.dt_proj.bias", (inner,), "mixer.dt_bias", layer=layer)
    yield Line(f"{prefix}.A_log", (inner, states), "mixer.A_log", layer=layer)
    yield Line(f"{prefix}.D", (inner,), "mixer.D", layer=layer)
    yield from linear(f"{prefix}.out_proj", "mixer.out_proj", width, inner, bias=options.proj_bias, layer=layer)


def convolution(name: str, channels: int, options: Any, layer: int) -> Iterator[Line]:
    """[channels, 1, taps] there, oldest first; [taps, channels] here, newest first."""
    shape = channels, 1, options.conv_width
    yield Line(f"{name}.weight", shape, "mixer.conv.weight", lambda t: t[:, 0, ::-1].T, layer=layer)
    if options.conv_bias:
        yield Line(f"{name}.bias", (channels,), "mixer.conv.bias", layer=layer)


FAMILY = Family("mamba", "MambaForCausalLM", read, write, lines, ("mamba",), renamed=OLD_NAME)

"""Gated DeltaNet (arXiv 2412.06464) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import fla
from lcr.pretrained.delta_net import head_lines
from lcr.pretrained.family import Family
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line, transposed


def read(c: Fields) -> dict[str, Any]:
    sizes, depth = fla.read_sizes(c, hidden_size=2048, num_layers=21)
    feed_forward = fla.read_swiglu(c, sizes["d_model"], ratio=4)
    heads = c.whole("num_heads", 6)
    c.only("num_v_heads", None, heads)
    c.only("use_short_conv", True)
    c.only("output_gate_activation", "swish", "silu")
    options = {
        "num_heads": heads,
        "head_dim": c.whole("head_dim", 256),
        "expand_v": c.number("expand_v", 2.0),
        "conv_width": c.whole("conv_size", 4),
        "gate": c.flag("use_gate", True),
        "negative_eigenvalues": c.flag("allow_neg_eigval", False),
        "norm_eps": feed_forward["norm_epsilon"],
    }
    return sizes | feed_forward | {"mixers": ("gated_deltanet",) * depth, "mixer_options": {"gated_deltanet": options}}


def write(config: ModelConfig) -> dict[str, Any]:
    options = config.mixer("gated_deltanet")
    return fla.write_sizes(config) | {
        "num_heads": options.num_heads,
        "head_dim": options.head_dim,
        "expand_v": options.expand_v,
        "conv_size": options.conv_width,
        "use_gate": options.gate,
        "allow_neg_eigval": options.negative_eigenvalues,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    options, width = config.mixer("gated_deltanet"), config.d_model
    sizes = options.head_sizes(width)
    yield from fla.swiglu_lines(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}.attn"
        yield from head_lines(prefix, width, sizes, options, layer)
        yield Line(f"{prefix}.b_proj.weight", (sizes[0], width), "mixer.beta", transposed, layer=layer)
        yield Line(f"{prefix}.a_proj.weight", (sizes[0], width), "mixer.dt_kernel", transposed, layer=layer)
        yield Line(f"{prefix}.A_log", (sizes[0],), "mixer.A_log", layer=layer)
        yield Line(f"{prefix}.dt_bias", (sizes[0],), "mixer.dt_bias", layer=layer)


FAMILY = Family("gated_deltanet", "GatedDeltaNetForCausalLM", read, write, lines, ("gated_deltanet",))

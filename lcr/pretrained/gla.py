"""Gated linear attention (arXiv 2312.06635) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import fla
from lcr.pretrained.family import Family, linear
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line, transposed


def read(c: Fields) -> dict[str, Any]:
    sizes, depth = fla.read_sizes(c, hidden_size=2048, num_layers=24)
    feed_forward = fla.read_swiglu(c, sizes["d_model"], ratio=4)
    heads = c.whole("num_heads", 4)
    c.only("num_kv_heads", None, heads)
    for name, value in (
        ("feature_map", None), ("use_short_conv", False), ("use_gk", True), ("use_gv", False),
    ):  # fmt: skip
        c.only(name, value)
    c.get("conv_size", None)
    options = {
        "num_heads": heads,
        "key_factor": c.number("expand_k", 0.5),
        "value_factor": c.number("expand_v", 1.0),
        "gate": c.flag("use_output_gate", True),
        "least_log_decay": c.number("clamp_min", None),
        "norm_eps": feed_forward["norm_epsilon"],
        "norm_scale": not c.null("elementwise_affine") and c.flag("elementwise_affine", True),
    }
    return sizes | feed_forward | {"mixers": ("gla",) * depth, "mixer_options": {"gla": options}}


def write(config: ModelConfig) -> dict[str, Any]:
    options = config.mixer("gla")
    return fla.write_sizes(config) | {
        "num_heads": options.num_heads,
        "expand_k": options.key_factor,
        "expand_v": options.value_factor,
        "use_output_gate": options.gate,
        "clamp_min": options.least_log_decay,
        "elementwise_affine": options.norm_scale,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    options, width = config.mixer("gla"), config.d_model
    keys, values, rank = int(options.key_factor * width), int(options.value_factor * width), options.gate_rank
    yield from fla.swiglu_lines(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}.attn"
        for name, outputs in (("q", keys), ("k", keys), ("v", values)):
            yield from linear(f"{prefix}.{name}_proj", f"mixer.{name}_proj", outputs, width, layer=layer)
        yield from fla.gated_norm_lines(prefix, config, options, values, layer)
        yield Line(f"{prefix}.gk_proj.0.weight", (rank, width), "mixer.decay_down", transposed, layer=layer)
        yield Line(f"{prefix}.gk_proj.1.weight", (keys, rank), "mixer.decay_up", transposed, layer=layer)
        yield Line(f"{prefix}.gk_proj.1.bias", (keys,), "mixer.decay_bias", layer=layer)
        yield from linear(f"{prefix}.o_proj", "mixer.out_proj", width, values, layer=layer)


FAMILY = Family("gla", "GLAForCausalLM", read, write, lines, ("gla",), renamed=fla.UNFUSED)

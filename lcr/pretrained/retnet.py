"""RetNet (arXiv 2307.08621) in flash-linear-attention's format: rotated as RoPE, in pairs (i, i + K / 2)."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import fla
from lcr.pretrained.family import Family, linear
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line


def read(c: Fields) -> dict[str, Any]:
    sizes, depth = fla.read_sizes(c, hidden_size=2048, num_layers=24)
    feed_forward = fla.read_swiglu(c, sizes["d_model"], ratio=2)
    heads = c.whole("num_heads", 8)
    c.only("num_kv_heads", None, heads)
    c.only("expand_k", 1.0)
    c.only("feature_map", None)
    for name in ("use_short_conv", "conv_size"):  # which its layers are not given
        c.get(name, None)
    width = sizes["d_model"] // heads
    options = {
        "num_heads": heads,
        "value_factor": c.number("expand_v", 2.0),
        "gate": c.flag("use_output_gate", True),
        "norm_eps": feed_forward["norm_epsilon"],
        "norm_scale": not c.null("elementwise_affine") and c.flag("elementwise_affine", True),
        # retention's rotation ends at 1 / base, RoPE's with base 10,000 one step before
        "rotation_base": 10_000.0 ** (1 - 2 / width) if width > 2 else 10_000.0,
    }
    return sizes | feed_forward | {"mixers": ("retnet",) * depth, "mixer_options": {"retnet": options}}


def write(config: ModelConfig) -> dict[str, Any]:
    options = config.mixer("retnet")
    return fla.write_sizes(config) | {
        "num_heads": options.num_heads,
        "expand_k": 1.0,
        "expand_v": options.value_factor,
        "use_output_gate": options.gate,
        "elementwise_affine": options.norm_scale,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    options, width = config.mixer("retnet"), config.d_model
    values, heads = int(options.value_factor * width), options.num_heads
    yield from fla.swiglu_lines(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}.attn"
        for name in ("q", "k"):
            weight = f"{prefix}.{name}_proj.weight"
            halves, pairs = _halves(heads, width), _pairs(heads, width)
            yield Line(weight, (width, width), f"mixer.{name}_proj.kernel", halves, pairs, layer)
        yield from linear(f"{prefix}.v_proj", "mixer.v_proj", values, width, layer=layer)
        yield from fla.gated_norm_lines(prefix, config, options, values, layer)
        yield from linear(f"{prefix}.o_proj", "mixer.out_proj", width, values, layer=layer)


def _halves(heads: int, width: int):
    """[heads x halves x pairs, inputs] as [inputs, heads, pairs, halves]."""
    return lambda t: t.reshape(heads, 2, width // heads // 2, width).transpose(3, 0, 2, 1)


def _pairs(heads: int, width: int):
    """[inputs, heads x pairs x halves] as [inputs, heads, pairs, halves]."""
    return lambda p: p.reshape(width, heads, width // heads // 2, 2)


FAMILY = Family("retnet", "RetNetForCausalLM", read, write, lines, ("retnet",), renamed=fla.UNFUSED)

"""DeltaNet (arXiv 2406.06484) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import fla
from lcr.pretrained.family import Family, columns, linear
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line, transposed


def read(c: Fields) -> dict[str, Any]:
    sizes, depth = fla.read_sizes(c, hidden_size=2048, num_layers=24)
    feed_forward = fla.read_swiglu(c, sizes["d_model"], ratio=4)
    for name, value in (
        ("use_short_conv", True), ("use_beta", True), ("use_output_norm", True), ("qk_norm", "l2"),
        ("qk_activation", "silu"),
    ):  # fmt: skip
        c.only(name, value)
    options = {
        "num_heads": c.whole("num_heads", 16),
        "key_factor": c.number("expand_k", 1.0),
        "value_factor": c.number("expand_v", 1.0),
        "conv_width": c.whole("conv_size", 4),
        "gate": c.flag("use_gate", False),
        "negative_eigenvalues": c.flag("allow_neg_eigval", False),
        "norm_eps": feed_forward["norm_epsilon"],
    }
    return sizes | feed_forward | {"mixers": ("deltanet",) * depth, "mixer_options": {"deltanet": options}}


def write(config: ModelConfig) -> dict[str, Any]:
    options = config.mixer("deltanet")
    return fla.write_sizes(config) | {
        "num_heads": options.num_heads,
        "expand_k": options.key_factor,
        "expand_v": options.value_factor,
        "conv_size": options.conv_width,
        "use_gate": options.gate,
        "allow_neg_eigval": options.negative_eigenvalues,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    options = config.mixer("deltanet")
    heads, keys, values = options.head_sizes(config.d_model)
    yield from fla.swiglu_lines(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}.attn"
        yield from head_lines(prefix, config.d_model, (heads, keys, values), options, layer)
        yield Line(f"{prefix}.b_proj.weight", (heads, config.d_model), "mixer.beta", transposed, layer=layer)


def head_lines(prefix: str, width: int, sizes: tuple[int, int, int], options: Any, layer: int) -> Iterator[Line]:
    """From activations to heads and back; alike in DeltaNet and Gated DeltaNet. Their convolutions are three."""
    heads, keys, values = sizes
    start = 0
    for name, outputs in (("q", heads * keys), ("k", heads * keys), ("v", heads * values)):
        yield from columns(f"{prefix}.{name}_proj", "mixer.heads.proj", start, outputs, width, layer=layer)
        place = slice(start, start + outputs)
        yield Line(
            f"{prefix}.{name}_conv1d.weight",
            (outputs, 1, options.conv_width),
            "mixer.heads.conv.weight",
            lambda t: t[:, 0, ::-1].T,
            lambda p, place=place: p[:, place],
            layer,
        )
        start += outputs
    if options.gate:
        yield from linear(f"{prefix}.g_proj", "mixer.out.gate_proj", heads * values, width, layer=layer)
    yield Line(f"{prefix}.o_norm.weight", (values,), "mixer.out.norm.scale", layer=layer)
    yield from linear(f"{prefix}.o_proj", "mixer.out.proj", width, heads * values, layer=layer)


FAMILY = Family("delta_net", "DeltaNetForCausalLM", read, write, lines, ("deltanet",))

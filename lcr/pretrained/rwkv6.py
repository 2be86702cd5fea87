"""RWKV-6 (arXiv 2404.05892) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import fla
from lcr.pretrained.family import Family, linear
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line, transposed


def read(c: Fields) -> dict[str, Any]:
    sizes, depth = fla.read_sizes(c, hidden_size=2048, num_layers=24)
    feed_forward = fla.read_channel_mixing(c, sizes["d_model"], ratio=3.5, receptance=True)
    options = {
        "num_heads": c.whole("num_heads", 4),
        "key_factor": c.number("expand_k", 0.5),
        "value_factor": c.number("expand_v", 1.0),
        "mix_rank": c.whole("proj_low_rank_dim", 32),
        "decay_rank": c.whole("gate_low_rank_dim", 64),
        "norm_eps": feed_forward["norm_epsilon"],
    }
    return sizes | feed_forward | {"mixers": ("rwkv6",) * depth, "mixer_options": {"rwkv6": options}}


def write(config: ModelConfig) -> dict[str, Any]:
    options = config.mixer("rwkv6")
    return fla.write_sizes(config) | {
        "num_heads": options.num_heads,
        "expand_k": options.key_factor,
        "expand_v": options.value_factor,
        "proj_low_rank_dim": options.mix_rank,
        "gate_low_rank_dim": options.decay_rank,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    options, width = config.mixer("rwkv6"), config.d_model
    keys, values, rank, heads = (
        int(options.key_factor * width), int(options.value_factor * width), options.mix_rank, options.num_heads
    )  # fmt: skip
    yield from fla.norm_lines(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}.attn"
        yield Line(f"{prefix}.x_proj.0.mu", (width,), "mixer.shift_mix", layer=layer)
        down, up = _mix_down(rank, width), _mix_up(rank, width)
        yield Line(f"{prefix}.x_proj.0.linear.weight", (5 * rank, width), "mixer.mix_down", down, layer=layer)
        yield Line(f"{prefix}.x_proj.2.weight", (width, 5 * rank), "mixer.mix_up", up, layer=layer)
        yield Line(f"{prefix}.x_bias", (5, width), "mixer.mix", layer=layer)
        for theirs, ours, outputs in (("r", "r", keys), ("k", "k", keys), ("v", "v", values), ("g", "gate", values)):
            yield from linear(f"{prefix}.{theirs}_proj.linear", f"mixer.{ours}_proj", outputs, width, layer=layer)
        decay = f"{prefix}.w_proj.linear.lora"
        yield Line(f"{decay}.0.weight", (options.decay_rank, width), "mixer.decay_down", transposed, layer=layer)
        yield Line(f"{decay}.2.weight", (keys, options.decay_rank), "mixer.decay_up", transposed, layer=layer)
        yield Line(f"{decay}.2.bias", (keys,), "mixer.decay_bias", layer=layer)
        yield Line(f"{prefix}.bonus", (heads, keys // heads), "mixer.bonus", layer=layer)
        yield Line(f"{prefix}.g_norm.weight", (values,), "mixer.norm_scale", layer=layer)
        yield Line(f"{prefix}.g_norm.bias", (values,), "mixer.norm_bias", layer=layer)
        yield from linear(f"{prefix}.o_proj", "mixer.out_proj", width, values, layer=layer)
        feed_forward = f"model.layers.{layer}.ffn"
        for name, outputs, inputs in (("key", config.d_ff, width), ("receptance", width, width)):
            yield from linear(f"{feed_forward}.{name}.linear", f"mlp.{name}", outputs, inputs, layer=layer)
            yield Line(f"{feed_forward}.{name}.mu", (width,), f"mlp.{name}_mix", layer=layer)
        yield from linear(f"{feed_forward}.value", "mlp.value", width, config.d_ff, layer=layer)


def _mix_down(rank: int, width: int):
    """[5 ranks, inputs] as [inputs, 5, rank]."""
    return lambda t: t.reshape(5, rank, width).transpose(2, 0, 1)


def _mix_up(rank: int, width: int):
    """[outputs, 5 ranks] as [5, rank, outputs]."""
    return lambda t: t.reshape(width, 5, rank).transpose(1, 2, 0)


FAMILY = Family("rwkv6", "RWKV6ForCausalLM", read, write, lines, ("rwkv6",))

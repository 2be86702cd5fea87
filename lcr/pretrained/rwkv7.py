"""RWKV-7 (arXiv 2503.14456) in flash-linear-attention's format."""

from collections.abc import Iterator
from typing import Any

from lcr.mixers.rwkv7 import SHIFTED
from lcr.models.config import ModelConfig
from lcr.pretrained import fla
from lcr.pretrained.family import Family, linear
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line, transposed

RANKS = {
    "decay": "decay_low_rank_dim",
    "gate": "gate_low_rank_dim",
    "rate": "a_low_rank_dim",
    "value": "v_low_rank_dim",
}
DEFAULTS = {"decay": 64, "gate": 128, "rate": 64, "value": 16}
NETS = {"decay": "w", "gate": "g", "rate": "a", "value": "v"}


def read(c: Fields) -> dict[str, Any]:
    sizes, depth = fla.read_sizes(c, hidden_size=2048, num_layers=24)
    width = sizes["d_model"]
    feed_forward = fla.read_channel_mixing(c, width, ratio=4.0, receptance=False)
    heads = c.whole("num_heads", None)  # of no account where there is a head_dim
    head_dim = width // (heads or 1) if c.null("head_dim") else c.whole("head_dim", 64)
    if head_dim < 1 or width % head_dim:
        c.refuse("head_dim", f"a divisor of hidden_size={width}")
    c.only("value_dim", None, width, [width] * depth)
    ranks = {
        f"{name}_rank": _rank(name, width, head_dim) if c.null(field) else c.whole(field, DEFAULTS[name])
        for name, field in RANKS.items()
    }
    options = ranks | {"num_heads": width // head_dim, "norm_eps": head_dim * feed_forward["norm_epsilon"]}
    return sizes | feed_forward | {"mixers": ("rwkv7",) * depth, "mixer_options": {"rwkv7": options}}


def _rank(name: str, width: int, head_dim: int) -> int:
    """What a rank of null stands for."""
    multiple = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}[name] * (1 if name == "gate" else head_dim / 64)
    return max(32, round(multiple * width**0.5 / 32) * 32)


def write(config: ModelConfig) -> dict[str, Any]:
    options = config.mixer("rwkv7")
    ranks = {field: getattr(options, f"{name}_rank") for name, field in RANKS.items()}
    head_dim = config.d_model // options.num_heads
    value_dim = [config.d_model] * len(config.mixers)
    sizes = {"num_heads": options.num_heads, "head_dim": head_dim, "value_dim": value_dim}
    return fla.write_sizes(config) | ranks | sizes


def lines(config: ModelConfig) -> Iterator[Line]:
    options, width = config.mixer("rwkv7"), config.d_model
    heads = options.num_heads
    yield from fla.norm_lines(config)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}.attn"
        for i, name in enumerate(SHIFTED):
            row = _row(i)
            yield Line(f"{prefix}.x_{name}", (1, 1, width), "mixer.mix", lambda t: t[0, 0], row, layer)
        for name in ("r", "k", "v"):
            yield from linear(f"{prefix}.{name}_proj", f"mixer.{name}_proj", width, width, layer=layer)
        yield from linear(f"{prefix}.o_proj", "mixer.out_proj", width, width, layer=layer)
        for name, theirs in NETS.items():
            yield from _net(f"{prefix}.{theirs}_lora.lora", name, getattr(options, f"{name}_rank"), width, layer)
        for name in ("k_k", "k_a"):
            yield Line(f"{prefix}.{name}", (width,), f"mixer.{name}", layer=layer)
        shape = heads, width // heads
        yield Line(f"{prefix}.r_k", shape, "mixer.r_k", ours=lambda p: p.reshape(shape), layer=layer)
        yield Line(f"{prefix}.g_norm.weight", (width,), "mixer.scale", layer=layer)
        yield Line(f"{prefix}.g_norm.bias", (width,), "mixer.bias", layer=layer)
        feed_forward = f"model.layers.{layer}.ffn"
        yield Line(f"{feed_forward}.x_k", (width,), "mlp.key_mix", layer=layer)
        yield from linear(f"{feed_forward}.key", "mlp.key", config.d_ff, width, layer=layer)
        yield from linear(f"{feed_forward}.value", "mlp.value", width, config.d_ff, layer=layer)


def _net(prefix: str, name: str, rank: int, width: int, layer: int) -> Iterator[Line]:
    """A low-rank net. The first layer has none for the value residual, which changes nothing there."""
    absent = name == "value" and layer == 0
    parameter = f"mixer.{name}"
    weight = None if absent else f"{prefix}.0.weight"
    yield Line(weight, (rank, width), f"{parameter}.down", transposed, layer=layer)
    weight, bias = (None, None) if absent else (f"{prefix}.2.weight", f"{prefix}.2.bias")
    yield Line(weight, (width, rank), f"{parameter}.up", transposed, layer=layer)
    if name != "gate":
        yield Line(bias, (width,), f"{parameter}.bias", layer=layer)


def _row(i: int):
    return lambda p: p[i]


FAMILY = Family("rwkv7", "RWKV7ForCausalLM", read, write, lines, ("rwkv7",))

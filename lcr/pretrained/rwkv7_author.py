"""RWKV-7 (arXiv 2503.14456) in its author's format: one .pth file, whose tensors' shapes are its configuration."""

from collections.abc import Iterator, Mapping
from typing import Any

from lcr.mixers.rwkv7 import SHIFTED
from lcr.models.config import ModelConfig
from lcr.pretrained.family import linear, scale
from lcr.pretrained.tensors import Line

NETS = {"decay": "w", "rate": "a", "value": "v", "gate": "g"}
# the first layer may have a net for the value residual, which changes nothing there
IGNORED = r"^blocks\.0\.att\.v[012]$"


def read(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of a `ModelConfig`. Raises: ValueError for tensors that are not those of RWKV-7."""
    if missing := [
        name
        for name in ("emb.weight", "blocks.0.att.r_k", "blocks.0.att.w1", "blocks.0.ffn.key.weight")
        if name not in shapes
    ]:
        raise ValueError(f'no tensor {", ".join(missing)}: expected an RWKV-7 in its author\'s format ("x070")')
    vocabulary, width = shapes["emb.weight"]
    depth = sum(name.endswith(".att.r_k") for name in shapes)
    of_values = f"blocks.{min(1, depth - 1)}.att.v1"
    ranks = {f"{name}_rank": shapes.get(f"blocks.0.att.{theirs}1", (0, 32))[1] for name, theirs in NETS.items()}
    ranks["value_rank"] = shapes.get(of_values, (0, 32))[1]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_ff": shapes["blocks.0.ffn.key.weight"][0],
        "mixers": ("rwkv7",) * depth,
        "mixer_options": {"rwkv7": {"num_heads": shapes["blocks.0.att.r_k"][0], "norm_eps": 64e-5, **ranks}},
        "feed_forward": "channel_mixing",
        "feed_forward_options": {"channel_mixing": {"receptance": False}},
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "embedding_norm": True,
        "tie_embeddings": False,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    options, width = config.mixer("rwkv7"), config.d_model
    shape = options.num_heads, width // options.num_heads
    yield Line("emb.weight", (config.vocab_size, width), "embedding")
    yield Line("head.weight", (config.vocab_size, width), "head")
    yield from scale("blocks.0.ln0", "embedding_norm", width, bias=True)
    yield from scale("ln_out", "final_norm", width, bias=True)
    for layer in range(len(config.mixers)):
        prefix = f"blocks.{layer}"
        yield from scale(f"{prefix}.ln1", "mixer_norm", width, bias=True, layer=layer)
        yield from scale(f"{prefix}.ln2", "mlp_norm", width, bias=True, layer=layer)
        for i, name in enumerate(SHIFTED):
            yield Line(f"{prefix}.att.x_{name}", (1, 1, width), "mixer.mix", _vector, _row(i), layer)
        for theirs, ours in (("receptance", "r"), ("key", "k"), ("value", "v"), ("output", "out")):
            yield from linear(f"{prefix}.att.{theirs}", f"mixer.{ours}_proj", width, width, layer=layer)
        for name, theirs in NETS.items():
            rank = getattr(options, f"{name}_rank")
            yield from _net(f"{prefix}.att.{theirs}", name, rank, width, layer)
        for name in ("k_k", "k_a"):
            yield Line(f"{prefix}.att.{name}", (1, 1, width), f"mixer.{name}", _vector, layer=layer)
        yield Line(f"{prefix}.att.r_k", shape, "mixer.r_k", ours=lambda p: p.reshape(shape), layer=layer)
        yield Line(f"{prefix}.att.ln_x.weight", (width,), "mixer.scale", layer=layer)
        yield Line(f"{prefix}.att.ln_x.bias", (width,), "mixer.bias", layer=layer)
        yield Line(f"{prefix}.ffn.x_k", (1, 1, width), "mlp.key_mix", _vector, layer=layer)
        yield from linear(f"{prefix}.ffn.key", "mlp.key", config.d_ff, width, layer=layer)
        yield from linear(f"{prefix}.ffn.value", "mlp.value", width, config.d_ff, layer=layer)


def _net(prefix: str, name: str, rank: int, width: int, layer: int) -> Iterator[Line]:
    absent = name == "value" and layer == 0
    down, up, bias = (None if absent else f"{prefix}{i}" for i in (1, 2, 0))
    yield Line(down, (width, rank), f"mixer.{name}.down", layer=layer)
    yield Line(up, (rank, width), f"mixer.{name}.up", layer=layer)
    if name != "gate":
        yield Line(bias, (1, 1, width), f"mixer.{name}.bias", _vector, layer=layer)


def _vector(t):
    return t[0, 0]


def _row(i: int):
    return lambda p: p[i]

"""What the families of flash-linear-attention's format have in common."""

from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import ends, gated, linear, scale
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line

# where the norm of the heads and the gate are not one kernel (without a gate there is one name alone, the first)
UNFUSED = ((r"\.attn\.g_norm\.weight$", ".attn.g_norm_swish_gate.weight"),)
KERNELS = (  # which kernels compute it, and how the loss is computed
    "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp",
)  # fmt: skip


def read_sizes(c: Fields, *, hidden_size: int, num_layers: int) -> tuple[dict[str, Any], int]:
    """`vocab_size`, `d_model` and `tie_embeddings`; and the depth. The arguments are the family's defaults."""
    c.only("attn", None)  # layers of attention among the others
    c.only("attnres_block_size", None)
    for name in KERNELS:
        c.get(name, None)
    return {
        "vocab_size": c.whole("vocab_size", 32_000),
        "d_model": c.whole("hidden_size", hidden_size),
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }, c.count("num_hidden_layers", num_layers)


def read_swiglu(c: Fields, width: int, *, ratio: int) -> dict[str, Any]:
    """The feed-forward, and the norms, of all but the RWKVs. ratio: the family's default."""
    ratio = 4 if c.null("hidden_ratio") else c.number("hidden_ratio", ratio)
    c.only("hidden_act", "swish")
    return {
        "d_ff": c.whole("intermediate_size", -(-int(width * ratio * 2 / 3) // 256) * 256),
        "feed_forward_options": {"swiglu": {"activation": "silu"}},
        "norm_epsilon": c.number("norm_eps", 1e-6),
    }


def read_channel_mixing(c: Fields, width: int, *, ratio: float, receptance: bool) -> dict[str, Any]:
    """The feed-forward, and the norms, of the RWKVs. ratio: the family's default."""
    ratio = c.number("hidden_ratio", ratio)
    c.only("hidden_act", "sqrelu")
    return {
        "d_ff": c.whole("intermediate_size", -(-int(width * ratio) // 32) * 32),
        "feed_forward": "channel_mixing",
        "feed_forward_options": {"channel_mixing": {"receptance": receptance}},
        "norm": "layer" if c.flag("norm_bias", True) else "layer_without_bias",
        "norm_epsilon": c.number("norm_eps", 1e-5),
        "embedding_norm": c.flag("norm_first", True),
    }


def write_sizes(config: ModelConfig) -> dict[str, Any]:
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": len(config.mixers),
        "norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.feed_forward == "channel_mixing":
        return fields | {
            "hidden_act": "sqrelu",
            "norm_bias": config.norm == "layer",
            "norm_first": config.embedding_norm,
        }
    return fields | {"hidden_act": "swish"}


def swiglu_lines(config: ModelConfig) -> Iterator[Line]:
    """All but the mixers, of all but the RWKVs."""
    yield from ends(config, embedding="model.embeddings")
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}"
        yield from scale(f"{prefix}.attn_norm", "mixer_norm", config.d_model, layer=layer)
        yield from scale(f"{prefix}.mlp_norm", "mlp_norm", config.d_model, layer=layer)
        yield from gated(f"{prefix}.mlp", config, layer)


def gated_norm_lines(prefix: str, config: ModelConfig, options: Any, values: int, layer: int) -> Iterator[Line]:
    """The norm of the heads and the gate of RetNet and GLA; either may be missing."""
    if options.gate:
        yield from linear(f"{prefix}.g_proj", "mixer.gate_proj", values, config.d_model, layer=layer)
    if options.norm_scale:
        name = "g_norm_swish_gate" if options.gate else "g_norm"
        yield from scale(f"{prefix}.{name}", "mixer.norm", values // options.num_heads, layer=layer)


def norm_lines(config: ModelConfig) -> Iterator[Line]:
    """All but the mixers and the channel mixing, of the RWKVs."""
    bias = config.norm == "layer"
    yield from ends(config, embedding="model.embeddings", bias=bias)
    if config.embedding_norm:
        yield from scale("model.layers.0.pre_norm", "embedding_norm", config.d_model, bias=bias)
    for layer in range(len(config.mixers)):
        prefix = f"model.layers.{layer}"
        yield from scale(f"{prefix}.attn_norm", "mixer_norm", config.d_model, bias=bias, layer=layer)
        yield from scale(f"{prefix}.ffn_norm", "mlp_norm", config.d_model, bias=bias, layer=layer)

"""What a family of checkpoints is, and what families share."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line, transposed

ACTIVATIONS = {  # Hugging Face's names and ours; the first of each of ours is what is written
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "linear",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "mish": "mish",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of Hugging Face.

    read: the fields of a `ModelConfig`, all but its dtype, of a config.json. write: the other way; it may leave out
        what it does not know, since what it gives is read again and compared. lines: the table of names.
    mixers: which the family has. ignored: pattern of tensors that checkpoints may hold beside those of the table, and
        that say nothing. renamed: (pattern, replacement) of names that tensors have in some checkpoints, where
        the table does not have them.
    head: the name of the output's tensor, which a checkpoint may hold although it is the embedding.
    extra_layers: whether layers after those of config.json are passed over.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    lines: Callable[[ModelConfig], Iterable[Line]]
    mixers: tuple[str, ...] = ("attention",)
    ignored: str = r"rotary_emb\.inv_freq$"
    renamed: tuple[tuple[str, str], ...] = ()
    head: str = "lm_head.weight"
    extra_layers: bool = False


def activation_name(ours: str) -> str:
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def linear(
    name: str, parameter: str, outputs: int, inputs: int, *, bias: bool = False, layer: int | None = None
) -> Iterator[Line]:
    """A linear layer: their weight is [outputs, inputs], our kernel [inputs, outputs]."""
    yield Line(f"{name}.weight", (outputs, inputs), f"{parameter}.kernel", transposed, layer=layer)
    if bias:
        yield Line(f"{name}.bias", (outputs,), f"{parameter}.bias", layer=layer)


def columns(
    name: str, parameter: str, start: int, outputs: int, inputs: int, *, bias: bool = False, layer: int
) -> Iterator[Line]:
    """A linear layer that is the columns [start, start + outputs) of ours."""
    place = slice(start, start + outputs)
    yield Line(
        f"{name}.weight", (outputs, inputs), f"{parameter}.kernel", transposed, lambda p: p[:, place], layer=layer
    )
    if bias:
        yield Line(f"{name}.bias", (outputs,), f"{parameter}.bias", ours=lambda p: p[place], layer=layer)


def rows(name: str, total: int, parameter: str, start: int, outputs: int, inputs: int, *, layer: int) -> Iterator[Line]:
    """A linear layer of ours that is the rows [start, start + outputs) of their weight [total, inputs]."""
    place = slice(start, start + outputs)
    yield Line(f"{name}.weight", (total, inputs), f"{parameter}.kernel", lambda t: t[place].T, layer=layer)


def scale(name: str, parameter: str, width: int, *, bias: bool = False, layer: int | None = None) -> Iterator[Line]:
    """A norm's scale, and its bias."""
    yield Line(f"{name}.weight", (width,), f"{parameter}.scale", layer=layer)
    if bias:
        yield Line(f"{name}.bias", (width,), f"{parameter}.bias", layer=layer)


def ends(
    config: ModelConfig,
    *,
    embedding: str = "model.embed_tokens",
    norm: str = "model.norm",
    head: str = "lm_head",
    bias: bool = False,
) -> Iterator[Line]:
    """What stands before and after the layers: embedding, last norm, and the head where it is not the embedding."""
    shape = config.vocab_size, config.d_model
    yield Line(f"{embedding}.weight", shape, "embedding")
    yield from scale(norm, "final_norm", config.d_model, bias=bias)
    if not config.tie_embeddings:
        yield Line(f"{head}.weight", shape, "head")


def attention(prefix: str, config: ModelConfig, layer: int) -> Iterator[Line]:
    """Attention with a projection each for queries, keys and values."""
    options, width = config.mixer(config.mixers[layer]), config.d_model
    heads, kv_heads, head_dim = options.head_sizes(width)
    for name, parameter, count in (("q", "query", heads), ("k", "key", kv_heads), ("v", "value", kv_heads)):
        yield from linear(
            f"{prefix}.{name}_proj",
            f"mixer.{parameter}",
            count * head_dim,
            width,
            bias=options.qkv_bias,
            layer=layer,
        )
    yield from linear(f"{prefix}.o_proj", "mixer.out", width, heads * head_dim, bias=options.out_bias, layer=layer)
    if options.qk_norm:
        yield from scale(f"{prefix}.q_norm", "mixer.query_norm", head_dim, layer=layer)
        yield from scale(f"{prefix}.k_norm", "mixer.key_norm", head_dim, layer=layer)


def gated(
    prefix: str,
    config: ModelConfig,
    layer: int,
    *,
    parameter: str = "mlp",
    d_ff: int | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Line]:
    """A gated feed-forward with a projection each for the gate and what it gates."""
    width, inner = config.d_model, d_ff or config.ff_width
    kind, option = ("swiglu", "use_bias") if parameter == "mlp" else ("moe", "shared_bias")
    bias = config.feed_forward_options.get(kind, {}).get(option, False)
    gate, up, down = (f"{prefix}.{name}" for name in names)
    yield from columns(gate, f"{parameter}.gate_up", 0, inner, width, bias=bias, layer=layer)
    yield from columns(up, f"{parameter}.gate_up", inner, inner, width, bias=bias, layer=layer)
    yield from linear(down, f"{parameter}.down", width, inner, bias=bias, layer=layer)


def experts(name: Callable[[int, int], str], config: ModelConfig, layer: int) -> Iterator[Line]:
    """The experts of a mixture; name(expert, i) is the weight's for the gate (0), what it gates (1), the output (2)."""
    options, width = config.feed_forward_options["moe"], config.d_model
    inner = options["d_expert"]
    for e in range(options["num_experts"]):
        for i, ours in enumerate((lambda p, e=e: p[e, :, :inner], lambda p, e=e: p[e, :, inner:])):
            yield Line(name(e, i), (inner, width), "mlp.gate_up", transposed, ours, layer)
        yield Line(name(e, 2), (width, inner), "mlp.down", transposed, lambda p, e=e: p[e], layer)


def balance_options(coefficient: float) -> dict[str, Any]:
    """How a mixture is balanced, by the coefficient of its auxiliary loss."""
    return {"balance": "loss", "balance_weight": coefficient} if coefficient else {"balance": "none"}


def write_balance(mixture: Mapping[str, Any]) -> float:
    """The coefficient of the auxiliary loss."""
    return mixture["balance_weight"] if mixture.get("balance") == "loss" else 0.0


def transformer_fields(
    c: Fields, *, vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int
) -> dict:
    """Sizes that every transformer's configuration has; the arguments are the family's defaults."""
    return {
        "vocab_size": c.whole("vocab_size", vocab_size),
        "d_model": c.whole("hidden_size", hidden_size),
        "d_ff": c.whole("intermediate_size", intermediate_size),
        "mixers": ("attention",) * c.count("num_hidden_layers", num_layers),
    }


def head_fields(
    c: Fields, d_model: int, *, num_heads: int, num_kv_heads: int | None, head_dim: int | None = None
) -> dict:
    """H, G and K; the arguments are the family's defaults, None for H and d_model / H."""
    heads = c.whole("num_attention_heads", num_heads)
    width = c.whole("head_dim", head_dim)
    if width is None and heads > d_model:
        c.refuse("num_attention_heads", f"at most hidden_size={d_model}")
    kv_heads = heads if "num_key_value_heads" in c.fields and c.get("num_key_value_heads", None) is None else None
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads or c.whole("num_key_value_heads", num_kv_heads) or heads,
        "head_dim": width or d_model // heads,
    }


def layer_kinds(c: Fields, count: int, default: list[str], kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`mixers` and `mixer_options` of attention that differs by layer.

    kinds: the options of "full_attention" and "sliding_attention", of which `layer_types`, or else `default`, gives
    each layer one. One kind alone has no name of its own.
    """
    names = {kind: f"attention:{kind.removesuffix('_attention')}" for kind in kinds}
    layers = c.names("layer_types", names, default)
    if len(layers) != count:
        c.refuse("layer_types", f"one for each of the {count} layers")
    if len(set(layers)) == 1:
        kind = next(kind for kind, name in names.items() if name == layers[0])
        return {"mixers": ("attention",) * count, "mixer_options": {"attention": kinds[kind]}}
    return {"mixers": layers, "mixer_options": {names[kind]: options for kind, options in kinds.items()}}


def write_kinds(config: ModelConfig) -> list[str]:
    """`layer_types` of the layers."""
    sliding = ["full_attention", "sliding_attention"]
    return [sliding[config.mixer(name).window is not None] for name in config.mixers]


def optional_float(value: float | None) -> float | None:
    """transformers tells 3 from 3.0 where a field is declared as a float."""
    return None if value is None else float(value)


def write_transformer(config: ModelConfig, name: str, *, divides: bool = False) -> dict[str, Any]:
    """The fields of `transformer_fields` and `head_fields`; name: of a mixer of the model.

    divides: whether transformers refuses heads that do not divide the width.
    """
    heads, kv_heads, head_dim = config.mixer(name).head_sizes(config.d_model)
    if divides and config.d_model % heads:
        raise ValueError(f"{heads} heads do not divide the width {config.d_model}, which transformers asks for there")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": len(config.mixers),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_epsilon,
    }

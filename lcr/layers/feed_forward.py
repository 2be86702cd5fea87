"""The feed-forwards that a decoder's layers choose from, by name."""

import dataclasses
from typing import Any

from flax import nnx

from lcr.checks import check_choice, check_flags, unknown_name
from lcr.layers.channel_mixing import ChannelMixing, ChannelMixingConfig
from lcr.layers.mlp import ACTIVATIONS, SwiGLU, default_d_ff
from lcr.layers.moe import MoE, MoEConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLUConfig:
    """Options of `SwiGLU`: activation, a name of `lcr.layers.mlp.ACTIVATIONS`; use_bias."""

    activation: str = "silu"
    use_bias: bool = False

    def __post_init__(self):
        check_choice("activation", self.activation, ACTIVATIONS)
        check_flags(use_bias=self.use_bias)


FEED_FORWARDS: dict[str, Any] = {
    "swiglu": SwiGLUConfig,
    "moe": MoEConfig,
    "channel_mixing": ChannelMixingConfig,
    "none": None,
}


def feed_forward_config(name: str, **options: Any) -> Any:
    """The configuration of the feed-forward `name`; None for "none".

    Raises: ValueError for an unknown option (naming the nearest known one) and for a bad value.
    """
    config = FEED_FORWARDS[name]
    # the compute dtype is the model's
    known = [] if config is None else [field.name for field in dataclasses.fields(config) if field.name != "dtype"]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of feed-forward {name!r}:", option, known))
    return None if config is None else config(**options)


def make_feed_forward(
    config: Any, d_model: int, d_ff: int | None, *, dtype: Any, rngs: nnx.Rngs
) -> nnx.Module | None:
    """The module of a configuration; None for None. d_ff: the model's; None: what the feed-forward has by default."""
    width = d_ff or default_d_ff(d_model)
    match config:
        case ChannelMixingConfig():
            sized = dataclasses.replace(config, d_ff=config.d_ff or d_ff, dtype=dtype)
            return ChannelMixing(sized, d_model, rngs=rngs)
        case None:
            return None
        case MoEConfig():
            return MoE(config, d_model, width, dtype=dtype, rngs=rngs)
        case SwiGLUConfig():
            options = {"activation": config.activation, "use_bias": config.use_bias}
            return SwiGLU(d_model, width, **options, dtype=dtype, rngs=rngs)
    raise TypeError(f"config: {type(config).__name__} is no configuration of a feed-forward")

"""A model's configuration with nothing left to defaults, so that it can be compared and exported."""

import dataclasses
from typing import Any

from lcr.layers.feed_forward import feed_forward_config
from lcr.layers.heads import default_num_heads
from lcr.mixers.attention import AttentionConfig
from lcr.models.config import ModelConfig

# Options that say how it is computed, or how parameters start; a checkpoint knows neither.
PASSING = (
    "dtype", "implementation", "dt_min", "dt_max", "dt_floor", "dt_scale", "decay_scale", "decay_range", "decay_max",
    "gate_init", "bias_rate", "z_weight",
)  # fmt: skip


def written_out(config: ModelConfig) -> ModelConfig:
    """The same model: every size filled in, and mha, mqa, gqa and attention all called "attention", where they differ
    by layer "attention:full" and "attention:sliding" (with a window).

    Raises: ValueError where attention differs by layer in more than the window.
    """
    filled = {name: _mixer(config, name) for name in dict.fromkeys(config.mixers)}
    kinds: dict[str, dict[str, Any]] = {}
    names = {}
    for name, (base, options) in filled.items():
        attention = [other for kind, other in filled.values() if kind == "attention"]
        if base == "attention" and any(other != options for other in attention):
            base += ":full" if options["window"] is None else ":sliding"
        if kinds.setdefault(base, options) != options:
            raise ValueError(f"layers {name!r}: expected all {base!r} alike, as checkpoints have them")
        names[name] = base
    feed_forwards = {name: _feed_forward(config, name) for name in {name for _, name in config.layers} - {"none"}}
    width = feed_forwards.get("channel_mixing", {}).get("d_ff", config.ff_width)
    if {name for _, name in config.layers} == {"moe"}:  # the width of no other feed-forward
        width = feed_forwards["moe"]["d_expert"]
    return dataclasses.replace(
        config,
        mixers=tuple(names[name] for name in config.mixers),
        mixer_options=kinds,
        d_ff=width,
        final_norm_epsilon=config.norm_epsilon if config.final_norm_epsilon is None else config.final_norm_epsilon,
        feed_forward=_one([name for _, name in config.layers]),
        feed_forward_options=feed_forwards,
    )


def _mixer(config: ModelConfig, name: str) -> tuple[str, dict[str, Any]]:
    """The mixer's name, and all its options that a checkpoint knows, with every size filled in."""
    mixer, width, base = config.mixer(name), config.d_model, name.partition(":")[0]
    if hasattr(mixer, "sized"):
        mixer = mixer.sized(width)
    options = {
        field.name: getattr(mixer, field.name) for field in dataclasses.fields(mixer) if field.name not in PASSING
    }
    if isinstance(mixer, AttentionConfig):
        base = "attention"
        options |= dict(zip(("num_heads", "num_kv_heads", "head_dim"), mixer.head_sizes(width), strict=True))
    elif base == "gated_deltanet":
        options |= dict(zip(("num_heads", "head_dim"), mixer.head_sizes(width), strict=False))
    elif "num_heads" in options and options["num_heads"] is None:
        options["num_heads"] = default_num_heads(width)
    if hasattr(mixer, "ranks"):
        options |= mixer.ranks(width)
    if base == "mamba":
        options["dt_rank"] = mixer.dt_rank or -(-width // 16)
    if base == "mamba2":
        options["head_width"] = mixer.width_of_heads(width)
    if base == "rwkv4":
        options["attention_width"] = mixer.attention_width or width
    return base, options


def _feed_forward(config: ModelConfig, name: str) -> dict[str, Any]:
    options = dataclasses.asdict(feed_forward_config(name, **config.feed_forward_options.get(name, {})))
    if name == "moe":
        options["d_expert"] = options["d_expert"] or max(1, config.ff_width // options["top_k"])
        if options["balance"] != "loss":
            options["balance_weight"] = 0.01  # of no account
    if name == "channel_mixing":
        options["d_ff"] = options["d_ff"] or config.d_ff or 4 * config.d_model
    return {option: value for option, value in options.items() if option not in PASSING}


def _one(names: list[str]) -> str | tuple[str, ...]:
    return names[0] if len(set(names)) == 1 else tuple(names)

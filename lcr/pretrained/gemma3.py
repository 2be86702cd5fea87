"""Gemma 3's language models (arXiv 2503.19786): Gemma 2 with norms of queries and keys, and two bases of RoPE."""

from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import gemma2
from lcr.pretrained.family import Family
from lcr.pretrained.fields import Fields
from lcr.pretrained.rope import rope_options, write_rope


def read(c: Fields) -> dict[str, Any]:
    sizes, options = gemma2.read_sizes(c, vocab_size=262_208, attention_cap=None)
    options["soft_cap"] = None  # transformers passes over what stands there
    options |= {"qk_norm": "offset", "norm_epsilon": c.number("rms_norm_eps", 1e-6)}
    given, scaling = c.mapping("rope_parameters"), c.mapping("rope_scaling")
    bases = {
        "full": c.number("rope_theta", 1_000_000.0),
        "sliding": c.number("rope_local_base_freq", 10_000.0),
    }
    full, sliding = (
        options | rope_options(c, parameters, options["head_dim"], base=bases[kind], longest=131_072)
        for kind, parameters in (
            ("full", (given.get("full_attention") or {}) | scaling),
            ("sliding", given.get("sliding_attention") or {}),
        )
    )
    older = c.whole("_sliding_window_pattern", 6)
    period = c.whole("sliding_window_pattern", older)
    return sizes | gemma2.read_layers(c, sizes, full, sliding, period=period, logit_cap=None)


def write(config: ModelConfig) -> dict[str, Any]:
    fields = gemma2.write(config)
    for name in config.mixers:
        options = config.mixer(name)
        if options.window is None:
            fields |= write_rope(options)
        else:
            fields["rope_local_base_freq"] = options.rope_base
            if options.rope_scaling is not None:  # which no older field has room for
                fields["rope_parameters"] = {"sliding_attention": _parameters(options)}
    if "rope_parameters" in fields:
        full = next((config.mixer(name) for name in config.mixers if config.mixer(name).window is None), None)
        if full is not None:
            fields["rope_parameters"]["full_attention"] = _parameters(full)
    return fields


def _parameters(options: Any) -> dict[str, Any]:
    written = write_rope(options)
    return {"rope_theta": written["rope_theta"], **(written["rope_scaling"] or {"rope_type": "default"})}


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", read, write, gemma2.lines)

"""RWKV-4 (arXiv 2305.13048).

With `rescale_every` = n > 0 transformers divides the residual stream by 2 after every n layers, in evaluation and not
in training, and the layers' output weights with it: against overflow in float16. Of what is computed it changes only
what the norms' epsilon is held against, LN(x / 2^k, eps) = LN(x, 4^k eps). Here it is computed as in training, always
(with 32 layers of random weights the logits differ by 2e-3).
"""

import logging
from collections.abc import Iterator
from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained.family import Family, ends, linear, scale
from lcr.pretrained.fields import Fields
from lcr.pretrained.tensors import Line


logger = logging.getLogger("lcr.pretrained")


def read(c: Fields) -> dict[str, Any]:
    width = c.whole("hidden_size", 4096)
    c.get("context_length", None)  # of the authors' kernel
    if (every := c.whole("rescale_every", 6, least=0)) and c.tensors is not None:  # read to be loaded
        logger.info(
            "%s: rescale_every=%d is left out, as transformers does in training: in evaluation it halves the residual "
            "every %d layers against overflow in float16, which changes the norms' epsilon alone",
            c.where, every, every,
        )  # fmt: skip
    return {
        "vocab_size": c.whole("vocab_size", 50_277),
        "d_model": width,
        "d_ff": c.whole("intermediate_size", 4 * width),
        "mixers": ("rwkv4",) * c.count("num_hidden_layers", 32),
        "mixer_options": {"rwkv4": {"attention_width": c.whole("attention_hidden_size", width)}},
        "feed_forward": "channel_mixing",
        "feed_forward_options": {"channel_mixing": {"mix_of": "current"}},
        "norm": "layer",
        "norm_epsilon": c.number("layer_norm_epsilon", 1e-5),
        "final_norm_epsilon": 1e-5,  # in transformers, whatever that of the others is
        "embedding_norm": True,
        "tie_embeddings": c.flag("tie_word_embeddings", False),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "attention_hidden_size": config.mixer("rwkv4").attention_width or config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": len(config.mixers),
        "layer_norm_epsilon": config.norm_epsilon,
        "rescale_every": 0,
        "tie_word_embeddings": config.tie_embeddings,
    }


def lines(config: ModelConfig) -> Iterator[Line]:
    width, inner = config.d_model, config.mixer("rwkv4").attention_width
    yield from ends(config, embedding="rwkv.embeddings", norm="rwkv.ln_out", head="head", bias=True)
    yield from scale("rwkv.blocks.0.pre_ln", "embedding_norm", width, bias=True)
    for layer in range(len(config.mixers)):
        prefix = f"rwkv.blocks.{layer}"
        yield from scale(f"{prefix}.ln1", "mixer_norm", width, bias=True, layer=layer)
        yield from scale(f"{prefix}.ln2", "mlp_norm", width, bias=True, layer=layer)
        for name, ours in (("receptance", "r"), ("key", "k"), ("value", "v")):
            yield from _mix(f"{prefix}.attention.time_mix_{name}", f"mixer.time_mix_{ours}", width, layer)
            yield from linear(f"{prefix}.attention.{name}", f"mixer.{ours}_proj", inner, width, layer=layer)
        yield Line(f"{prefix}.attention.time_decay", (inner,), "mixer.time_decay", layer=layer)
        yield Line(f"{prefix}.attention.time_first", (inner,), "mixer.bonus", layer=layer)
        yield from linear(f"{prefix}.attention.output", "mixer.out_proj", width, inner, layer=layer)
        for name, outputs, inputs in (
            ("key", config.d_ff, width),
            ("value", width, config.d_ff),
            ("receptance", width, width),
        ):
            yield from linear(f"{prefix}.feed_forward.{name}", f"mlp.{name}", outputs, inputs, layer=layer)
        for name in ("key", "receptance"):
            yield from _mix(f"{prefix}.feed_forward.time_mix_{name}", f"mlp.{name}_mix", width, layer)


def _mix(name: str, parameter: str, width: int, layer: int) -> Iterator[Line]:
    yield Line(name, (1, 1, width), parameter, lambda t: t[0, 0], layer=layer)


FAMILY = Family("rwkv", "RwkvForCausalLM", read, write, lines, ("rwkv4",), head="head.weight")

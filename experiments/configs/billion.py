"""Language models of 1.2 to 1.6 billion parameters, of the sizes that their papers have at this scale.

    python -m experiments.train --config=experiments/configs/billion.py:mamba --workdir=runs/mamba_1b
    python -m experiments.compile_training --target=v5p:2x2x2,h200

The second command compiles the training step of every variant for devices that are not there, and counts its parameters
and bytes; nothing of these sizes has been trained yet: neither a cost nor a loss to expect is known. The corpus is a
stand-in, and read byte by byte: the vocabulary is that of the papers.

Variants, widths of 2,048 throughout:

    mha             24 layers, 16 heads of 128 ("Transformer++" of arXiv 2312.00752 and 2312.06635)
    retnet          24 layers, 8 heads of 256 and 512 (arXiv 2307.08621, table 2)
    mamba           48 layers, 16 states (arXiv 2312.00752, section E.2)
    mamba2          48 layers, 64 heads of 64, 128 states (arXiv 2405.21060, section D.3)
    gla             24 layers, 4 heads of 256 and 512 (arXiv 2312.06635, section 5)
    rwkv6           24 layers, 32 heads of 64 (arXiv 2404.05892, the "World" model of 1.6B)
    rwkv7           24 layers, 32 heads of 64 (arXiv 2503.14456, that of 1.5B)
    deltanet        24 layers, 16 heads of 128 (arXiv 2406.06484, section 4)
    gated_deltanet  21 layers, 6 heads of 256 and 512 (arXiv 2412.06464, as flash-linear-attention has it)
"""

from typing import Any

from ml_collections import ConfigDict

from lcr.checks import unknown_name
from lcr.training.config import default_config

SWIGLU = {"d_ff": 5632, "vocab_size": 32_000, "tie_embeddings": False}
GPT_NEOX = {"vocab_size": 50_304, "tie_embeddings": True}
RWKV = {"vocab_size": 65_536, "tie_embeddings": False, "norm": "layer", "embedding_norm": True}

# name: (layers, options of the mixer, the model's other fields)
MODELS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "mha": (24, {"num_heads": 16}, SWIGLU),
    "retnet": (24, {"num_heads": 8}, GPT_NEOX | {"d_ff": 2816}),
    "mamba": (48, {}, GPT_NEOX | {"d_ff": 0}),
    "mamba2": (48, {"state_size": 128}, GPT_NEOX | {"d_ff": 0}),
    "gla": (24, {"num_heads": 4}, SWIGLU),
    "rwkv6": (24, {"num_heads": 32}, RWKV | {"d_ff": 7168, "feed_forward": "channel_mixing"}),
    "rwkv7": (24, {"num_heads": 32}, RWKV | {
        "d_ff": 8192, "feed_forward": "channel_mixing", "feed_forward_options": {"channel_mixing": {"receptance": False}},
    }),
    "deltanet": (24, {"num_heads": 16}, SWIGLU),
    "gated_deltanet": (21, {"num_heads": 6, "head_dim": 256}, SWIGLU),
}  # fmt: skip


def get_config(variant: str = "mamba") -> ConfigDict:
    if variant not in MODELS:
        raise ValueError(unknown_name("variant", variant, MODELS))
    layers, options, fields = MODELS[variant]
    config = default_config(task={"name": "text", "tokenizer": "bytes", "source": "stdlib"})
    config.name = variant
    with config.unlocked(), config.ignore_type():
        mixers = {"mixers": (variant,) * layers, "mixer_options": {variant: options}}
        config.model.update({"d_model": 2048, **mixers, **fields})
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.lengths = (2048,)
    config.data.batch_tokens = 16 * 2048
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.b2 = 0.95
    config.training.steps = 100_000
    config.training.checkpoint_every = 1000
    config.evaluation.lengths = (2048, 8192)
    return config

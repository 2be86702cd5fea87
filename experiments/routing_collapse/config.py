"""A small mixture of experts on text, with or without something that keeps its experts in use.

    python -m experiments.train --config=experiments/routing_collapse/config.py:none --workdir=runs/collapse/none

Variants: none, loss (Switch's auxiliary loss), bias (DeepSeek-V3's, no loss). All three at once, with their charts:

    python -m experiments.routing_collapse --workdir=runs/routing_collapse

Two layers of width 64, eight experts, one for each token, whose weight is its probability, as in Switch.
"""

from ml_collections import ConfigDict

from lcr.checks import unknown_name
from lcr.training.config import default_config

VARIANTS = ("none", "loss", "bias")


def get_config(variant: str = "none") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(unknown_name("variant", variant, VARIANTS))
    config = default_config(task={"name": "text", "tokenizer": "bytes", "source": "stdlib"})
    config.name = variant
    config.model.mixers = ("gqa", "gqa")
    config.model.feed_forward = "moe"
    config.model.feed_forward_options = {
        "moe": {
            "num_experts": 8,
            "top_k": 1,
            "d_expert": 128,
            "normalize": False,
            "balance": variant,
            "bias_rate": 1e-2,
        }
    }
    config.data.lengths = (128,)
    config.data.batch_tokens = 4096
    config.optimizer.learning_rate = 3e-3
    config.training.steps = 400
    config.training.checkpoint_every = 200
    config.evaluation.lengths = (128,)
    return config

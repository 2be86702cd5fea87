"""Passkey retrieval: one small model, trained on mixed lengths, to be swept over far longer ones.

    python -m experiments.train --config=experiments/configs/passkey.py:mamba --workdir=runs/mamba

Variants: mamba, retnet, mha, gqa, mqa (two layers each), and long (mamba for longer, on longer prompts).
"""

from ml_collections import ConfigDict

from lcr.mixers.interface import unknown_name
from lcr.training.config import default_config

VARIANTS = ("mamba", "retnet", "mha", "gqa", "mqa", "long")


def get_config(variant: str = "mamba") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(unknown_name("variant", variant, VARIANTS))
    config = default_config()
    config.name = variant
    mixer = "mamba" if variant == "long" else variant
    config.model.mixers = (mixer, mixer)
    config.data.lengths = (96, 160, 320, 640)
    config.data.batch_tokens = 8192
    config.training.steps = 400
    config.training.checkpoint_every = 200
    config.evaluation.lengths = (640, 2560, 10240, 40960, 1048576)
    if variant == "long":
        config.data.lengths = (96, 160, 320, 640, 1280)
        config.training.steps = 2400
    return config

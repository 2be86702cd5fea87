"""Passkey retrieval: one small model, trained on prompts of 72 to 256 tokens, to be swept over far longer ones.

    python -m experiments.train --config=experiments/configs/passkey.py:mamba --workdir=runs/mamba

Variants: mamba, retnet, mha, gqa, mqa (two layers of width 64 each, no feed-forward), and long (mamba, from step 650 on
with prompts of up to 1,024 tokens). Cost and what to expect, on two CPU cores:

    mamba   3 minutes    100% at 256 tokens, 95 to 100% by depth at 4,096 (16 times as long), README.md
    long    20 minutes, beside other work; evaluating takes 6 more: 100% at 1,024 and at 16,384 tokens (16 times as
            long), 81 to 100% at 65,536 (64 times), 100% at 1,048,576 (one prompt for each depth)

The others were not run to the end: their cost is not known, and their learning rates are Mamba's.

What decides how far Mamba reaches (the log of WORKSPACE.md has the trials): first step sizes that differ by orders of
magnitude between channels (dt_min, dt_max), so that some hardly forget; and between tokens (dt_scale), so that some
write the needle and pass over the filler. A convolution of eight taps sees a whole key at once.
"""

from ml_collections import ConfigDict

from lcr.mixers.interface import unknown_name
from lcr.training.config import default_config

VARIANTS = ("mamba", "retnet", "mha", "gqa", "mqa", "long")

MAMBA = {"state_size": 8, "conv_width": 8, "dt_min": 1e-6, "dt_max": 1e-1, "dt_floor": 1e-6, "dt_scale": 6.0}


def get_config(variant: str = "mamba") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(unknown_name("variant", variant, VARIANTS))
    config = default_config()
    config.name = variant
    mixer = "mamba" if variant == "long" else variant
    config.model.mixers = (mixer, mixer)
    config.model.d_ff = 0
    if mixer == "mamba":
        config.model.mixer_options = {"mamba": dict(MAMBA)}
    config.data.lengths = (72, 256)
    config.data.batch_tokens = 4096
    config.optimizer.learning_rate = 6e-3
    config.optimizer.weight_decay = 0.01
    config.training.steps = 650
    config.training.checkpoint_every = 325
    config.evaluation.lengths = (256, 1024, 4096, 16_384, 1_048_576)
    config.evaluation.batch = 20
    config.evaluation.piece = 1024
    config.evaluation.max_tokens = 5_242_880  # at a million tokens: one prompt for each depth
    if variant == "long":
        config.data.curriculum = ((650, (128, 512, 1024)),)
        config.training.steps = 3000
        config.training.checkpoint_every = 500
        config.evaluation.lengths = (1024, 4096, 16_384, 65_536, 1_048_576)
    return config

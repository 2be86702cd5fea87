"""Passkey retrieval: one small model, trained on prompts of 72 to 256 tokens, to be swept over far longer ones.

    python -m experiments.train --config=experiments/configs/passkey.py:mamba --workdir=runs/mamba

Variants: those of `ARCHITECTURES`, two layers of width 64 (griffin three) with as many parameters as Mamba's 72,064,
within 5%: what a mixer leaves over goes to a SwiGLU of width d_ff; jamba, whose layout takes eight layers, of width 32
here (89,022 parameters); and long: mamba, from step 650 on with prompts of up to 1,024 tokens. Cost and what to expect,
on two CPU cores:

    mamba   3 minutes    100% at 256 tokens, 95 to 100% by depth at 4,096 (16 times as long), README.md
    long    20 minutes, beside other work; evaluating takes 6 more: 100% at 1,024 and at 16,384 tokens (16 times as
            long), 81 to 100% at 65,536 (64 times), 100% at 1,048,576 (one prompt for each depth)

The learning rate is the one of 1.5e-3, 3e-3, 6e-3 and 1.2e-2 with the lowest loss in a run of 200 steps
(docs/passkey_learning_rates.jsonl):

    python -m experiments.learning_rates --sweep=experiments/sweeps/passkey.py --workdir=runs/learning_rates

What decides how far Mamba reaches (the log of WORKSPACE.md has the trials): first step sizes that differ by orders of
magnitude between channels (dt_min, dt_max), so that some hardly forget; and between tokens (dt_scale), so that some
write the needle and pass over the filler. A convolution of eight taps sees a whole key at once.
"""

from typing import Any

import lcr
from ml_collections import ConfigDict

from lcr.checks import unknown_name
from lcr.training.config import default_config

MAMBA = {"state_size": 8, "conv_width": 8, "dt_min": 1e-6, "dt_max": 1e-1, "dt_floor": 1e-6, "dt_scale": 6.0}

# name: (learning rate, d_ff, options of the mixer)
MIXERS: dict[str, tuple[float, int, dict[str, Any]]] = {
    "mha": (3e-3, 72, {}),
    "gqa": (6e-3, 96, {}),
    "mqa": (6e-3, 104, {}),
    "mla": (6e-3, 72, {}),
    "infini": (6e-3, 72, {"segment_length": 64}),
    "retnet": (3e-3, 0, {"value_factor": 1.75}),
    "mamba": (6e-3, 0, MAMBA),
    "mamba2": (1.2e-2, 0, {"state_size": 32}),
    "gla": (3e-3, 64, {}),
    "deltanet": (1.2e-2, 64, {}),
    "gated_deltanet": (1.2e-2, 8, {"expand_v": 1.5}),
    "rwkv4": (1.2e-2, 72, {}),
    "rwkv6": (6e-3, 0, {"mix_rank": 8, "decay_rank": 32}),
    "rwkv7": (6e-3, 0, {"value_rank": 16, "gate_rank": 16}),
    "rglru": (1.2e-2, 72, {}),
}
# name: (learning rate, d_model, d_ff, options of the hybrid); what Mamba is in them, it is as MAMBA says
HYBRIDS: dict[str, tuple[float, int, int, dict[str, Any]]] = {
    "samba": (6e-3, 64, 40, {"num_layers": 2, "window": 128}),
    "griffin": (1.2e-2, 64, 32, {"num_layers": 3, "window": 128}),
    "jamba": (6e-3, 32, 16, {"num_layers": 8, "num_experts": 4, "d_expert": 8}),
}
UNTRIED = (6e-3, 72, {})  # of a mixer that has no line above yet
# "attention" is the module of mha, gqa and mqa
ARCHITECTURES = (*MIXERS, *(name for name in lcr.MIXERS if name not in MIXERS and name != "attention"), *HYBRIDS)
VARIANTS = (*ARCHITECTURES, "long")


def get_config(variant: str = "mamba") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(unknown_name("variant", variant, VARIANTS))
    config = default_config()
    config.name = variant
    name = "mamba" if variant == "long" else variant
    with config.unlocked(), config.ignore_type():
        if name in lcr.MIXERS:
            config.optimizer.learning_rate, config.model.d_ff, options = MIXERS.get(name, UNTRIED)
            layers = {"mixers": (name, name), "mixer_options": {name: options} if options else {}}
        else:
            config.optimizer.learning_rate, config.model.d_model, config.model.d_ff, options = HYBRIDS[name]
            layers = lcr.hybrid(name, **options)
            if "mamba" in layers["mixers"]:
                layers["mixer_options"]["mamba"] = MAMBA | layers["mixer_options"].get("mamba", {})
        config.model.update({key: value for key, value in layers.items() if value})
    config.data.lengths = (72, 256)
    config.data.batch_tokens = 4096
    config.optimizer.weight_decay = 0.01
    config.training.steps = 650
    config.training.checkpoint_every = 325
    config.evaluation.lengths = (256, 1024, 4096, 16_384, 65_536, 1_048_576)
    config.evaluation.batch = 20
    config.evaluation.piece = 1024
    config.evaluation.max_tokens = 1_310_720  # at 65,536 tokens four prompts for each depth, at a million one
    if variant == "long":
        config.data.curriculum = ((650, (128, 512, 1024)),)
        config.training.steps = 3000
        config.training.checkpoint_every = 500
        config.evaluation.lengths = (1024, 4096, 16_384, 65_536, 1_048_576)
        config.evaluation.max_tokens = 5_242_880
    return config

"""Which architecture finds a passkey how far beyond its training length, and at what size of state?

    python -m experiments.sweep --sweep=experiments/sweeps/passkey.py --workdir=runs/passkey
    python -m experiments.sweep --sweep=experiments/sweeps/passkey.py:mamba,retnet --workdir=runs/passkey

Every architecture gets the configuration that experiments/configs/passkey.py has for it, and the same prompts.
"""

from ml_collections import ConfigDict

from experiments.configs.passkey import get_config
from lcr.mixers.interface import unknown_name

ARCHITECTURES = ("mamba", "retnet", "mha", "gqa", "mqa")

# Attention reads T tokens in a time that grows with T squared, and its cache grows with T.
MAX_LENGTH = {"mha": 10_240, "gqa": 10_240, "mqa": 10_240}


def get_sweep(only: str = "") -> list[ConfigDict]:
    """The configurations, in order. only: names of architectures, parted by commas; all if empty.

    Raises ValueError for an unknown name, naming the nearest.
    """
    names = [name.strip() for name in only.split(",") if name.strip()] or ARCHITECTURES
    configs = []
    for name in names:
        if name not in ARCHITECTURES:
            raise ValueError(unknown_name("architecture", name, ARCHITECTURES))
        config = get_config(name)
        config.evaluation.max_length = MAX_LENGTH.get(name, 0)
        configs.append(config)
    return configs
